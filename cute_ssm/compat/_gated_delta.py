"""What the decode functions of gated delta nets of vLLM and SGLang have in common."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cute_ssm.compat._arguments import checked_tensor
from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.ops.gated_delta_rule_mtp.operator import gated_delta_rule_mtp


class Rows(NamedTuple):
    """The queries, keys and values of one token per request: (batch, 1, heads, size), views."""

    q: Tensor
    k: Tensor
    v: Tensor


def split(mixed_qkv: Tensor, states: Tensor, name: str = "initial_state") -> Rows:
    """Return the parts of the packed rows [q, k, v], (batch, columns), for states (slots, value_heads, V, K)."""
    if checked_tensor(name, states).dim() != 4:
        raise ValueError(describe(name, "shape (slots, value_heads, V, K)", tuple(states.shape)))
    if checked_tensor("mixed_qkv", mixed_qkv).dim() != 2:
        raise ValueError(describe("mixed_qkv", "shape (batch, columns)", tuple(mixed_qkv.shape)))
    value_heads, V, K = states.shape[1:]
    heads, rest = divmod(mixed_qkv.shape[1] - value_heads * V, 2 * K)
    if heads < 1 or rest:
        expected = f"2 heads K + value_heads V columns, with value_heads = {value_heads}, V = {V}, K = {K}"
        raise ValueError(describe("mixed_qkv", expected, mixed_qkv.shape[1]))
    q, k, v = torch.split(mixed_qkv[:, None], [heads * K, heads * K, value_heads * V], dim=-1)
    return Rows(
        torch.unflatten(q, -1, (heads, K)), torch.unflatten(k, -1, (heads, K)), torch.unflatten(v, -1, (value_heads, V))
    )


def packed_step(
    rows: Rows,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    scale: float,
    pool: Tensor,
    slots: Tensor,
    out: Tensor,
    l2norm: bool,
    write_padded_rows: bool,
) -> None:
    """Run one token per request; a, b (batch, value_heads); negative slots are padding, whose rows become zero."""
    for name, gate in (("a", a), ("b", b)):
        if checked_tensor(name, gate).dim() != 2:
            raise ValueError(describe(name, "shape (batch, value_heads)", tuple(gate.shape)))
    gated_delta_rule_mtp(
        *rows, pool, slots, checked_tensor("A_log", A_log).float(), a[:, None], dt_bias, b[:, None], scale,
        checked_tensor("out", out), disable_state_update=False, use_qk_l2norm=l2norm,
    )  # fmt: skip
    if write_padded_rows:
        out.masked_fill_((slots < 0)[:, None, None, None], 0)


def tokens_of(q: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """Return (sequences, tokens of each) of q (batch, tokens, heads, K), packed if there are offsets.

    Raises
    ------
    UnsupportedSpecError
        Sequences cannot all have the same number of tokens.
    """
    if checked_tensor("q", q).dim() != 4:
        raise ValueError(describe("q", "shape (batch, tokens, heads, K)", tuple(q.shape)))
    if cu_seqlens is None:
        return q.shape[0], q.shape[1]
    if q.shape[0] != 1:
        raise ValueError(describe("q", "a batch of 1 with cu_seqlens", q.shape[0], "pack the sequences"))
    sequences, total = checked_tensor("cu_seqlens", cu_seqlens).shape[0] - 1, q.shape[1]
    even = sequences > 0 and total % sequences == 0
    if even and not cu_seqlens.is_cuda:
        lengths = cu_seqlens.diff().tolist()
        even = all(length in (0, total // sequences) for length in lengths) and any(lengths)
    if not even:
        fix = "the kernel takes as many tokens of every sequence"
        raise UnsupportedSpecError(
            describe("cu_seqlens", f"{total} tokens in sequences of equal length", f"{sequences} sequences", fix)
        )
    return sequences, total // sequences


def sequences_of(tensor: Tensor, sequences: int, tokens: int) -> Tensor:
    """Return rows (total, heads), (1, total, heads, ...) or (sequences, tokens, heads, ...) as the last, a view."""
    if tensor.dim() > 2 and tensor.shape[:2] == (sequences, tokens):
        return tensor
    packed = tensor.dim() > 2 and tensor.shape[:2] == (1, sequences * tokens)
    flat = tensor[0] if packed else tensor
    return torch.unflatten(flat, 0, (sequences, tokens))


def refuse(features: dict[str, bool], fix: str = "") -> None:
    """Raise `UnsupportedSpecError` for the first feature that a call asks for."""
    for name, used in features.items():
        if used:
            raise UnsupportedSpecError(
                describe(name, "its default", "another value", fix or "there is no kernel for it")
            )
