"""`selective_state_update` as an operator of PyTorch: schema, fake tensors, `torch.compile`, the memory of plans."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import step_cases
import token_cases
import torch
from bits import equal, same_memory
from memory import copy
from plan_doubles import Recorder, last_key
from step_cases import Case
from token_cases import Tokens
from torch._subclasses.fake_tensor import FakeTensorMode

import cute_ssm
from cute_ssm.ops._calls import Plan
from cute_ssm.ops._plans import Plans
from cute_ssm.ops.selective_state_update import operator as module
from cute_ssm.ops.selective_state_update.arguments import TABLE, Arguments

PACKED = Tokens(packed=True, lengths=(3, 0, 2), pads=(0,))
FORMS = {
    "one": Case(),
    "bare": Case(has_z=False, has_D=False, has_bias=False, indices=None),
    "batched": Tokens(destination="matrix"),
    "packed": PACKED,
    "accepted": dataclasses.replace(PACKED, accepted=True, destination="matrix", cache_steps=3),
    "quantised": Tokens(state="i8", destination="intermediates"),
    "saved": Tokens(destination="intermediates", rows=False),
    "random": Tokens(rounds=10, seed_per_slot=True),
}
DEFAULTS = {
    "zero_padding": False,
    "philox_rounds": 10,
    "cache_steps": 0,
    "pad_slot_id": -1,
    "disable_state_update": False,
}


def arguments(case) -> dict:
    return step_cases.arguments(case) if isinstance(case, Case) else token_cases.arguments(case)


def canonical(call: dict) -> tuple:
    """Arguments of the operator that PyTorch knows, without NaN, which `opcheck` would find unequal to itself."""
    call = {**DEFAULTS, **call}
    for name in ("state", "out", "intermediate_states_buffer", "state_scale", "intermediate_state_scales"):
        if call.get(name) is not None:
            call[name] = call[name].contiguous()
            if call[name].is_floating_point():
                call[name] = call[name].nan_to_num(0.0)
    return tuple(call.get(name) for name in Arguments._fields)


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    torch.library.opcheck(module._REGISTERED.overload, canonical(arguments(FORMS[form])))


def test_schema_names_what_is_written():
    schema = {argument.name: argument for argument in module._REGISTERED.overload._schema.arguments}
    assert list(schema) == [*Arguments._fields]
    written = {name for name, argument in schema.items() if argument.alias_info and argument.alias_info.is_write}
    assert written == {"state", "out", "state_scale", "intermediate_states_buffer", "intermediate_state_scales"}


@pytest.mark.parametrize("give_out", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_compiles_to_one_graph(form, give_out):
    call = arguments(dataclasses.replace(FORMS[form], give_out=give_out))
    eager = copy(call)
    torch._dynamo.reset()  # every form recompiles this function, and few times are allowed

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(tensors):
        return cute_ssm.selective_state_update(**tensors) + 1

    got = step(call)
    wanted = cute_ssm.selective_state_update(**eager) + 1
    ends = call["cu_seqlens"][[0, -1]].tolist() if "cu_seqlens" in call else [0, len(got)]
    owned = slice(*ends)  # other rows of an allocated out are not written
    equal(torch.nan_to_num(got[owned]), torch.nan_to_num(wanted[owned]))
    for name, value in call.items():
        if isinstance(value, torch.Tensor):
            same_memory(value, eager[name], name)


@pytest.mark.parametrize("form", FORMS)
def test_fake_tensors_have_the_result_of_shapes_alone(form):
    call = arguments(dataclasses.replace(FORMS[form], give_out=False))
    before = copy(call)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in call.items()}
        out = cute_ssm.selective_state_update(**fake)
    assert (out.shape, out.dtype) == (call["x"].shape, call["x"].dtype)
    same_memory(call["state"], before["state"])


@pytest.fixture
def plans(monkeypatch):
    monkeypatch.setattr(module._path, "plans", {})
    return module._path.plans


def key_of(call):
    """The key that a call looks up, whether it is legal or not."""

    def run():
        with contextlib.suppress(ValueError):
            cute_ssm.selective_state_update(**call)

    return last_key(module, run)


@pytest.mark.parametrize("form", FORMS)
def test_steady_state_is_one_look_up_and_one_call(form, plans):
    call = arguments(FORMS[form])
    key = key_of(copy(call))
    kernel = Recorder()
    module._path.plans = {key: (kernel, (7, 528))}
    before = copy(call)
    out = cute_ssm.selective_state_update(**call)
    assert out is call["out"]
    (got,) = kernel.calls
    assert len(got) == len(TABLE.tensors) + 3
    for name, value in zip(TABLE.tensors, got):
        assert value is call.get(name), name
    assert got[-3:] == (-1, 7, 528)
    same_memory(call["state"], before["state"])


@pytest.mark.parametrize("form", FORMS)
def test_a_refusing_kernel_leads_to_the_full_check(form, plans):
    """The kernel's entry refuses strides it was not compiled for; the call is then examined and run anew."""
    call = arguments(FORMS[form])
    twin = copy(call)
    key = key_of(copy(call))
    module._path.plans = {key: (Recorder(refuse=True), (7, 528))}
    cute_ssm.selective_state_update(**call)
    module._path.plans = {}
    cute_ssm.selective_state_update(**twin)
    same_memory(call["state"], twin["state"])
    same_memory(call["out"], twin["out"])


