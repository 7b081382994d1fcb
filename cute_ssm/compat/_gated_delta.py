"""What the decode functions of gated delta nets of vLLM and SGLang have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cute_ssm.compat._arguments import checked_tensor, rename
from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.ops._gated_delta.spec import TOKEN_BUCKETS
from cute_ssm.ops.gated_delta_rule_mtp.operator import gated_delta_rule_mtp

TOKENS = TOKEN_BUCKETS[-1]  # of a request in a call of gated_delta_rule_mtp, at most
PACKED_WORDS = {
    "initial_state_indices": "ssm_state_indices",
    "output": "out",
    **dict.fromkeys("qkv", "mixed_qkv"),
    "use_qk_l2norm": "use_qk_l2norm_in_kernel",
}  # of the operator's errors, and those of the engines' packed steps


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
    words: Mapping[str, str] = PACKED_WORDS,
) -> None:
    """Run one token per request; a, b (batch, value_heads); negative slots are padding, whose rows become zero."""
    if slots.dim() != 1:
        raise ValueError(describe("ssm_state_indices", "shape (batch,)", tuple(slots.shape)))
    slots = slots[: len(rows.q)]
    for name, gate in (("a", a), ("b", b)):
        if checked_tensor(name, gate).dim() != 2:
            raise ValueError(describe(name, "shape (batch, value_heads)", tuple(gate.shape)))
    run(
        words, *rows, pool, slots, rates(A_log), a[:, None], dt_bias, b[:, None], scale,
        checked_tensor("out", out), disable_state_update=False, use_qk_l2norm=l2norm,
    )  # fmt: skip
    if write_padded_rows:
        out.masked_fill_((slots < 0)[:, None, None, None], 0)


def run(words: Mapping[str, str], *args: Any, **options: Any) -> Tensor:
    """Return the output of `gated_delta_rule_mtp`, whose errors are in the caller's words."""
    try:
        return gated_delta_rule_mtp(*args, **options)[0]
    except (ValueError, TypeError) as error:
        rename(error, words)
        raise


def rates(A_log: Tensor) -> Tensor:
    """Return ``A_log`` as float32."""
    if not checked_tensor("A_log", A_log).is_floating_point():
        raise TypeError(describe("A_log", "a floating-point dtype", A_log.dtype))
    return A_log.float()


def count_sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return the number of sequences of q (batch, tokens, heads, K), packed if there are offsets."""
    if checked_tensor("q", q).dim() != 4:
        raise ValueError(describe("q", "shape (batch, tokens, heads, K)", tuple(q.shape)))
    if cu_seqlens is None:
        return q.shape[0]
    if checked_tensor("cu_seqlens", cu_seqlens).dim() != 1:
        raise ValueError(describe("cu_seqlens", "shape (sequences + 1,)", tuple(cu_seqlens.shape)))
    return cu_seqlens.shape[0] - 1


def check_indices(name: str, indices: Tensor, sequences: int) -> None:
    """Raise unless this is an index for each of the sequences, or for more."""
    if checked_tensor(name, indices).dtype not in (torch.int32, torch.int64):
        raise TypeError(describe(name, "dtype int32 or int64", indices.dtype))
    if indices.dim() != 1 or indices.shape[0] < sequences:
        raise ValueError(describe(name, f"shape (n,), n >= {sequences} sequences", tuple(indices.shape)))


def gate_rows(name: str, gate: Tensor, q: Tensor) -> Tensor:
    """Return a or b, (tokens, value_heads) or (batch, tokens, value_heads), with the first two axes of q; a view."""
    batch, tokens = q.shape[:2]
    rows = gate[0] if checked_tensor(name, gate).dim() == 3 and gate.shape[:2] == (1, batch * tokens) else gate
    if rows.dim() == 2 and rows.shape[0] == batch * tokens:
        rows = torch.unflatten(rows, 0, (batch, tokens))
    if rows.dim() != 3 or rows.shape[:2] != (batch, tokens):
        expected = f"shape ({batch * tokens}, value_heads) or ({batch}, {tokens}, value_heads)"
        raise ValueError(describe(name, expected, tuple(gate.shape)))
    return rows


def refuse(features: dict[str, bool], fix: str = "") -> None:
    """Raise `UnsupportedSpecError` for the first feature that a call asks for."""
    for name, used in features.items():
        if used:
            raise UnsupportedSpecError(
                describe(name, "its default", "another value", fix or "there is no kernel for it")
            )
