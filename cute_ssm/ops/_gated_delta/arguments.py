"""Arguments that the operators of the gated delta rule share, and their checks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops._gated_delta.spec import TOKEN_BUCKETS, token_bucket
from cute_ssm.ops._table import FLOAT32, INDICES, INT32, Arg, Given
from cute_ssm.spec import FLOATS

QUAD = 4  # elements of the narrowest access to rows of q, k and states
ROW_BYTES = 16  # of the accesses to rows of v and of a 16-bit output
MAX_TOKENS = TOKEN_BUCKETS[-1]

Queries = Arg("batch tokens heads K", FLOATS[1:], contiguous=1)
Keys = replace(Queries, dtypes=(), like="q")
Values = replace(Keys, shape="batch tokens value_heads V")
State = Arg("slots value_heads V K", FLOATS, contiguous=1, align_elements=QUAD, written=True)
Slots = Arg("batch", INDICES)
KeyRing = Arg("slots heads L K", like="q", contiguous=1, align_elements=QUAD, written=True)
ValueRing = Arg("slots value_heads L V", like="q", contiguous=1, align=ROW_BYTES, written=True)
GateRing = Arg("slots value_heads L", FLOAT32, written=True)
Cursor = Arg("slots", INT32)
Rates = Arg("value_heads", FLOAT32, why="cast it once with A_log.float()")
Logits = Arg("batch tokens value_heads", FLOATS)
StepLogits = replace(Logits, dtypes=(), like="a")
Bias = Arg("value_heads", FLOATS)
Output = Arg("batch tokens value_heads V", FLOATS, contiguous=1, written=True)


def default_scale(q: Tensor) -> float:
    """Return K to the power of -1/2."""
    if q.dim() != 4 or not q.shape[-1]:
        raise ValueError(describe("q", "shape (batch, tokens, heads, K)", tuple(q.shape), "K is at least 1"))
    scale: float = q.shape[-1] ** -0.5
    return scale


def step_sizes(given: Given) -> dict[str, int]:
    """Return the sizes of the axes of a step; raise unless it has 1 to `MAX_TOKENS` tokens."""
    given.check_ranks({}, ("q", "v", "initial_state"))
    batch, tokens, heads, K = given["q"].shape
    value_heads, V = given["v"].shape[2:]
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(describe("q", f"1 to {MAX_TOKENS} tokens", tokens, "split the call"))
    return {
        "batch": batch, "tokens": tokens, "heads": heads, "K": K, "value_heads": value_heads, "V": V,
        "slots": given["initial_state"].shape[0],
    }  # fmt: skip


def check_heads(name: str, heads: int, value_heads: int) -> None:
    """Raise unless every head has the same number of value heads."""
    if heads < 1 or value_heads % heads:
        expected = f"value_heads that is a multiple of heads = {heads}"
        raise ValueError(describe(name, expected, f"value_heads = {value_heads}"))


def spec_fields(given: Given, l2norm: bool, zero_padding: bool) -> dict[str, Any]:
    """Return the fields of `spec.GatedDeltaSpec` for a step."""
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
        "tokens": token_bucket(q.shape[1]),
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
