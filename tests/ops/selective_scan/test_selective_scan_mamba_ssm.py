"""The scan under the signature of `mamba_ssm`, called as the Mamba-1 block of `transformers` calls it."""

from __future__ import annotations

import pytest
import torch
from bits import equal
from bounds import like_float32
from kernel_backends import both

from cute_ssm.compat.mamba_ssm import selective_scan_fn
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.ops.selective_scan.reference import selective_scan as mathematics


def inputs(length=13, dtype=torch.bfloat16):
    """B and C are transposed, the gate is half of a wider tensor, as the block's projections leave them."""
    g = torch.Generator().manual_seed(0)
    batch, dim, dstate = 2, 24, 16
    rows = torch.randn(batch, 2 * dim, length, generator=g).to(dtype)
    u, z = rows.chunk(2, dim=1)
    B, C = torch.randn(batch, length, 2 * dstate, generator=g).to(dtype).split(dstate, dim=-1)
    delta = torch.randn(batch, dim, length, generator=g).to(dtype)
    A = -torch.rand(dim, dstate, generator=g)
    D, bias = torch.randn(dim, generator=g).to(dtype), torch.randn(dim, generator=g)
    return u, delta, A, B.transpose(1, 2), C.transpose(1, 2), D, z, bias


@both
@pytest.mark.parametrize("length", [1, 13, 40])
def test_against_the_oracle(length, backend):
    args = inputs(length)
    before = [t.clone() for t in args]
    with backend():
        out, state = selective_scan_fn(*args, delta_softplus=True, return_last_state=True)
        alone = selective_scan_fn(*args, delta_softplus=True)
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    equal(out, alone)
    u, delta, A, B, C, D, z, bias = args
    full = (u, delta, A, B[:, None], C[:, None], D, z, bias, True, None)
    _, want, want_state = mathematics(*full, torch.float64)
    _, rounded, rounded_state = mathematics(*full)
    size = (u.abs(), delta, A, B[:, None].abs(), C[:, None].abs(), D.abs(), z, bias, True, None, torch.float64)
    _, out_size, state_size = mathematics(*size)
    like_float32([out], [rounded.bfloat16()], [want], [out_size.abs() + 1e-30], ["out"])
    like_float32([state], [rounded_state], [want_state], [state_size], ["last_state"])
    for tensor, old in zip(args, before):
        equal(tensor, old)


def test_an_empty_sequence_has_the_zero_state():
    out, state = selective_scan_fn(*inputs(0), return_last_state=True)
    assert out.shape == (2, 24, 0)
    assert not state.any()


@pytest.mark.parametrize("name", ["B", "C"])
def test_projections_without_tokens_are_refused(name):
    args = list(inputs())
    args[3 if name == "B" else 4] = torch.ones(24, 16)
    with pytest.raises(UnsupportedSpecError, match=f"{name}: expected shape .batch, dstate, length.*repeat it"):
        selective_scan_fn(*args)


def test_errors_are_those_of_the_scan():
    args = list(inputs())
    with pytest.raises(TypeError, match="A: expected dtype float32, got complex64"):
        selective_scan_fn(*args[:2], args[2].to(torch.complex64), *args[3:])
    with pytest.raises(TypeError, match=r"u: expected a torch\.Tensor, or an array with __dlpack__, got NoneType"):
        selective_scan_fn(None, *args[1:], return_last_state=True)
