"""`checkpointing_ssu` as an operator of PyTorch: schema, fake tensors, `torch.compile`, the memory of plans."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bits import equal, same_memory
from checkpointing_cases import Case, arguments
from memory import copy
from plan_doubles import Keys, Recorder
from torch._subclasses.fake_tensor import FakeTensorMode

import cute_ssm
from cute_ssm.ops.checkpointing_ssu import operator as module
from cute_ssm.ops.checkpointing_ssu.arguments import DOUBLE, RING, TABLE, TIED, Arguments

BASE = Case(accepted=(7, 5, 14))
PACKED = dataclasses.replace(BASE, batch=4, lengths=(3, 0, 1, 4), pads=())
FORMS = {
    "double": BASE,
    "double_x": dataclasses.replace(BASE, history="double_x"),
    "ring": dataclasses.replace(BASE, history="ring", slack=2),
    "bare": dataclasses.replace(BASE, has_z=False, D=None, dt_bias=None, softplus=False, indices=None, pads=()),
    "packed": PACKED,
    "packed_ring": dataclasses.replace(PACKED, history="ring", items=True),
    "quantised": dataclasses.replace(BASE, state="i8", d_split=2),
    "random": dataclasses.replace(BASE, rounds=10, seed_per_slot=True, pdl=True),
}
DEFAULTS = {"philox_rounds": 10, "d_split": None, "max_seqlen": None, "window": None}
WRITTEN = {"state", "x_history", "B_history", "dt_history", "cum_history", "out", "state_scale"}


def call_of(case: Case, call: dict) -> torch.Tensor:
    return (cute_ssm.checkpointing_ssu_ring if case.ring else cute_ssm.checkpointing_ssu)(**call)


def canonical(case: Case, call: dict) -> dict:
    """Arguments of the operator that PyTorch knows."""
    names = RING if case.ring else DOUBLE
    call = {**DEFAULTS, **call, "ring": case.ring}
    named = {field: call.get(names.get(field, field)) for field in Arguments._fields}
    if case.indices is None and not case.items:
        named["pad_slot_id"] = -1
    return named


@pytest.mark.thin(4)
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    case = FORMS[form]
    named = canonical(case, arguments(case))
    for name in WRITTEN:  # without NaN, which `opcheck` would find unequal to itself
        if named[name] is not None and named[name].is_floating_point():
            named[name] = named[name].contiguous().nan_to_num(0.0)
    for name, inner in TIED.items():
        if named[name] is not None:
            named[name] = named[name][(..., *[0] * inner)]
    torch.library.opcheck(module._REGISTERED.overload, tuple(named.values()))


def test_schema_names_what_is_written():
    schema = {argument.name: argument for argument in module._REGISTERED.overload._schema.arguments}
    assert list(schema) == list(Arguments._fields)
    written = {name for name, argument in schema.items() if argument.alias_info and argument.alias_info.is_write}
    assert written == WRITTEN


@pytest.mark.parametrize("form", FORMS)
def test_compiles_to_one_graph(form):
    case = FORMS[form]
    call = arguments(case)
    eager = copy(call)
    torch._dynamo.reset()  # every form recompiles this function, and few times are allowed

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(tensors):
        return call_of(case, tensors) + 1

    got = step(call)
    wanted = call_of(case, eager) + 1
    equal(got.nan_to_num(), wanted.nan_to_num())
    for name, value in call.items():
        if isinstance(value, torch.Tensor):
            same_memory(value, eager[name], name)


@pytest.mark.parametrize("form", FORMS)
def test_fake_tensors_are_left_alone(form):
    case = FORMS[form]
    call = arguments(case)
    before = copy(call)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in call.items()}
        out = call_of(case, fake)
    assert (out.shape, out.dtype) == (call["x"].shape, call["x"].dtype)
    same_memory(call["state"], before["state"])


def test_untied_arguments_are_refused_while_compiling():
    call = arguments(BASE)
    call["dt"] = call["dt"].contiguous()
    compiled = torch.compile(lambda tensors: call_of(BASE, tensors), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="one value per head, that is, stride 0 in its last dimension"):
        compiled(call)
    call["dt"] = call["dt"][..., :1].expand(*call["dt"].shape[:3], 32)
    with pytest.raises(Exception, match=r"dt: expected last dimensions \(64,\)"):
        compiled(call)


def key_of(case: Case, call: dict, monkeypatch) -> object:
    keys = Keys()
    monkeypatch.setattr(module._path, "plans", keys)
    call_of(case, copy(call))
    return keys.last


@pytest.mark.parametrize("form", FORMS)
def test_steady_state_is_one_look_up_and_one_call(form, monkeypatch):
    case = FORMS[form]
    call = arguments(case)
    kernel = Recorder()
    monkeypatch.setattr(module._path, "plans", {key_of(case, call, monkeypatch): (kernel, (132,))})
    before = copy(call)
    assert call_of(case, call) is call["out"]
    (got,) = kernel.calls
    named = canonical(case, call)
    for name, value in zip(TABLE.tensors, got):
        assert value is named[name], name
    assert got[len(TABLE.tensors) :] == (-1, 132)
    same_memory(call["state"], before["state"])


@pytest.mark.parametrize("form", FORMS)
def test_a_refusing_kernel_leads_to_the_full_check(form, monkeypatch):
    """The kernel's entry refuses strides it was not compiled for; the call is then examined and run anew."""
    case = FORMS[form]
    call = arguments(case)
    twin = copy(call)
    refusing = (Recorder(refuse=True), (132,))
    monkeypatch.setattr(module._path, "plans", {key_of(case, call, monkeypatch): refusing})
    call_of(case, call)
    monkeypatch.setattr(module._path, "plans", {})
    call_of(case, twin)
    same_memory(call["state"], twin["state"])
    same_memory(call["out"], twin["out"])


