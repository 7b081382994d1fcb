"""Terms of the bounds for sums of tensor cores: sums that are cut as on Hopper and Blackwell stay within them."""

from __future__ import annotations

import gdn_cases
import pytest
import tensor_sums
import torch

pytest.importorskip("cutlass")

import ptxsim
from ptxsim import tensorcore
from ptxsim.arithmetic import HARDWARE, TENSOR_SUMS

FIGURES = HARDWARE.tensor_sum("sm_90a", "mma", "tf32", False)
SUMS = tensor_sums.of(HARDWARE)


def draw(*shape, spread=4):
    """Random numbers of 11 bits, whose magnitudes differ."""
    g = torch.Generator().manual_seed(1)
    size = torch.randint(-spread, spread + 1, shape, generator=g)
    return (torch.randn(shape, generator=g) * 2.0**size).half().float()


def chained(a, b, start, terms, figures):
    """What a chain of instructions adds to `start`: a (rows, K) times b (columns, K)."""
    total = start[None].numpy()
    for k in range(0, a.shape[-1], terms):
        left, right = (x[None, :, k : k + terms].numpy() for x in (a, b))
        total = tensorcore.product(left, right, total, ("f16", "f16"), figures)
    return torch.from_numpy(total[0])


def test_units_are_the_same_for_all_operands_and_targets():
    for (_, instruction), kinds in TENSOR_SUMS.items():
        if instruction == "mma":
            assert {(f.fraction, f.result) for (_, half), f in kinds.items() if not half} == {(25, 23)}
    assert tensor_sums.Sums(2.0**-25, 2.0**-23) == SUMS


@pytest.mark.parametrize("terms", [8, 16])
@pytest.mark.parametrize("spread", [0, 4])
def test_chains_of_sums_stay_within_their_losses(terms, spread):
    a, b, start = draw(200, 128, spread=spread), draw(20, 128, spread=spread).roll(1), draw(200, 20)
    wide = a.double()[:, None] * b.double()
    want = wide.sum(-1) + start
    loss = SUMS.chain(wide, terms, start.double())
    any_order = SUMS.within(wide.abs().sum(-1) + start.abs(), 128 // terms, terms)
    for lost in (0, 4):
        figures = FIGURES._replace(fraction=FIGURES.fraction - lost, result=FIGURES.result - lost)
        error = chained(a, b, start, terms, figures) - want
        exceeds = (error.abs() > loss[0]).any(), error.square().mean().sqrt() > loss[1].square().mean().sqrt()
        assert exceeds == ((False, False) if lost == 0 else (True, True))
        assert lost or (error.abs() <= any_order[0]).all()


@pytest.mark.parametrize("sign", ["random", "same"])
def test_products_of_int8_states_stay_within_their_losses(sign):
    """By tensor core as in float32; without the terms of the offsets they do not."""
    g = torch.Generator().manual_seed(2)
    codes = torch.randint(-127, 128, (1, 400, 128), generator=g).double()
    codes[:, :200] = (codes[:, :200] / 40).trunc()
    codes[..., 0] = 127
    C = draw(1, 128, spread=0).double()
    C = C.abs() if sign == "same" else C
    want = (codes * C).sum(-1)[0]
    loss = tensor_sums.state_products(tensor_sums.Sums(), "i8", codes, C)[0, 0]
    ones = torch.ones(400, 128)
    for figures in (FIGURES, None):
        if figures is not None:
            start = chained(ones, C.float(), torch.zeros(400, 1), 16, figures) * -1152
            got = chained((codes[0] + 1152).float(), C.float(), start, 16, figures)[:, 0]
        else:
            got = (codes[0].float() + 1152) @ C[0].float() - 1152 * C.float().sum()
        assert ((got - want).abs() <= loss).all()
    plain = tensor_sums.state_products(SUMS, "", codes, C)[0, 0]
    assert ((got - want).abs() > plain).any()


CASE = gdn_cases.Case(batch=1, tokens=4, heads=8, ratio=1, V=64, out=None, io="f16", pads=(), mode="update")


def test_terms_are_those_of_the_arithmetic_in_use():
    assert not tensor_sums.in_use().any() and gdn_cases.losses(gdn_cases.arguments(CASE)) is None
    with ptxsim.emulate():
        assert not tensor_sums.in_use().any()
    with ptxsim.emulate(arithmetic="hardware"):
        assert tensor_sums.in_use() == SUMS


def test_losses_of_parts_add_up():
    """Twice the same loss is twice as much at most, and the square root of two in mean."""
    loss = torch.tensor([[3.0], [2.0]])
    assert torch.equal(tensor_sums.combined(loss, loss)[0], 2 * loss[0])
    assert torch.allclose(tensor_sums.combined(loss, loss)[1], 2**0.5 * loss[1])
    column = loss[..., None].expand(2, 2, 1)
    assert torch.equal(tensor_sums.product(torch.tensor([[3.0, -4.0]]), column)[:, 0, 0], torch.tensor([21.0, 10.0]))