@pytest.mark.parametrize(
    "change",
    [
        {"state": "f32"}, {"io": "f16"}, {"dt": "bf16"}, {"A": "bf16"}, {"weights": "bf16"}, {"batch": 4},
        {"ngroups": 1},
        {"has_z": False}, {"has_D": False}, {"has_bias": False}, {"softplus": False}, {"update": False},
        {"indices": None}, {"indices": torch.int64}, {"separate": True}, {"give_out": False}, {"dstate": 64},
        {"dim": 32},
    ],
    ids=str,
)  # fmt: skip
def test_every_factor_is_in_the_key_of_plans(change, plans):
    assert key_of(arguments(Case(**change))) != key_of(arguments(Case()))


def grown(name, axis, by=1):
    """A longer axis, as a view of nothing: no kernel looks at the contents."""

    def change(call):
        shape = list(call[name].shape)
        shape[axis] += by
        call[name] = torch.zeros(shape, dtype=call[name].dtype)

    return change


def cast(name, dtype):
    def change(call):
        call[name] = call[name].to(dtype)

    return change


def replaced(name, value):
    def change(call):
        call[name] = value

    return change


# (base, what the kernel's own entry cannot see, or what another kernel is needed for)
FACTORS = [
    ("batched", grown("dst_state_batch_indices", 1)),
    ("batched", cast("dst_state_batch_indices", torch.int64)),
    ("batched", lambda call: call.update({n: call[n][:, :3] for n in ("x", "dt", "B", "C", "z", "out")})),
    ("batched", replaced("disable_state_update", True)),
    ("packed", replaced("cache_steps", 3)),
    ("packed", cast("cu_seqlens", torch.int64)),
    ("packed", lambda c: c.update(cu_seqlens=c["cu_seqlens"][:3], state_batch_indices=c["state_batch_indices"][:2])),
    ("accepted", cast("num_accepted_tokens", torch.int64)),
    ("accepted", replaced("num_accepted_tokens", None)),
    ("accepted", grown("state_batch_indices", 1)),
    ("accepted", replaced("cache_steps", 4)),
    ("quantised", replaced("disable_state_update", True)),
    ("quantised", grown("intermediate_states_buffer", 0)),
    ("quantised", grown("intermediate_states_buffer", 1)),
    ("quantised", cast("intermediate_state_indices", torch.int64)),
    ("quantised", replaced("intermediate_state_indices", None)),
    ("saved", grown("state", 0)),  # the buffer has too few rows for it
    ("random", replaced("philox_rounds", 9)),
    ("random", replaced("rand_seed", torch.zeros(1, dtype=torch.int64))),
    ("random", replaced("rand_seed", None)),
    ("bare", lambda call: call.update(state=call["state"][:2])),
]  # fmt: skip


@pytest.mark.parametrize(("form", "change"), FACTORS)
def test_what_the_entry_of_a_kernel_does_not_check_is_in_the_key(form, change, monkeypatch):
    call = arguments(FORMS[form])
    other = copy(call)
    change(other)
    keys = []

    class Plans(dict):
        def get(self, key, default=None):
            keys.append(key)
            return Recorder(), (7, 528)

    monkeypatch.setattr(module._path, "plans", Plans())
    for one in (call, copy(call), other):
        cute_ssm.selective_state_update(**one)
    assert keys[0] == keys[1] != keys[2]
    assert None not in keys
    assert len({hash(key) for key in keys}) == 2


def test_plans_are_not_used_while_a_config_is_overridden(plans):
    call = arguments(Case())
    key = key_of(copy(call))
    kernel = Recorder()
    module._path.plans = {key: (kernel, (7, 528))}
    with cute_ssm.tuning.override(rows=16):
        cute_ssm.selective_state_update(**call)
    assert not kernel.calls


def test_packed_calls_differ_in_slots_and_rows_that_their_entry_cannot_compare(plans):
    """Sequences are counted by ``cu_seqlens`` alone: too few slots, or too few rows, must not find a plan."""
    case = Tokens(packed=True, lengths=(4, 4, 4, 4, 4), indices=None, pads=())
    call = token_cases.arguments(case)
    few = {**call, "state": call["state"][:3]}
    assert key_of(call) != key_of(few)
    case = dataclasses.replace(case, destination="intermediates", rows=True)
    call = token_cases.arguments(case)
    few = {**call, "intermediate_state_indices": call["intermediate_state_indices"][:2]}
    assert key_of(call) != key_of(few)
    longer = token_cases.arguments(dataclasses.replace(case, lengths=(4, 4, 4, 4, 3), destination="source"))
    assert key_of(longer) == key_of(token_cases.arguments(dataclasses.replace(case, destination="source")))


def test_a_kernel_for_free_strides_does_not_take_tied_calls(monkeypatch):
    """Which kernel a tied call runs, and so its bits, does not depend on calls before it."""
    tied = step_cases.arguments(step_cases.Case())
    dense = {**tied, "dt": tied["dt"].contiguous()}
    kernels = {}

    def memorise(call, name):
        """Keep a plan for a call on the CPU, as is done for those on a GPU."""
        checked = []
        with monkeypatch.context() as patch:
            patch.setattr(module._path, "_run_on_cpu", checked.append)
            key = key_of(call)
        kernels[name] = Recorder()
        path = module._path
        path.plans, path.loose_plans = Plans(), Plans()
        path.remember(key, checked[0], Plan(kernels[name], (1, 528)))
        return key

    monkeypatch.setattr(module._path, "plans", Plans())
    monkeypatch.setattr(module._path, "loose_plans", Plans())
    assert memorise(dense, "dense") == memorise(tied, "tied")
    key = memorise(dense, "dense")
    assert key not in module._path.plans
    cute_ssm.selective_state_update(**tied)
    assert not kernels["dense"].calls
    cute_ssm.selective_state_update(**dense)
    assert len(kernels["dense"].calls) == 1
