"""Arguments that the operators of the gated delta rule share, and their checks."""

from __future__ import annotations

from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops._gated_delta.spec import TOKEN_BUCKETS, token_bucket
from cute_ssm.ops._table import FLOAT32, INDICES, INT32, Arg, Given
from cute_ssm.spec import FLOATS

QUAD = 4  # elements of the narrowest access to rows of q, k and states
ROW_BYTES = 16  # of the accesses to rows of v and of a 16-bit output
ROWS = {False: ("batch", "tokens"), True: ("1", "total")}  # axes of tokens, without and with cu_seqlens

Queries = Arg("*rows heads K", FLOATS[1:], contiguous=1)
Keys = replace(Queries, dtypes=(), like="q")
Values = replace(Keys, shape="*rows value_heads V")
State = Arg("slots value_heads V K", FLOATS, contiguous=1, align_elements=QUAD, written=True)
Slots = Arg("batch", INDICES)
KeyRing = Arg("slots heads L K", like="q", contiguous=1, align_elements=QUAD, written=True)
ValueRing = Arg("slots value_heads L V", like="q", contiguous=1, align=ROW_BYTES, written=True)
GateRing = Arg("slots value_heads L", FLOAT32, written=True)
Cursor = Arg("slots", INT32)
Rates = Arg("value_heads", FLOAT32, why="cast it once with A_log.float()")
Logits = Arg("*rows value_heads", FLOATS)
StepLogits = replace(Logits, dtypes=(), like="a")
Bias = Arg("value_heads", FLOATS)
Output = Arg("*rows value_heads V", FLOATS, contiguous=1, written=True)


def default_scale(q: Tensor, packed: bool = False) -> float:
    """Return K to the power of -1/2."""
    if q.dim() != 4 or not q.shape[-1]:
        expected = f"shape ({', '.join(ROWS[packed])}, heads, K)"
        raise ValueError(describe("q", expected, tuple(q.shape), "K is at least 1"))
    scale: float = q.shape[-1] ** -0.5
    return scale


def check_scale(scale: object) -> None:
    """Raise unless the factor of the queries is a number."""
    if not isinstance(scale, Real):
        raise TypeError(describe("scale", "a float or None", type(scale).__name__))


class StepSizes(NamedTuple):
    """Sizes of a step; `tokens` is the most that a request may have."""

    batch: int
    tokens: int
    heads: int
    K: int
    value_heads: int
    V: int
    slots: int

    def axes(self, q: Tensor, packed: bool) -> dict[str, Any]:
        """Return the sizes of axes by name."""
        return {**self._asdict(), "rows": dict(zip(ROWS[packed], q.shape[:2]))}


def step_sizes(given: Given, most: int, max_seqlen: int | None = None) -> StepSizes:
    """Return the sizes of a step; raise unless its requests have 1 to `most` tokens.

    `max_seqlen` is that of a step with ``cu_seqlens``, and None without.
    """
    packed = "cu_seqlens" in given
    given.check_ranks({"rows": dict.fromkeys(ROWS[packed], 0)}, ("q", "v", "initial_state", "cu_seqlens"))
    batch, tokens, heads, K = given["q"].shape
    value_heads, V = given["v"].shape[2:]
    if packed:
        batch, tokens = _packed_sizes(given["q"], given["cu_seqlens"], max_seqlen, most)
    elif max_seqlen is not None:
        fix = "q.size(1) is the number of tokens"
        raise ValueError(describe("max_seqlen", "None without cu_seqlens", max_seqlen, fix))
    elif not 1 <= tokens <= most:
        raise ValueError(describe("q", f"1 to {most} tokens", tokens, "split the call"))
    return StepSizes(batch, tokens, heads, K, value_heads, V, given["initial_state"].shape[0])


