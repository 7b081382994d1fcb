"""Every documented precondition of `selective_state_update`, broken once: the message, and that nothing was written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from step_cases import Case, arguments, copy, storage

import cute_ssm
import ptxsim
from cute_ssm.errors import UnsupportedSpecError


def wrong(call: dict, name: str, change):
    call[name] = change(call[name])


def unaligned(state: torch.Tensor) -> torch.Tensor:
    flat = torch.zeros(state.numel() + 1, dtype=state.dtype)
    return flat[1:].view(state.shape)


def odd_slots(state: torch.Tensor) -> torch.Tensor:
    slots, *inner = state.shape
    size = state[0].numel()
    return torch.zeros(slots, size + 1, dtype=state.dtype)[:, :size].unflatten(1, inner)


# (argument, how it is broken, error, what the message says beside the argument's name)
BROKEN = [
    ("state", lambda t: None, TypeError, "expected a torch.Tensor, got NoneType"),
    ("x", lambda t: t.float().numpy(), TypeError, "expected a torch.Tensor, got ndarray"),
    ("dt", lambda t: 0.5, TypeError, "expected a torch.Tensor, got float"),
    ("B", lambda t: t.to("meta"), ValueError, "expected a tensor on cpu like state, got one on meta; move it with"),
    ("state", lambda t: t[None], ValueError, r"expected shape \(slots, nheads, dim, dstate\), got \(1, "),
    ("x", lambda t: t[:, None].expand(-1, 2, -1, -1), ValueError, "one token per sequence"),
    ("x", lambda t: t[:, :, :32], ValueError, r"expected shape \(batch, nheads, dim\) = \(3, 4, 64\), got \(3, 4, 32\)"),
    ("dt", lambda t: t[:2], ValueError, r"expected shape \(batch, nheads, dim\) = \(3, 4, 64\)"),
    ("A", lambda t: t[:3], ValueError, r"expected shape \(nheads, dim, dstate\)"),
    ("B", lambda t: t[..., :64], ValueError, r"expected shape \(batch, ngroups, dstate\)"),
    ("C", lambda t: t[:, :1], ValueError, r"expected shape \(batch, ngroups, dstate\) = \(3, 2, 128\)"),
    ("D", lambda t: t[:1], ValueError, r"expected shape \(nheads, dim\)"),
    ("z", lambda t: t[:1], ValueError, r"expected shape \(batch, nheads, dim\)"),
    ("dt_bias", lambda t: t[:, :1], ValueError, r"expected shape \(nheads, dim\)"),
    ("out", lambda t: t[:, :, :8], ValueError, r"expected shape \(batch, nheads, dim\)"),
    ("state_batch_indices", lambda t: t[:2], ValueError, r"expected shape \(batch,\) = \(3,\), got \(2,\)"),
    ("state_batch_indices", lambda t: t[:, None, None], ValueError, r"expected shape \(batch,\)"),
    ("dst_state_batch_indices", lambda t: t[:1], ValueError, r"expected shape \(batch,\)"),
    ("state", lambda t: t.double(), TypeError, "expected dtype float32 or bfloat16 or float16, got float64"),
    ("state", lambda t: t.to(torch.int8), TypeError, "expected dtype float32 or bfloat16 or float16, got int8"),
    ("x", lambda t: t.to(torch.float8_e4m3fn), TypeError, "expected dtype float32"),
    ("dt", lambda t: t.long(), TypeError, "expected dtype float32"),
    ("A", lambda t: t.double(), TypeError, "expected dtype float32"),
    ("D", lambda t: t.int(), TypeError, "expected dtype float32"),
    ("dt_bias", lambda t: t.double(), TypeError, "expected dtype float32"),
    ("B", lambda t: t.float(), TypeError, "expected dtype bfloat16, got float32; the type of x; cast it with"),
    ("C", lambda t: t.half(), TypeError, "expected dtype bfloat16, got float16"),
    ("z", lambda t: t.float(), TypeError, "expected dtype bfloat16"),
    ("out", lambda t: t.float(), TypeError, "expected dtype bfloat16"),
    ("state_batch_indices", lambda t: t.short(), TypeError, "expected dtype int32 or int64, got int16"),
    ("dst_state_batch_indices", lambda t: t.float(), TypeError, "expected dtype int32 or int64"),
    ("x", lambda t: t.mT.contiguous().mT, ValueError, r"stride 1 in its last dimension.*pass x.contiguous\(\)"),
    ("B", lambda t: t.repeat(1, 1, 2)[..., ::2], ValueError, "stride 1 in its last dimension"),
    ("out", lambda t: t.mT.contiguous().mT, ValueError, "stride 1 in its last dimension"),
    ("A", lambda t: torch.ones(4, 128, 64).mT, ValueError, "stride 1 in the last.*pass A.contiguous"),
    ("state", lambda t: t.mT.contiguous().mT, ValueError, "contiguous rows of dstate"),
    ("state", unaligned, ValueError, "multiples of 16 bytes.*pad the slots of the pool"),
    ("state", odd_slots, ValueError, "multiples of 16 bytes"),
    ("state_batch_indices", lambda t: t + 100, ValueError, r"expected slots in \[0, 9\) or pad_slot_id = -1, got 1"),
    ("state_batch_indices", lambda t: t * 0 - 2, ValueError, r"got -2 at position 0"),
    ("dst_state_batch_indices", lambda t: t * 0 + 9, ValueError, r"got 9 at position 0"),
    ("algorithm", lambda _: "diagonal", ValueError, "expected auto or simple or vertical or horizontal"),
]


def base() -> dict:
    return {**arguments(Case(separate=True, pads=())), "algorithm": "auto"}


def expect(call: dict, name: str, error: type, message: str, emulated: bool):
    tensors = {n: t for n, t in call.items() if isinstance(t, torch.Tensor) and t.device.type == "cpu"}
    before = copy(tensors)
    with pytest.raises(error, match=message) as caught:
        if emulated:
            with ptxsim.emulate(arch="sm_90a") as session:
                cute_ssm.selective_state_update(**call)
        else:
            cute_ssm.selective_state_update(**call)
    assert str(caught.value).startswith(f"{name}:"), str(caught.value)
    for n, tensor in tensors.items():
        assert torch.equal(storage(tensor), storage(before[n])), f"{n} was written before the error"
    if emulated:
        assert not session.launches


@pytest.mark.parametrize("emulated", [False, True], ids=["reference", "emulate"])
@pytest.mark.parametrize(("name", "change", "error", "message"), BROKEN)
def test_broken_precondition(name, change, error, message, emulated):
    call = base()
    wrong(call, name, change)
    expect(call, name, error, message, emulated)


def test_sizes_outside_the_kernel():
    for change, message in (
        ({"dim": 12}, "dim: expected a positive multiple of 8, got 12"),
        ({"dstate": 8}, "dstate: expected 16 to 256, got 8"),
        ({"dstate": 264}, "dstate: expected 16 to 256, got 264"),
    ):
        call = arguments(Case(pads=(), **change))
        with pytest.raises(UnsupportedSpecError, match=message):
            cute_ssm.selective_state_update(**call)


def test_groups_must_divide_heads():
    call = arguments(Case(nheads=3, ngroups=1, pads=()))
    call["B"], call["C"] = (call[n].expand(3, 2, 128).contiguous() for n in "BC")
    expect(call, "B", ValueError, "expected ngroups that divides nheads = 3, got ngroups = 2", False)


def test_too_few_slots_without_indices():
    call = arguments(Case(indices=None))
    call["state"] = call["state"][:2]
    expect(call, "state", ValueError, "expected at least batch = 3 slots, got 2; pass state_batch_indices", False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("state_scale", torch.ones(9, 4, 64)),
        ("intermediate_states_buffer", torch.ones(1)),
        ("intermediate_state_indices", torch.ones(1)),
        ("intermediate_state_scales", torch.ones(1)),
        ("rand_seed", torch.zeros(1, dtype=torch.int64)),
        ("cache_steps", 4),
        ("cu_seqlens", torch.zeros(2, dtype=torch.int32)),
        ("num_accepted_tokens", torch.ones(3, dtype=torch.int32)),
    ],
)
def test_what_this_version_refuses(name, value):
    call = {**base(), name: value}
    expect(call, name, UnsupportedSpecError, "one token per sequence", False)


def test_arrays_are_not_tensors():
    call = base()
    wrong(call, "A", lambda t: np.zeros(3))
    expect(call, "A", TypeError, "expected a torch.Tensor, got ndarray", False)