def test_plans_are_not_used_while_a_config_is_overridden(monkeypatch):
    call, kernel = arguments(BASE), Recorder()
    monkeypatch.setattr(module._path, "plans", {key_of(BASE, call, monkeypatch): (kernel, (132,))})
    with cute_ssm.tuning.override(depth=1):
        call_of(BASE, call)
    assert not kernel.calls


CHANGES = [
    {"state": "f32"}, {"io": "f16"}, {"dt": "bf16"}, {"A": "bf16"}, {"D": "bf16"}, {"D": None}, {"dt_bias": "f16"},
    {"dt_bias": None}, {"softplus": False}, {"has_z": False}, {"history": "double_x"}, {"history": "ring"},
    {"dim": 80}, {"dstate": 128}, {"nheads": 4}, {"nheads": 4, "ngroups": 2}, {"batch": 4}, {"tokens": 3},
    {"window": 15}, {"indices": None, "pads": ()}, {"indices": torch.int64}, {"items": True}, {"rounds": 10},
    {"rounds": 9}, {"rounds": 10, "seed_per_slot": True}, {"d_split": 2}, {"pdl": True}, {"state": "i8"},
    {"pdl": "early_reads"},
    {"batch": 3, "lengths": (1, 2, 3)}, {"batch": 3, "lengths": (1, 2, 3), "tokens": 8},
]  # fmt: skip


def test_every_factor_is_in_the_key_of_plans(monkeypatch):
    cases = [BASE, *(dataclasses.replace(BASE, **change) for change in CHANGES)]
    keys = [key_of(case, arguments(case), monkeypatch) for case in cases]
    assert len(set(keys)) == len(keys)
    assert None not in keys


def test_what_the_entry_of_a_kernel_cannot_compare_is_in_the_key(monkeypatch):
    """Packed sequences are counted by ``cu_seqlens`` alone; rows of a ring do not say how many are for the window."""
    call = arguments(PACKED)
    fewer = {**call, "cu_seqlens": call["cu_seqlens"][:3], "state_batch_indices": call["state_batch_indices"][:2]}
    longer = {**call, "max_seqlen": 5}
    wide = {**call, "cu_seqlens": call["cu_seqlens"].long()}
    keys = {key_of(PACKED, one, monkeypatch) for one in (call, fewer, longer, wide)}
    assert len(keys) == 4
    ring = FORMS["ring"]
    call = arguments(ring)
    other = {**call, "window": 17}
    assert key_of(ring, call, monkeypatch) != key_of(ring, other, monkeypatch)


def test_the_total_of_packed_tokens_is_not_in_the_key(monkeypatch):
    shorter = dataclasses.replace(PACKED, lengths=(1, 1, 1, 1))
    assert key_of(PACKED, arguments(PACKED), monkeypatch) == key_of(shorter, arguments(shorter), monkeypatch)
