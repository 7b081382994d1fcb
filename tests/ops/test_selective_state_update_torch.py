"""`selective_state_update` as an operator of PyTorch: schema, fake tensors, `torch.compile`, the memory of plans."""

from __future__ import annotations

import pytest
import torch
from step_cases import Case, arguments, copy, storage
from torch._subclasses.fake_tensor import FakeTensorMode

import cute_ssm
from cute_ssm.ops import selective_state_update as module

NAMES = (
    "state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus", "state_batch_indices", "pad_slot_id", "out",
    "disable_state_update", "dst_state_batch_indices",
)  # fmt: skip


@pytest.mark.parametrize("case", [Case(), Case(has_z=False, has_D=False, has_bias=False, indices=None)], ids=str)
def test_opcheck(case):
    call = arguments(case)
    if call["state"].isnan().any():  # opcheck compares with ==
        call["state"].nan_to_num_(0.0)
    call["out"].zero_()
    call = {name: value.contiguous() if name in ("state", "out") else value for name, value in call.items()}
    torch.library.opcheck(module._overload, (*(call.get(name) for name in NAMES), False))


@pytest.mark.parametrize("give_out", [True, False])
def test_compiles_to_one_graph(give_out):
    call = arguments(Case(give_out=give_out))
    eager = copy(call)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(tensors):
        return cute_ssm.selective_state_update(**tensors) + 1

    got = step(call)
    wanted = cute_ssm.selective_state_update(**eager) + 1
    assert torch.equal(torch.nan_to_num(got), torch.nan_to_num(wanted))
    assert torch.equal(storage(call["state"]), storage(eager["state"]))


def test_fake_tensors_have_the_result_of_shapes_alone():
    call = arguments(Case(give_out=False))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in call.items()}
        out = cute_ssm.selective_state_update(**fake)
    assert (out.shape, out.dtype) == (call["x"].shape, call["x"].dtype)


class Recorder:
    """A plan's kernel that notes its calls, or refuses like the kernel's own entry."""

    def __init__(self, refuse=False):
        self.calls, self.refuse = [], refuse

    def __call__(self, *arguments):
        if self.refuse:
            raise ValueError("Mismatched x.strides[0]")
        self.calls.append(arguments)


@pytest.fixture
def plans(monkeypatch):
    monkeypatch.setattr(module, "_plans", {})
    return module._plans


def memorised(call, plans):
    """Call with plans whose keys are recorded."""

    class Keys(dict):
        def get(self, key, default=None):
            self.last = key
            return super().get(key, default)

    module._plans = keys = Keys(plans)
    cute_ssm.selective_state_update(**call)
    return keys.last


def test_steady_state_is_one_look_up_and_one_call(plans):
    call = arguments(Case())
    key = memorised(call, plans)
    kernel = Recorder()
    module._plans = {key: (kernel, 528)}
    out = cute_ssm.selective_state_update(**call)
    assert out is call["out"]
    (got,) = kernel.calls
    for name, value in zip((*NAMES[:9], "state_batch_indices"), got):
        assert value is call[name], name
    assert got[10] is None
    assert got[11] is call["out"]
    assert got[12:] == (-1, 528)


def test_a_refusing_kernel_leads_to_the_full_check(plans):
    """The kernel's entry refuses strides it was not compiled for; the call is then examined and run anew."""
    call = arguments(Case())
    twin = copy(call)
    key = memorised(copy(call), plans)
    module._plans = {key: (Recorder(refuse=True), 528)}
    cute_ssm.selective_state_update(**call)
    module._plans = {}
    cute_ssm.selective_state_update(**twin)
    assert torch.equal(storage(call["state"]), storage(twin["state"]))


@pytest.mark.parametrize(
    "change",
    [
        {"state": "f32"}, {"io": "f16"}, {"dt": "bf16"}, {"A": "bf16"}, {"weights": "bf16"}, {"batch": 4}, {"ngroups": 1},
        {"has_z": False}, {"has_D": False}, {"has_bias": False}, {"softplus": False}, {"update": False},
        {"indices": None}, {"indices": torch.int64}, {"separate": True}, {"give_out": False}, {"dstate": 64}, {"dim": 32},
    ],
    ids=str,
)  # fmt: skip
def test_every_factor_is_in_the_key_of_plans(change, plans):
    assert memorised(arguments(Case(**change)), plans) != memorised(arguments(Case()), plans)
