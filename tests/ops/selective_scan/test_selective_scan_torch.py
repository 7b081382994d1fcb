"""The scan as operators of PyTorch: schema, fake tensors, `torch.compile`, the memory of plans."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from bits import same_memory
from memory import copy
from plan_doubles import Recorder, last_key
from scan_cases import Case, arguments, scan
from torch._subclasses.fake_tensor import FakeTensorMode

import cute_ssm
from cute_ssm.ops.selective_scan import operator as module

SMALL = Case(lengths=(12,) * 3, dim=8, in_place=False)
PREFIX = Case(lengths=(12, 5), varlen=True, dim=8, computed=(0, 3), block_size=8, in_place=False)
CASES = [
    SMALL,
    Case(lengths=(12,) * 2, dim=8, has_z=False, has_D=False, has_bias=False, indices=None, in_place=False),
    Case(lengths=(12,) * 2, dim=8, state=None, in_place=False),
    PREFIX,
]
NAMES = (
    *(name for name in module.TABLE.tensors if name != "out"), "delta_softplus", "null_block_id", "block_size",
)  # fmt: skip


def ordered(call: dict) -> tuple:
    defaults = {"block_size": 1024}
    return tuple(call.get(name, defaults.get(name)) for name in NAMES)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case, in_place):
    call = arguments(dataclasses.replace(case, layout="packed", slot_gap=0))
    if call["ssm_states"] is not None:  # opcheck compares with ==
        call["ssm_states"] = call["ssm_states"].nan_to_num(0.0).contiguous()
    if in_place:
        torch.library.opcheck(module._REGISTERED_IN_PLACE.overload, ordered(call))
    else:
        torch.library.opcheck(module._REGISTERED.overload, (*ordered(call), torch.zeros_like(call["u"])))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("give_out", [True, False])
def test_compiles_to_one_graph(give_out, in_place):
    case = dataclasses.replace(SMALL, give_out=give_out, in_place=in_place)
    call = arguments(case)
    eager = copy(call)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(tensors):
        return scan(case, tensors) + 1

    got, wanted = step(call), scan(case, eager) + 1
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    for name in ("ssm_states", "delta", "z", "u"):
        same_memory(call[name], eager[name], name)


@pytest.mark.parametrize("in_place", [False, True])
def test_fake_tensors_have_the_result_of_shapes_alone(in_place):
    case = dataclasses.replace(SMALL, give_out=False, in_place=in_place)
    call = arguments(case)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in call.items()}
        out = scan(case, fake)
    assert (out.shape, out.dtype) == (call["u"].shape, call["u"].dtype)


def test_signatures_differ_in_out_alone():
    in_place, functional = (
        list(inspect.signature(f).parameters) for f in (cute_ssm.selective_scan_fn, cute_ssm.selective_scan)
    )
    names = [*NAMES[:9], "delta_softplus", *NAMES[9:12], *NAMES[18:20], *NAMES[12:17]]
    assert in_place == [*names, "saturate"]
    assert functional == [*names, "out", "saturate"]


@pytest.fixture
def plans(monkeypatch):
    monkeypatch.setattr(module._path, "plans", {})


def key_of(case, call):
    """The key under which a call's plan would be kept."""
    return last_key(module, lambda: scan(case, call))


@pytest.mark.parametrize("case", [SMALL, dataclasses.replace(SMALL, in_place=True), PREFIX], ids=str)
def test_steady_state_is_one_look_up_and_one_call(case, plans):
    call = arguments(case)
    key = key_of(case, call)
    kernel = Recorder()
    module._path.plans = {key: (kernel, (528,))}
    out = scan(case, call)
    (got,) = kernel.calls
    sequences = len(case.lengths)
    for name, value in zip(NAMES, got[:17]):
        wanted = call.get(name)
        assert (value is None) == (wanted is None), name
        assert value is None or value.data_ptr() == wanted.data_ptr(), name
    assert got[17].data_ptr() == out.data_ptr()
    assert (got[18] is not None) == case.in_place
    assert got[19:] == (None, 0, case.block_size or 1024, sequences, 528)


def test_parts_get_scratch_of_their_own(plans):
    """Every call hands its parts other memory, or memory that its stream has finished with: the allocator's affair."""
    call = arguments(SMALL)
    key = key_of(SMALL, call)
    kernel = Recorder()
    module._path.plans = {key: (module._with_scratch(kernel, (3, 4, 8, 20)), (528,))}
    scan(SMALL, call)
    scan(SMALL, call)
    for got in kernel.calls:
        assert (got[19].shape, got[19].dtype, got[19].device) == ((3, 4, 8, 20), torch.float32, call["u"].device)
    assert kernel.calls[0][19].data_ptr() != kernel.calls[1][19].data_ptr()


def test_a_refusing_kernel_leads_to_the_full_check(plans):
    """The kernel's entry refuses strides it was not compiled for; the call is then examined and run anew."""
    call = arguments(SMALL)
    twin = copy(call)
    key = key_of(SMALL, copy(call))
    module._path.plans = {key: (Recorder(refuse=True), (528,))}
    scan(SMALL, call)
    module._path.plans = {}
    scan(SMALL, twin)
    for name in ("ssm_states", "out"):
        same_memory(call[name], twin[name])


@pytest.mark.parametrize(
    "change",
    [
        {"state": "io"}, {"io": "f16"}, {"lengths": (12, 12)}, {"lengths": (13,) * 3}, {"ngroups": 2}, {"dim": 16},
        {"grouped": False}, {"has_z": False}, {"has_D": False}, {"has_bias": False}, {"softplus": False},
        {"indices": None}, {"indices": torch.int64}, {"initial": False}, {"in_place": True}, {"dstate": 32},
        {"varlen": True}, {"state": None},
    ],
    ids=str,
)  # fmt: skip
def test_every_factor_is_in_the_key_of_plans(change, plans):
    other = dataclasses.replace(SMALL, **change)
    assert key_of(other, arguments(other)) != key_of(SMALL, arguments(SMALL))


def test_prefix_caching_is_in_the_key_of_plans(plans):
    whole = dataclasses.replace(PREFIX, chunks=False, computed=(0, 0))
    keys = {key_of(case, arguments(case)) for case in (PREFIX, whole)}
    call = arguments(whole)
    for name in ("block_idx_first_scheduled_token", "block_idx_last_scheduled_token", "initial_state_idx"):
        del call[name]
    keys.add(key_of(whole, call))
    assert len(keys) == 3
