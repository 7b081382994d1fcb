"""The arguments of `materialize_gated_delta`: their table, further checks, and the spec of a call."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, NamedTuple

from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops._gated_delta import arguments as shared
from cute_ssm.ops._gated_delta.spec import window_bucket
from cute_ssm.ops._slot_rows import SlotRows
from cute_ssm.ops._table import Table
from cute_ssm.ops.materialize_gated_delta.spec import MaterializeGatedDeltaSpec
from cute_ssm.reference.history import Move
from cute_ssm.spec import FLOATS

NO_PAD = -1  # negative slots are padding, and no others


class Arguments(NamedTuple):
    """The arguments of a call in the order of the schema; the tensors are in that of the kernel."""

    initial_state: Annotated[Tensor, shared.State]
    k_cache: Annotated[Tensor, replace(shared.KeyRing, dtypes=FLOATS[1:], like="", written=False)]
    v_cache: Annotated[Tensor, replace(shared.ValueRing, like="k_cache", written=False)]
    g_cache: Annotated[Tensor, replace(shared.GateRing, written=False)]
    beta_cache: Annotated[Tensor, replace(shared.GateRing, written=False)]
    ring_start: Annotated[Tensor, shared.Cursor]
    prev_num_accepted_tokens: Annotated[Tensor, shared.Cursor]
    out: Annotated[Tensor | None, replace(shared.State, shape="out_slots value_heads V K")]
    state_batch_indices: Annotated[Tensor, shared.Slots]
    dst_state_batch_indices: Annotated[Tensor, shared.Slots]
    num_tokens: Annotated[Tensor | None, shared.Slots]
    use_qk_l2norm: bool
    window: int
    saturate: bool = False

    @property
    def target(self) -> Tensor:
        """The pool that is written."""
        return self.initial_state if self.out is None else self.out


TABLE = Table(Arguments)


def check(call: Arguments) -> MaterializeGatedDeltaSpec:
    """Raise unless the call is as the operator documents it; return its spec."""
    given = TABLE.given(call)
    given.check_ranks({}, ("initial_state", "k_cache", "state_batch_indices"))
    slots, value_heads, V, K = call.initial_state.shape
    heads, length = call.k_cache.shape[1:3]
    given.check_shapes({
        "slots": slots, "value_heads": value_heads, "V": V, "K": K, "heads": heads, "L": length,
        "batch": call.state_batch_indices.shape[0],
    })  # fmt: skip
    shared.check_heads("initial_state", heads, value_heads)
    arguments.check_integer("window", call.window)
    bucket = window_bucket(call.window)
    if call.window > length:
        raise ValueError(describe("window", f"at most {length}, the rows of the rings", call.window))
    given.check_dtypes()
    name = "initial_state" if call.target is call.initial_state else "out"
    arguments.check_saturate(call.saturate, name, call.target.dtype)
    given.check_strides()
    arguments.check_writable("out", call.target)
    spec = MaterializeGatedDeltaSpec(
        state_dtype=arguments.name_of(call.initial_state.dtype),
        out_dtype=arguments.name_of(call.target.dtype),
        input_dtype=arguments.name_of(call.k_cache.dtype),
        K=K,
        V=V,
        window=bucket,
        l2norm=bool(call.use_qk_l2norm),
        src_dtype=arguments.name_of(call.state_batch_indices.dtype),
        dst_dtype=arguments.name_of(call.dst_state_batch_indices.dtype),
        count_dtype=None if call.num_tokens is None else arguments.name_of(call.num_tokens.dtype),
        saturate=call.saturate,
    )
    spec.check()
    return spec


def moves(call: Arguments) -> list[Move]:
    """Return the moves of the active rows, on the CPU; raise if a slot, cursor or number of tokens is out of range."""
    src, dst = call.state_batch_indices, call.dst_state_batch_indices
    rows = SlotRows(
        call.initial_state, call.target, src, dst, call.num_tokens, call.prev_num_accepted_tokens, call.window,
        call.ring_start, "ring_start", call.k_cache.shape[2],
    )  # fmt: skip
    return rows.read((src >= 0) & (dst >= 0), NO_PAD)