def _packed_sizes(q: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, most: int) -> tuple[int, int]:
    """Return the number of packed requests and the most tokens that one may have."""
    if q.shape[0] != 1:
        expected = "shape (1, total, heads, K) with cu_seqlens"
        raise ValueError(describe("q", expected, tuple(q.shape), "pack the requests along the tokens"))
    if not cu_seqlens.shape[0]:
        raise ValueError(describe("cu_seqlens", "at least one offset", "none"))
    if max_seqlen is None:
        fix = "an upper bound that is known without reading cu_seqlens"
        raise ValueError(describe("max_seqlen", "the largest number of tokens of a request with cu_seqlens", None, fix))
    arguments.check_integer("max_seqlen", max_seqlen)
    if not 1 <= max_seqlen <= most:
        raise ValueError(describe("max_seqlen", f"1 to {most} tokens", max_seqlen, "split the call"))
    return cu_seqlens.shape[0] - 1, max_seqlen


def check_lengths(cu_seqlens: Tensor, active: Tensor, total: int, max_seqlen: int) -> Tensor:
    """Return the numbers of tokens of packed requests in tensors on the CPU; raise unless those of `active` ones fit.

    A request without tokens is padding like those that are not active.
    """
    offsets = cu_seqlens.long()
    first, last = offsets[:-1], offsets[1:]
    lengths = last - first
    used = active & (lengths != 0)
    if bool((used & ((lengths < 0) | (first < 0) | (last > total))).any()):
        raise ValueError(describe("cu_seqlens", f"rising offsets from 0 to {total} tokens", offsets.tolist()))
    longest = max(lengths[used].tolist(), default=0)
    if longest > max_seqlen:
        expected = f"requests of at most {max_seqlen} tokens"
        raise ValueError(describe("cu_seqlens", expected, f"one of {longest}", "raise max_seqlen"))
    order = first[used].argsort()
    if bool((first[used][order][1:] < last[used][order][:-1]).any()):
        raise ValueError(describe("cu_seqlens", "requests that share no token", offsets.tolist()))
    return lengths


def check_heads(name: str, heads: int, value_heads: int) -> None:
    """Raise unless every head has the same number of value heads."""
    if heads < 1 or value_heads % heads:
        expected = f"value_heads that is a multiple of heads = {heads}"
        raise ValueError(describe(name, expected, f"value_heads = {value_heads}"))


def spec_fields(given: Given, tokens: int, l2norm: bool, zero_padding: bool) -> dict[str, Any]:
    """Return the fields of `spec.GatedDeltaSpec` for a step with up to so many tokens per request."""
    q, v, output = given["q"], given["v"], given["output"]
    sources = {
        "state_dtype": "initial_state",
        "input_dtype": "q",
        "output_dtype": "output",
        "gate_dtype": "a",
        "dt_bias_dtype": "dt_bias",
        "src_dtype": "initial_state_indices",
    }
    return {
        **{field: arguments.name_of(given[name].dtype) for field, name in sources.items()},
        "K": q.shape[3],
        "V": v.shape[3],
        "tokens": token_bucket(tokens, TOKEN_BUCKETS),
        "l2norm": l2norm,
        "zero_padding": zero_padding,
        "input_bytes": input_bytes(q, given["k"], v),
        "vector_output": output.element_size() == 2 and arguments.aligned(output, ROW_BYTES),
    }


def input_bytes(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Return the widest access to rows of inputs: `spec.GatedDeltaSpec.input_bytes`."""
    keys = arguments.common_alignment((q, k), QUAD * q.element_size())
    values = arguments.common_alignment((v,), ROW_BYTES)
    return ROW_BYTES if keys == QUAD * q.element_size() and values == ROW_BYTES else min(keys, values)


def layout(operands: tuple[Any, ...]) -> tuple[object, ...]:
    """Return what `input_bytes` depends on, of operands that start with q, k and v."""
    q, k, v = operands[:3]
    return q.stride(), k.stride(), v.stride(), (q.data_ptr() | k.data_ptr() | v.data_ptr()) % ROW_BYTES


def check_slots(name: str, indices: Tensor, slots: int) -> None:
    """Raise if an index on the CPU exceeds the pool; negative indices are padding."""
    if bool((indices >= slots).any()):
        raise ValueError(describe(name, f"slots below {slots}, or negative entries for padding", int(indices.max())))
