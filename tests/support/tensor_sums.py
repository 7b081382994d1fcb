"""How much of a kernel's error comes from sums of tensor cores: explicit terms of the bounds.

An instruction of a tensor core cuts each addend to 25 bits behind the largest one, and the sum to float32, both towards
zero (`ptxsim.arithmetic.TENSOR_SUMS`, with sources).  With p_i the sum after instruction i of a chain, and a_i the
largest of its ``terms`` products and p_(i-1), the chain loses

    at most   sum_i  2^-23 |p_i|  +  terms 2^-25 a_i
    in mean   sum_i  2^-24 |p_i|  +  2^-25 sqrt(terms / 3 sum_i a_i^2)

since a cut takes half a unit on average, and addends of either sign lose with either sign.  Float32 sums, whose
roundings have both signs, err by less, so that bounds made of float32 PyTorch's errors need these terms.  They are zero
in the emulator's exact arithmetic, and for the reference.

A `Loss` is a tensor whose first axis holds both.  Its effects are followed to first order: `combined` and `product` add
what is lost at most, as if all losses had one sign, and square roots of sums of squares of the means, as if each had
its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import approximations
import torch
from torch import Tensor

from cute_ssm.ops._gated_delta.reference import EPSILON, recurrence

Loss = Tensor  # (2, ...): at most, and in root mean square


class Sums(NamedTuple):
    """Units of losses; zero where sums are float32's.

    Attributes
    ----------
    addend : float
        Of an addend, relative to the largest one.
    result : float
        Of a sum.
    """

    addend: float = 0.0
    result: float = 0.0

    def any(self) -> bool:
        """Whether anything is lost."""
        return any(self)

    def chain(self, products: Tensor, terms: int, start: Tensor | None = None) -> Loss:
        """Loss of sums over the last axis, in instructions of `terms` products, in that order, from `start` on."""
        steps = products.unflatten(-1, (-1, terms))
        partial = torch.nn.functional.pad(steps.sum(-1).cumsum(-1), (1, 0))
        if start is not None:
            partial = partial + start[..., None]
        partial, before = partial[..., 1:], partial[..., :-1]
        largest = torch.maximum(steps.abs().amax(-1), before.abs())
        cut = self.result * partial.abs().sum(-1)
        most = cut + terms * self.addend * largest.sum(-1)
        mean = cut / 2 + (terms / 3) ** 0.5 * self.addend * largest.square().sum(-1).sqrt()
        return torch.stack([most, mean])

    def within(self, size: Tensor, steps: int, terms: int) -> Loss:
        """Loss of sums of `steps` instructions, in any order, whose terms have magnitudes that add up to `size`."""
        mean = steps * self.result / 2 + (steps * terms / 3) ** 0.5 * self.addend
        return torch.stack([self.most(steps, terms) * size, mean * size])

    def most(self, steps: int, terms: int) -> float:
        """Largest loss of sums of `steps` instructions, relative to the sum of the magnitudes of their terms."""
        return steps * (self.result + terms * self.addend)


def in_use() -> Sums:
    """Losses of the arithmetic that kernels run with now."""
    return of(approximations.current_arithmetic())


def of(arithmetic: Any) -> Sums:
    """Losses of an arithmetic of the emulator; they are the same on all targets, and for tf32 and 16-bit operands."""
    return Sums() if arithmetic.exact else _documented()


def _documented() -> Sums:
    from ptxsim.arithmetic import HARDWARE

    figures = HARDWARE.tensor_sum("sm_90a", "mma", "tf32", False)
    return Sums(2.0**-figures.fraction, 2.0**-figures.result)


# ----------------------------------------------------------------------------------------------- quantised states
def state_products(sums: Sums, kind: str, codes: Tensor, C: Tensor) -> Loss:
    """Losses of `StateTile.product`: codes (nheads, dim, dstate), or states that are not quantised, times C.

    Codes of int8 are increased by 1152 before they are multiplied, and the sum starts with that much less, which is a
    sum of C by tensor core, too.  int16 is the same of its upper bytes, 256 times, and its lower bytes, increased by
    1024.  So partial sums are larger than results, and what float32 would lose of them is not less: these losses count
    in exact arithmetic, too.

    Parameters
    ----------
    kind : str
        ``"i8"``, ``"i16"``, or another.
    codes : Tensor, (nheads, dim, dstate), float64
    C : Tensor, (nheads, dstate), float64
    """
    C = C[:, None]
    if kind == "i8":
        return _offset(codes, C, 1152.0)
    if kind == "i16":
        upper = torch.floor(codes / 256)
        return combined(256 * _offset(upper, C, 1152.0), _offset(codes - 256 * upper, C, 1024.0))
    return sums.chain(codes * C, 8)  # some types take 16 at once, and lose less


def _offset(codes: Tensor, C: Tensor, offset: float) -> Loss:
    sums = _documented()
    start = -offset * C.sum(-1)
    return combined(sums.chain((codes + offset) * C, 16, start), offset * sums.chain(C, 16))


# ------------------------------------------------------------------------------------------------ the gated delta rule
def _by_step(columns: Tensor) -> Tensor:
    """Columns in the order in which `TokenChunk.products` multiplies them: of each 16, (4 t + s, 4 t + s + 1)."""
    return columns.unflatten(-1, (-1, 4, 2, 2)).transpose(-2, -3).flatten(-4)


def combined(*losses: Loss) -> Loss:
    """Loss of a sum."""
    most = sum(loss[0] for loss in losses)
    return torch.stack([most, sum(loss[1].square() for loss in losses).sqrt()])


def product(matrix: Tensor, loss: Loss) -> Loss:
    """Loss of the product of a matrix with what lost."""
    return torch.stack([matrix.abs() @ loss[0], (matrix.square() @ loss[1].square()).sqrt()])


def averages(got: Tensor, single: Tensor, exact: Tensor, lost: Loss, dims: tuple[int, ...]) -> tuple[float, ...]:
    """Root mean squares, in units of the largest value along `dims`: of two errors, and of the losses in mean."""
    unit = exact.abs().amax(dims, keepdim=True) + 1e-30
    return tuple((x / unit).square().mean().sqrt().item() for x in (got.double() - exact, single - exact, lost[1]))


class Chunk(NamedTuple):
    """Losses of a chunk: outputs (2, ..., tokens, V), and states after each token (2, ..., tokens, V, K)."""

    outputs: Loss
    states: Loss


def gated_delta_chunk(
    sums: Sums,
    state: Tensor,
    carried: Loss,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    use_qk_l2norm: bool,
) -> Chunk:
    """Losses of tokens that `TokenChunk` multiplies at once, in the notation of `gated_delta_rule_products`.

    In that order: products of keys and queries with each other, whose losses change norms, L and A; products with the
    state, R and P, hence X; U = (1 + L)^-1 X; outputs; states.

    Parameters
    ----------
    state : Tensor, (..., V, K), float64
        The state before; `carried` is its loss.
    q, k : Tensor, (..., tokens, K), float64
        Raw, one row for each value head.
    v : Tensor, (..., tokens, V), float64
    g, beta : Tensor, (..., tokens), float64
    scale : float
    use_qk_l2norm : bool
    """
    tokens = k.shape[-2]
    groups = -(-tokens // 8)
    triangle, update = 4 * groups, 2 * groups  # instructions of a product with a triangular matrix, and with keys
    alpha = torch.exp(g)
    decay = torch.zeros(*alpha.shape, tokens, dtype=alpha.dtype)
    for t in range(tokens):
        decay[..., t, :t] = decay[..., t - 1, :t] * alpha[..., t, None]
        decay[..., t, t] = 1
    gamma = torch.cumprod(alpha, -1)
    kappa, rho = torch.ones_like(alpha), torch.full_like(alpha, scale)
    keys, queries, rows = (_by_step(x) for x in (k, q, state))
    of_keys = sums.chain(keys[..., :, None, :] * keys[..., None, :, :], 8)
    of_both = sums.chain(queries[..., :, None, :] * keys[..., None, :, :], 8)
    kappa_loss = rho_loss = torch.zeros(2, *alpha.shape, dtype=alpha.dtype)  # relative
    if use_qk_l2norm:
        squares = k.square().sum(-1) + EPSILON
        kappa, kappa_loss = torch.rsqrt(squares), of_keys.diagonal(dim1=-2, dim2=-1) / (2 * squares)
        squares = q.square().sum(-1) + EPSILON
        rho, rho_loss = scale * torch.rsqrt(squares), sums.chain(queries.square(), 8) / (2 * squares)
    scaled = decay * kappa[..., None, :]
    left = beta[..., None] * kappa[..., None] * scaled
    L = (left * (k @ k.mT)).tril(-1)
    A = (rho[..., None] * scaled * (q @ k.mT)).tril()
    of_token, of_other = kappa_loss[..., None], kappa_loss[..., None, :]
    L_loss = combined(L.abs() * of_token, L.abs() * of_other, left * of_keys).tril(-1)
    of_both = abs(rho[..., None]) * scaled * of_both
    A_loss = combined(A.abs() * rho_loss[..., None], A.abs() * of_other, of_both).tril()
    P, R = k @ state.mT, q @ state.mT
    P_loss = combined(sums.chain(rows[..., None, :, :] * keys[..., :, None, :], 8), product(k, carried.mT))
    R_loss = combined(sums.chain(rows[..., None, :, :] * queries[..., :, None, :], 8), product(q, carried.mT))
    of_P, of_R = (gamma * kappa)[..., None], (gamma * abs(rho))[..., None]
    X = beta[..., None] * (v - of_P * P)
    X_loss = beta[..., None] * of_P * combined(P_loss, P.abs() * of_token)
    eye = torch.eye(tokens, dtype=L.dtype).expand_as(L)
    inverse = torch.linalg.solve_triangular(L, eye, upper=False, unitriangular=True)
    U, terms = inverse @ X, inverse.abs() @ X.abs()
    X_loss = combined(X_loss, product(U.mT, L_loss.mT).mT)
    U_loss = combined(product(inverse, X_loss), sums.within(terms, triangle, 8))
    outputs = combined(
        of_R * R_loss,
        of_R * R.abs() * rho_loss[..., None],
        product(U.mT, A_loss.mT).mT,
        product(A, U_loss),
        sums.within(A.abs() @ terms, triangle, 8),
    )
    grown, states = combined(U_loss, U.abs() * of_token), []
    for t in range(tokens):
        weights = scaled[..., t, :, None]
        added = sums.within((weights * U.abs()).mT @ k.abs(), update, 8)
        states.append(combined(gamma[..., t, None, None] * carried, product(k.mT, weights * grown).mT, added))
    return Chunk(outputs, torch.stack(states, -3))


def gated_delta_fold(
    sums: Sums, state: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, use_qk_l2norm: bool
) -> Loss:
    """Loss of a state (value_heads, V, K) after pending tokens, which are folded eight at a time.

    Tokens are (value_heads, tokens, ..) as in `gated_delta_chunk`.
    """
    carried = torch.zeros(2, *state.shape, dtype=state.dtype)
    for first in range(0, k.shape[1], 8):
        part = [x[:, first : first + 8] for x in (k, v, g, beta)]
        keys, values, *gates = part
        carried = gated_delta_chunk(sums, state, carried, keys, *part, 1.0, use_qk_l2norm).states[:, :, -1]
        rows = [x.transpose(0, 1)[None] for x in (keys, keys, values, *gates)]
        state = recurrence(state[None], *rows, 1.0, use_qk_l2norm, torch.float64)[1][0, -1]
    return carried
