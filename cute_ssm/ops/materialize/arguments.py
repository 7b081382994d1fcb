"""The arguments of `materialize`: their table, the checks of this operator, and the spec of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops._cursors.arguments import cursor_name
from cute_ssm.ops._slot_rows import SlotRows
from cute_ssm.ops._table import FLOAT32, INDICES, INT32, Arg, Given, Table
from cute_ssm.ops.materialize.config import MOST_PENDING
from cute_ssm.ops.materialize.spec import MaterializeSpec
from cute_ssm.reference.history import DoubleBuffer, History, Move, Ring
from cute_ssm.spec import FLOATS, QUANTISED

STATES = (*FLOATS, *QUANTISED)
ACCESS_BYTES = 16
# axes of x, B and dt', by layout of the history
X_AXES: dict[str, tuple[str, ...]] = {
    "double": ("slots", "W", "nheads", "dim"),
    "double_x": ("slots", "2", "W", "nheads", "dim"),
    "ring": ("slots", "nheads", "L", "dim"),
}
B_AXES: dict[str, tuple[str, ...]] = {name: ("slots", "2", "W", "ngroups", "dstate") for name in ("double", "double_x")}
B_AXES["ring"] = ("slots", "ngroups", "L", "dstate")
DT_AXES: dict[str, tuple[str, ...]] = {name: ("slots", "2", "nheads", "W") for name in ("double", "double_x")}
DT_AXES["ring"] = ("slots", "nheads", "L")

Pool = Arg("slots nheads dim dstate", STATES, contiguous=2, align=ACCESS_BYTES, written=True)
Scales = Arg("slots nheads dim", FLOAT32, contiguous=1, written=True)


class Arguments(NamedTuple):
    """The arguments of a call in the order of the schema, which starts with the kernel's tensors.

    Without ``out``, the operator writes ``state`` and ``state_scale``, and passes them as ``out`` and ``out_scale``.
    """

    state: Annotated[Tensor, Pool]
    state_scale: Annotated[Tensor | None, Scales]
    x_history: Annotated[Tensor, Arg("*x", ("bfloat16", "float16"), contiguous=1, align=ACCESS_BYTES)]
    B_history: Annotated[Tensor, Arg("*B", like="x_history", contiguous=1, align=ACCESS_BYTES)]
    dt_history: Annotated[Tensor, Arg("*dt", FLOAT32, contiguous=1)]
    cursor: Annotated[Tensor, Arg("slots", INT32)]
    prev_num_accepted_tokens: Annotated[Tensor, Arg("slots", INT32)]
    A: Annotated[Tensor, Arg("nheads dim dstate", FLOATS)]
    out: Annotated[Tensor | None, replace(Pool, shape="out_slots nheads dim dstate")]
    out_scale: Annotated[Tensor | None, replace(Scales, shape="out_slots nheads dim")]
    state_batch_indices: Annotated[Tensor, Arg("batch", INDICES)]
    dst_state_batch_indices: Annotated[Tensor, Arg("batch", INDICES)]
    num_tokens: Annotated[Tensor | None, Arg("batch", INDICES)]
    rand_seed: Annotated[Tensor | None, Arg("seeds", ("int64",), contiguous=1)]
    ring: bool
    pad_slot_id: int
    philox_rounds: int
    saturate: bool = False


TABLE = Table(Arguments)


def out_of(call: Arguments) -> Tensor:
    """Return the states that are written."""
    return call.state if call.out is None else call.out


def layout_of(call: Arguments) -> str:
    """Return the layout of the history, as a spec names it."""
    return "ring" if call.ring else "double_x" if call.x_history.dim() == 5 else "double"


def check(call: Arguments) -> MaterializeSpec:
    """Raise unless the call is as the operator documents it; return its spec."""
    given = TABLE.given(call, {"cursor": cursor_name(call.ring)})
    target, in_place = out_of(call), call.out is call.state
    _check_shapes(given, layout_of(call))
    given.check_dtypes()
    check_A("A", call.A, call.state.shape[1:])
    arguments.check_saturate(call.saturate, "state" if in_place else "out", target.dtype)
    _check_scales("state", "state_scale", given)
    _check_scales("out", "state_scale" if in_place else "out_scale", given)
    if call.rand_seed is not None:
        if arguments.name_of(target.dtype) == "float32":
            raise ValueError(describe("rand_seed", "None with a float32 result, which is not rounded", "a tensor"))
        if call.philox_rounds < 1:
            raise ValueError(describe("philox_rounds", "1 or more with rand_seed", call.philox_rounds))
    given.check_strides()
    for name in ("state", "state_scale") if in_place else ("out", "out_scale"):
        if name in given:
            arguments.check_writable(name, given[name])
    spec = _spec(call, target)
    spec.check()
    return spec


def check_A(name: str, A: Tensor, shape: Sequence[int]) -> None:
    """Raise unless A has the shape of one slot's state, a type that kernels read, and one value per head."""
    arguments.check_shape(name, A, tuple(shape), "(nheads, dim, dstate)")
    arguments.check_dtype(name, A, tuple(getattr(torch, dtype) for dtype in FLOATS))
    if any(A.stride()[1:]):
        fix = f"pass {name}[:, :1, :1].expand({name}.shape)"
        raise ValueError(describe(name, "stride 0 in its last 2 dimensions", f"strides {A.stride()}", fix))


