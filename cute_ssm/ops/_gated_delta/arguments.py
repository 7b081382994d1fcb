"""Checks that the operators of the gated delta rule share; `given` maps the names of arguments to tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops._gated_delta.spec import GatedDeltaSpec, token_bucket
from cute_ssm.ops._plans import REFUSALS, Plans
from cute_ssm.tuning import overridden

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
QUAD = 4  # elements of the narrowest access to rows of q, k and states
ROW_BYTES = 16  # of the accesses to rows of v and of a 16-bit output
MOST_TOKENS = 16

Plan = Callable[..., None]
Shapes = dict[str, tuple[tuple[int, ...], str]]  # of arguments, in numbers and in letters


def check_shapes(given: Mapping[str, Tensor], more: Shapes) -> None:
    """Raise unless the shapes of what all operators take agree, and those of `more` are as stated there."""
    ranks = {
        "q": "(batch, tokens, heads, K)",
        "v": "(batch, tokens, value_heads, V)",
        "initial_state": "(slots, value_heads, V, K)",
    }
    for name, letters in ranks.items():
        if given[name].dim() != 4:
            raise ValueError(describe(name, f"shape {letters}", tuple(given[name].shape)))
    batch, tokens, heads, K = given["q"].shape
    value_heads, V = given["v"].shape[2:]
    slots = given["initial_state"].shape[0]
    if not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(describe("q", f"1 to {MOST_TOKENS} tokens", tokens, "split the call"))
    gates, per_head = ((batch, tokens, value_heads), "(batch, tokens, value_heads)"), ((value_heads,), "(value_heads,)")
    shapes: Shapes = {
        "k": ((batch, tokens, heads, K), "(batch, tokens, heads, K)"),
        "v": ((batch, tokens, value_heads, V), "(batch, tokens, value_heads, V)"),
        "initial_state": ((slots, value_heads, V, K), "(slots, value_heads, V, K)"),
        "initial_state_indices": ((batch,), "(batch,)"),
        "A_log": per_head,
        "a": gates,
        "dt_bias": per_head,
        "b": gates,
        "output": ((batch, tokens, value_heads, V), "(batch, tokens, value_heads, V)"),
        **more,
    }
    for name, (shape, letters) in shapes.items():
        if name in given:
            arguments.check_shape(name, given[name], shape, letters)
    check_heads("v", heads, value_heads)


def default_scale(q: Tensor) -> float:
    """K to the power of -1/2."""
    if q.dim() != 4 or not q.shape[-1]:
        raise ValueError(describe("q", "shape (batch, tokens, heads, K)", tuple(q.shape), "K is at least 1"))
    scale: float = q.shape[-1] ** -0.5
    return scale


def check_heads(name: str, heads: int, value_heads: int) -> None:
    """Raise unless every head has as many value heads."""
    if heads < 1 or value_heads % heads:
        expected = f"value_heads that is a multiple of heads = {heads}"
        raise ValueError(describe(name, expected, f"value_heads = {value_heads}"))


def check_types(given: Mapping[str, Tensor]) -> None:
    """Raise unless the types of what all operators take fit together."""
    q = given["q"]
    arguments.check_dtype("q", q, HALVES)
    for name in ("k", "v"):
        arguments.check_dtype(name, given[name], (q.dtype,), "the type of q", cast=True)
    for name in ("initial_state", "a", "dt_bias", "output"):
        arguments.check_dtype(name, given[name], FLOATS)
    arguments.check_dtype("b", given["b"], (given["a"].dtype,), "the type of a", cast=True)
    arguments.check_dtype("A_log", given["A_log"], (torch.float32,), "cast it once with A_log.float()")
    arguments.check_dtype("initial_state_indices", given["initial_state_indices"], INTEGERS)


def check_rows(given: Mapping[str, Tensor], more: Mapping[str, int]) -> None:
    """Raise unless rows are contiguous and aligned: those of all operators, and, to so many bytes, those of `more`."""
    limits = dict.fromkeys(("q", "k", "v", "output"), 1)
    limits |= {"initial_state": QUAD * given["initial_state"].element_size(), **more}
    for name in limits:
        if name in given:
            arguments.check_last_contiguous(name, given[name])
    for name, n_bytes in limits.items():
        if name in given:
            check_aligned(name, given[name], n_bytes)


def check_aligned(name: str, tensor: Tensor, n_bytes: int) -> None:
    """Raise unless the address and the outer strides are multiples of so many bytes."""
    if not arguments.aligned(tensor, n_bytes):
        got = f"address {tensor.data_ptr():#x} and strides {tensor.stride()} of {tensor.element_size()} bytes"
        expected = f"an address and outer strides that are multiples of {n_bytes} bytes"
        fix = "pass a copy"
        if name in arguments.WRITTEN:
            fix = f"pad its rows: {arguments.allocation(tensor)}"
        raise ValueError(describe(name, expected, got, fix))


def spec_fields(given: Mapping[str, Tensor], l2norm: bool, zero_padding: bool) -> dict[str, Any]:
    """Fields of `spec.GatedDeltaSpec`."""
    q, v, output = (given[name] for name in ("q", "v", "output"))
    sources = {
        "state_dtype": "initial_state",
        "input_dtype": "q",
        "output_dtype": "output",
        "gate_dtype": "a",
        "dt_bias_dtype": "dt_bias",
        "src_dtype": "initial_state_indices",
    }
    return {
        **{field: arguments.DTYPE_NAMES[given[name].dtype] for field, name in sources.items()},
        "K": q.shape[3],
        "V": v.shape[3],
        "tokens": token_bucket(q.shape[1]),
        "l2norm": l2norm,
        "zero_padding": zero_padding,
        "input_bytes": input_bytes(q, given["k"], v),
        "vector_output": output.element_size() == 2 and arguments.aligned(output, ROW_BYTES),
    }


def input_bytes(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Widest access to rows of inputs: `spec.GatedDeltaSpec.input_bytes`."""
    keys = arguments.common_alignment((q, k), QUAD * q.element_size())
    values = arguments.common_alignment((v,), ROW_BYTES)
    return ROW_BYTES if keys == QUAD * q.element_size() and values == ROW_BYTES else min(keys, values)


def layout(q: Tensor, k: Any, v: Tensor) -> tuple[object, ...] | None:
    """What `input_bytes` depends on: a kernel for narrow accesses would take aligned rows too."""
    if not isinstance(k, Tensor):
        return None
    return q.stride(), k.stride(), v.stride(), (q.data_ptr() | k.data_ptr() | v.data_ptr()) % ROW_BYTES


def run_loose(plans: Plans[Plan], key: Hashable, operands: tuple[Any, ...]) -> bool:
    """Run a kernel for narrow accesses, if there is one for the layout of q, k and v and it takes the arguments."""
    plan = None if key is None or overridden() else plans.get((key, layout(*operands[:3])))
    if plan is None:
        return False
    try:
        plan(*operands)
    except REFUSALS:
        return False
    return True


def remember(
    plans: Plans[Plan], loose: Plans[Plan], key: Hashable, plan: Plan, spec: GatedDeltaSpec, rows: tuple[Any, ...]
) -> None:
    """Keep a plan, and one for narrow accesses with the layout of q, k and v."""
    if spec.input_bytes == ROW_BYTES:
        plans.remember(key, plan)
    elif key is not None:
        loose.remember((key, layout(*rows)), plan)


def check_slots(name: str, indices: Tensor, slots: int) -> None:
    """Raise if an index on the CPU leads behind the pool."""
    if bool((indices >= slots).any()):
        raise ValueError(describe(name, f"slots below {slots}, or negative entries for padding", int(indices.max())))
