"""The arguments of `materialize_layers`: their table, the checks of this operator, and the spec of a call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops._table import INT32, Arg, Table
from cute_ssm.ops.materialize.arguments import STATES
from cute_ssm.ops.materialize.config import MOST_PENDING
from cute_ssm.ops.materialize_layers.spec import MaterializeLayersSpec
from cute_ssm.reference.history import Move
from cute_ssm.spec import FLOATS, QUANTISED

ACCESS_BYTES = 16
MOST_LAYERS = 65535  # of a grid
Entries = Arg("layers", ("int64",), contiguous=1)
Slots = Arg("layers batch", INT32, contiguous=1)
Requests = Arg("batch", INT32, contiguous=1)


class Arguments(NamedTuple):
    """The arguments of a call in the order of the schema, which starts with the kernel's tensors."""

    state_ptrs: Annotated[Tensor, Entries]
    state_slot_strides: Annotated[Tensor, Entries]
    x_cache_ptrs: Annotated[Tensor, Entries]
    x_cache_slot_strides: Annotated[Tensor, Entries]
    B_cache_ptrs: Annotated[Tensor, Entries]
    B_cache_slot_strides: Annotated[Tensor, Entries]
    dt_cache_ptrs: Annotated[Tensor, Entries]
    dt_cache_slot_strides: Annotated[Tensor, Entries]
    A_ptrs: Annotated[Tensor, Entries]
    state_scale_ptrs: Annotated[Tensor, Entries]
    state_scale_slot_strides: Annotated[Tensor, Entries]
    src_slots: Annotated[Tensor, Slots]
    dst_slots: Annotated[Tensor, Slots]
    ring_start: Annotated[Tensor, Requests]
    replay_prefix_len: Annotated[Tensor, Requests]
    active_request_indices: Annotated[Tensor, Requests]
    rand_seed: Annotated[Tensor | None, Entries]
    state_dtype: str
    input_dtype: str
    matrixA_dtype: str
    dim: int
    dstate: int
    num_heads: int
    heads_per_group: int
    max_window: int
    ring_buffer_len: int
    pad_slot_id: int
    philox_rounds: int


TABLE = Table(Arguments)


def check(call: Arguments) -> MaterializeLayersSpec:
    """Raise unless the call is as the operator documents it; return its spec."""
    given = TABLE.given(call)
    for name, allowed in (
        ("state_dtype", STATES),
        ("input_dtype", ("bfloat16", "float16")),
        ("matrixA_dtype", FLOATS),
    ):
        if getattr(call, name) not in allowed:
            raise ValueError(describe(name, " or ".join(f"torch.{dtype}" for dtype in allowed), getattr(call, name)))
    _check_sizes(call)
    given.check_dtypes()
    given.check_ranks({}, ("src_slots",))
    layers, batch = call.src_slots.shape
    if not 1 <= layers <= MOST_LAYERS:
        raise ValueError(describe("src_slots", f"1 to {MOST_LAYERS} layers", layers))
    given.check_shapes({"layers": layers, "batch": batch})
    given.check_strides()
    if call.rand_seed is not None and call.state_dtype == "float32":
        raise ValueError(describe("rand_seed", "None with float32 states, which are not rounded", "a tensor"))
    if call.rand_seed is None and call.philox_rounds:
        raise ValueError(describe("rand_seed", "a tensor with philox_rounds", None))
    if call.rand_seed is not None and not call.philox_rounds:
        raise ValueError(describe("philox_rounds", "1 or more with rand_seed", call.philox_rounds))
    spec = MaterializeLayersSpec(
        state_dtype=call.state_dtype,
        input_dtype=call.input_dtype,
        A_dtype=call.matrixA_dtype,
        dim=call.dim,
        dstate=call.dstate,
        philox_rounds=call.philox_rounds,
    )
    spec.check()
    return spec