def moves_of(call: Arguments) -> list[Move]:
    """Return the moves of the rows that are not padding; raise on indices and numbers out of range."""
    rows = call.dt_history.shape[-1]
    src, dst = call.state_batch_indices, call.dst_state_batch_indices
    tensors = SlotRows(
        call.state, out_of(call), src, dst, call.num_tokens, call.prev_num_accepted_tokens, min(rows, MOST_PENDING),
        call.cursor, cursor_name(call.ring), rows if call.ring else 2,
    )  # fmt: skip
    return tensors.read((src != call.pad_slot_id) & (dst != call.pad_slot_id), call.pad_slot_id)


def check_contents(call: Arguments) -> None:
    """Raise on indices and numbers out of range; called for tensors on the CPU."""
    moves_of(call)


def history_of(call: Arguments) -> History:
    """Return the history for the reference, which does not read the running sums."""
    if call.ring:
        return Ring(call.x_history, call.B_history, call.dt_history)
    return DoubleBuffer(call.x_history, call.B_history, call.dt_history, call.dt_history)


def _check_scales(name: str, scale: str, given: Given) -> None:
    """Raise unless a pool has scales exactly if it is quantised."""
    quantised = arguments.name_of(given[name].dtype) in QUANTISED
    if quantised != (scale in given):
        got = "a tensor" if scale in given else None
        expected = "scales of a quantised state" if quantised else f"None with {given[name].dtype}"
        raise ValueError(describe(scale, expected, got))


def _check_shapes(given: Given, layout: str) -> None:
    """Raise unless all shapes agree."""
    ring, x = layout == "ring", given["x_history"]
    if x.dim() not in ((4,) if ring else (4, 5)):
        expected = "(slots, nheads, L, dim)" if ring else "(slots, W, nheads, dim) or (slots, 2, W, nheads, dim)"
        raise ValueError(describe("x_history", f"shape {expected}", tuple(x.shape)))
    axes = {"x": X_AXES[layout], "B": B_AXES[layout], "dt": DT_AXES[layout]}
    ranks = {name: dict.fromkeys(letters, 0) for name, letters in axes.items()}
    given.check_ranks(ranks, ("state", "out", "B_history", "state_batch_indices", "rand_seed"))
    slots, nheads, dim, dstate = given["state"].shape
    ngroups = given["B_history"].shape[1 if ring else 3]
    rows = x.shape[2 if ring else -3]
    if ngroups < 1 or nheads % ngroups:
        raise ValueError(describe("B_history", f"ngroups that divides nheads = {nheads}", f"ngroups = {ngroups}"))
    most = MOST_PENDING * (2 if ring else 1)  # a ring also has rows for new tokens
    if rows > most:
        raise ValueError(describe("x_history", f"at most {most} rows of a slot", rows))
    sizes = {"slots": slots, "nheads": nheads, "ngroups": ngroups, "dim": dim, "dstate": dstate}
    sizes |= {"W": rows, "L": rows, "2": 2}
    histories = {name: {letter: sizes[letter] for letter in letters} for name, letters in axes.items()}
    batch, out_slots = given["state_batch_indices"].shape[0], given["out"].shape[0]
    given.check_shapes({**sizes, **histories, "out_slots": out_slots, "batch": batch})
    seed = given.get("rand_seed")
    if seed is not None and seed.shape[0] not in (1, slots):
        raise ValueError(describe("rand_seed", f"shape (1,) or (slots,) = ({slots},)", tuple(seed.shape)))


def _spec(call: Arguments, out: Tensor) -> MaterializeSpec:
    """Return the spec of a call."""
    seed, count = call.rand_seed, call.num_tokens
    return MaterializeSpec(
        state_dtype=arguments.name_of(call.state.dtype),
        out_dtype=arguments.name_of(out.dtype),
        input_dtype=arguments.name_of(call.x_history.dtype),
        A_dtype=arguments.name_of(call.A.dtype),
        dim=call.state.shape[2],
        dstate=call.state.shape[3],
        history=layout_of(call),
        src_dtype=arguments.name_of(call.state_batch_indices.dtype),
        dst_dtype=arguments.name_of(call.dst_state_batch_indices.dtype),
        count_dtype=None if count is None else arguments.name_of(count.dtype),
        philox_rounds=0 if seed is None else call.philox_rounds,
        seed_per_slot=seed is not None and seed.shape[0] != 1,
        saturate=call.saturate,
    )