def _check_sizes(call: Arguments) -> None:
    for name in ("dim", "dstate", "num_heads", "heads_per_group", "max_window", "ring_buffer_len"):
        value = getattr(call, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(describe(name, "an int", type(value).__name__))
        if value < 1:
            raise ValueError(describe(name, "at least 1", value))
    if call.num_heads % call.heads_per_group:
        raise ValueError(
            describe("heads_per_group", f"a divisor of num_heads = {call.num_heads}", call.heads_per_group)
        )
    if call.max_window > MOST_PENDING:
        raise ValueError(describe("max_window", f"at most {MOST_PENDING}", call.max_window))
    if call.ring_buffer_len < call.max_window:
        expected = f"at least max_window = {call.max_window}"
        raise ValueError(describe("ring_buffer_len", expected, call.ring_buffer_len))
    if call.ring_buffer_len > 2 * MOST_PENDING:
        raise ValueError(describe("ring_buffer_len", f"at most {2 * MOST_PENDING}", call.ring_buffer_len))
    if call.philox_rounds < 0:
        raise ValueError(describe("philox_rounds", "0 or more", call.philox_rounds))


# ------------------------------------------------------------------------------------------------------- CPU tensors
def check_contents(call: Arguments) -> None:
    """Raise on addresses, strides, slots and numbers that do not fit."""
    _check_tables(call)
    for _ in moves_of(call):
        pass


def _check_tables(call: Arguments) -> None:
    sizes = {
        "state": (call.dim * call.dstate * call.num_heads, call.state_dtype, ACCESS_BYTES),
        "x_cache": (call.num_heads * call.ring_buffer_len * call.dim, call.input_dtype, ACCESS_BYTES),
        "B_cache": (
            call.num_heads // call.heads_per_group * call.ring_buffer_len * call.dstate, call.input_dtype, ACCESS_BYTES
        ),
        "dt_cache": (call.num_heads * call.ring_buffer_len, "float32", 4),
        "A": (call.num_heads, call.matrixA_dtype, 1),
    }  # fmt: skip
    if call.state_dtype in QUANTISED:
        sizes["state_scale"] = (call.num_heads * call.dim, "float32", 4)
    for name, (size, dtype, align) in sizes.items():
        item = getattr(torch, dtype).itemsize
        for layer, address in enumerate(getattr(call, f"{name}_ptrs").tolist()):
            if address <= 0 or address % max(align, item):
                expected = f"addresses that are multiples of {max(align, item)} bytes"
                raise ValueError(describe(f"{name}_ptrs", expected, f"{address} of layer {layer}"))
        if name == "A":
            continue
        for layer, stride in enumerate(getattr(call, f"{name}_slot_strides").tolist()):
            if stride < size or stride * item % align:
                expected = f"at least {size} elements, in multiples of {align} bytes"
                raise ValueError(describe(f"{name}_slot_strides", expected, f"{stride} of layer {layer}"))


def moves_of(call: Arguments) -> Iterator[list[Move]]:
    """Yield the moves of each layer; raise on values out of range."""
    active: list[int] = call.active_request_indices.tolist()
    active = active[: active.index(-1)] if -1 in active else active
    batch, start, count = len(call.ring_start), call.ring_start.tolist(), call.replay_prefix_len.tolist()
    wrong = [b for b in active if not 0 <= b < batch]
    if wrong or len(set(active)) < len(active):
        expected = f"distinct indices of {batch} requests, then -1"
        raise ValueError(describe("active_request_indices", expected, active))
    for b in active:
        if not 0 <= start[b] < call.ring_buffer_len:
            expected = f"values from 0 to {call.ring_buffer_len - 1}"
            raise ValueError(describe("ring_start", expected, f"{start[b]} of request {b}"))
        if not 0 <= count[b] <= call.max_window:
            expected = f"values from 0 to max_window = {call.max_window}"
            raise ValueError(describe("replay_prefix_len", expected, f"{count[b]} of request {b}"))
    for layer, (sources, targets) in enumerate(zip(call.src_slots.tolist(), call.dst_slots.tolist())):
        moves = []
        for b in active:
            pair = sources[b], targets[b]
            if call.pad_slot_id in pair:
                continue
            for name, slot in zip(("src_slots", "dst_slots"), pair):
                if slot < 0:
                    expected = f"slots that are not negative, or pad_slot_id = {call.pad_slot_id}"
                    raise ValueError(describe(name, expected, f"{slot} of layer {layer}, request {b}"))
            moves.append(Move(*pair, start[b], count[b]))
        for i, move in enumerate(moves):
            others = {slot for j, other in enumerate(moves) if j != i for slot in (other.source, other.destination)}
            if move.destination in others:
                expected = "slots that no other request of the layer reads or writes"
                raise ValueError(describe("dst_slots", expected, f"{move.destination} of layer {layer}"))
        yield moves
