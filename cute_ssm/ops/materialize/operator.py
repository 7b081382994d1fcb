"""`materialize`: the states that pending tokens lead to, written to slots of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cute_ssm import arch as archs
from cute_ssm import runtime
from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops import _library
from cute_ssm.ops._calls import CallPath
from cute_ssm.ops._plans import REFUSALS
from cute_ssm.ops._slot_rows import SlotRows
from cute_ssm.ops.materialize import reference
from cute_ssm.ops.materialize.config import MOST_PENDING, choose_materialize
from cute_ssm.ops.materialize.spec import MaterializeSpec
from cute_ssm.reference.history import DoubleBuffer, History, Ring
from cute_ssm.spec import QUANTISED
from cute_ssm.tuning import overridden

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STATES = (*FLOATS, torch.int16, torch.int8, torch.float8_e4m3fn)
INTEGERS = (torch.int32, torch.int64)
ROW_BYTES = 16


def materialize(
    state: Tensor,
    x_history: Tensor,
    B_history: Tensor,
    dt_history: Tensor,
    A: Tensor,
    prev_num_accepted_tokens: Tensor,
    state_batch_indices: Tensor,
    dst_state_batch_indices: Tensor,
    *,
    cache_buf_idx: Tensor | None = None,
    ring_start: Tensor | None = None,
    num_tokens: Tensor | None = None,
    out: Tensor | None = None,
    state_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    pad_slot_id: int = -1,
    rand_seed: Tensor | None = None,
    philox_rounds: int = 10,
    saturate: bool = False,
) -> Tensor:
    """Write the true state of slots, with their pending tokens folded in, to other slots or to another pool.

    For prefix caching, offloading and migration: a slot of `checkpointing_ssu` holds an older state and the inputs of
    the tokens since.  One launch for all rows of one layer; cursors and history stay as they are: set
    the cursors of a destination to zero before its next step (`StatePool.materialize` does).

    Parameters
    ----------
    state : Tensor, (slots, nheads, dim, dstate), float32/bfloat16/float16/int16/int8/float8_e4m3fn
        Pool that is read.  dim and dstate are multiples of 8 up to 256, rows contiguous; address and other strides are
        multiples of 16 bytes.
    x_history : Tensor, (slots, W, nheads, dim), (slots, 2, W, nheads, dim) or (slots, nheads, L, dim), bfloat16/float16
    B_history : Tensor, (slots, 2, W, ngroups, dstate) or (slots, ngroups, L, dstate), type of x_history
        ``old_x`` and ``old_B``, or ``x_cache`` and ``B_cache``.  Stride 1 in the last dimension; the address and other
        strides are multiples of 16 bytes.
    dt_history : Tensor, (slots, 2, nheads, W) or (slots, nheads, L), float32
        ``old_dt`` or ``dt_cache``; W is at most 64, L at most 128.  Stride 1 in the last dimension.
    A : Tensor, (nheads, dim, dstate), float32/bfloat16/float16
        One value per head, by stride 0 in the last two dimensions.
    prev_num_accepted_tokens : Tensor, (slots,), int32
        Pending tokens of each slot, at most 64.
    state_batch_indices, dst_state_batch_indices : Tensor, (batch,), int32/int64
        Slots that are read, and those of ``out`` that are written: distinct, and none that another row reads.  They
        may be the same: then pending tokens are folded in place.
    cache_buf_idx : Tensor, (slots,), int32
        Active buffers.  This or ``ring_start``.
    ring_start : Tensor, (slots,), int32
        Row of the oldest pending token.
    num_tokens : Tensor, (batch,), int32/int64, optional
        How many pending tokens to fold, from the oldest on: 0 to all.  None: all.
    out : Tensor, (slots, nheads, dim, dstate), any of the types of ``state``, optional
        Pool that is **written**, of any number of slots, laid out like ``state``; None: ``state``.
    state_scale : Tensor, (slots, nheads, dim), float32, for int16/int8/float8_e4m3fn states only
        Stride 1 in the last dimension; **written** if ``out`` is None.
    out_scale : Tensor, (slots, nheads, dim), float32, if ``out`` is given and quantised
        **Written.**
    pad_slot_id : int
        A row that reads or writes this slot is skipped.
    rand_seed : Tensor, (1,) or (slots,), int64, optional
        Round stochastically, with this seed or that of the slot that is read.  Not if the result is float32.
    philox_rounds : int
        Rounds of the Philox generator.
    saturate : bool
        Of new float16 states, make +-65504 what would round to an infinity.  NaN stays NaN, and what is copied stays as
        it is.  An error if the result is of another type.

    Returns
    -------
    Tensor
        The pool that was written.

    Raises
    ------
    ValueError, TypeError
        A shape, type, stride, device or value is not as described above.  Nothing has been written.  What tensors on
        a GPU hold is not looked at: there, rows with a slot, cursor or number out of range are skipped.
    UnsupportedSpecError, UnsupportedArchError
        Sizes, or a GPU, that the kernel is not made for.
    GradientError
        As for all operators.

    Notes
    -----
    A state depends on no value of a later token: rows of the history that are not folded may hold NaN.

    With ``num_tokens`` 0, and if both pools have the same type, state and scales are copied byte for byte.  Otherwise
    the state is computed in float32 and rounded once; which random bits an element takes is documented in
    `cute_ssm.reference.rounding`, the last folded token's number among the pending ones being the token step.
    """
    if cache_buf_idx is not None and ring_start is not None:
        raise ValueError(describe("ring_start", "None beside cache_buf_idx", "both", "a history is one or the other"))
    cursor = cache_buf_idx if ring_start is None else ring_start
    if cursor is None:
        raise ValueError(describe("cache_buf_idx", "a tensor, or ring_start instead", "neither"))
    if out is None and out_scale is not None:
        raise ValueError(describe("out_scale", "None without out", "a tensor", "state_scale is written then"))
    target, target_scale = (state, state_scale) if out is None else (out, out_scale)
    tensors = (
        state, state_scale, x_history, B_history, dt_history, cursor, prev_num_accepted_tokens, A, target,
        target_scale, state_batch_indices, dst_state_batch_indices, num_tokens, rand_seed,
    )  # fmt: skip
    eager = type(state) is Tensor and not torch.compiler.is_compiling()
    if eager:
        _eager(*tensors, ring_start is not None, pad_slot_id, philox_rounds, saturate)
    else:
        # PyTorch lets no operator write an argument that is passed twice
        given = (None, None) if out is None else (target, target_scale)
        _overload(*tensors[:8], *given, *tensors[10:], ring_start is not None, pad_slot_id, philox_rounds, saturate)
    return target


class _Operands(NamedTuple):
    """The tensors of a call in the order of the kernel's arguments."""

    state: Tensor
    state_scale: Tensor | None
    x_history: Tensor
    B_history: Tensor
    dt_history: Tensor
    cursor: Tensor
    prev_num_accepted_tokens: Tensor
    A: Tensor
    out: Tensor
    out_scale: Tensor | None
    state_batch_indices: Tensor
    dst_state_batch_indices: Tensor
    num_tokens: Tensor | None
    rand_seed: Tensor | None


OPTIONAL = ("state_scale", "out_scale", "num_tokens", "rand_seed")
# Steady state: all that a kernel is chosen by, and what its own entry does not check before it launches.
_path = CallPath()


def _run(
    state: Tensor,
    state_scale: Tensor | None,
    x_history: Tensor,
    B_history: Tensor,
    dt_history: Tensor,
    cursor: Tensor,
    pnat: Tensor,
    A: Tensor,
    out: Tensor,
    out_scale: Tensor | None,
    src: Tensor,
    dst: Tensor,
    counts: Tensor | None,
    seed: Tensor | None,
    ring: bool,
    pad_slot_id: int,
    philox_rounds: int,
    saturate: bool = False,
) -> None:
    if isinstance(src, Tensor) and src.dim() == 1:
        dst, counts = arguments.first_rows(src.shape[0], dst, counts)
    tensors = (
        state, state_scale, x_history, B_history, dt_history, cursor, pnat, A, out, out_scale, src, dst, counts, seed,
    )  # fmt: skip
    key: tuple[object, ...] | None
    try:
        key = (
            state.shape, out.shape, x_history.shape, B_history.shape, state.dtype, out.dtype, x_history.dtype, A.dtype,
            src.dtype, dst.dtype, None if counts is None else counts.dtype, ring, state.device, src.numel() > 0,
            None if seed is None else (seed.shape, philox_rounds), out_scale is None, state_scale is None,
            saturate,
        )  # fmt: skip
    except AttributeError:  # something is no tensor, which the checks will name
        key = None
    plan = _path.plans.get(key)
    if plan is not None and not overridden():
        try:
            plan(*tensors, pad_slot_id)
            return
        except REFUSALS:
            pass  # other strides or alignment than last time, or a bad argument: the checks below tell
    operands = _Operands(*tensors)
    spec = _check(operands, ring, philox_rounds, saturate)
    work = src.shape[0] * state.shape[1]
    if state.is_cuda:
        if work:
            function = runtime.get(spec, choose_materialize(), runtime.target(state.device))
            _path.plans.remember(key, function)
            function(*operands, pad_slot_id)
        return
    most = dt_history.shape[-1]
    rows = SlotRows(
        state, out, src, dst, counts, pnat, min(most, MOST_PENDING), cursor,
        "ring_start" if ring else "cache_buf_idx", most if ring else 2,
    ).read((src != pad_slot_id) & (dst != pad_slot_id), pad_slot_id)  # fmt: skip
    emulator = runtime.emulator()
    if emulator is None:
        runtime.by_reference(spec, operands)
        pools = (state, state_scale), (out, out_scale)
        history, rounding = _history(operands, ring), (seed, spec.philox_rounds, saturate)
        reference.materialize(pools[0], history, A[:, 0, 0], pools[1], rows, *rounding)
    elif work:
        kernel = runtime.emulated(spec, choose_materialize(), archs.by_name(emulator.arch))
        kernel(*operands, pad_slot_id)


def _history(o: _Operands, ring: bool) -> History:
    """The history as the reference reads it; running sums, which it does not read, are not at hand."""
    if ring:
        return Ring(o.x_history, o.B_history, o.dt_history)
    return DoubleBuffer(o.x_history, o.B_history, o.dt_history, o.dt_history)


def _check(o: _Operands, ring: bool, philox_rounds: int, saturate: bool) -> MaterializeSpec:
    """Validate the arguments and return the spec of the call."""
    place_name = "ring_start" if ring else "cache_buf_idx"
    named = {place_name if name == "cursor" else name: value for name, value in o._asdict().items()}
    arguments.check_tensors(named, OPTIONAL)
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    _check_shapes(given, ring)
    check_A("A", o.A, o.state.shape[1:])
    arguments.check_dtype("state", o.state, STATES)
    arguments.check_dtype("out", o.out, STATES)
    arguments.check_saturate(saturate, "state" if o.out is o.state else "out", o.out.dtype)
    arguments.check_dtype("x_history", o.x_history, FLOATS[1:])
    arguments.check_dtype("B_history", o.B_history, (o.x_history.dtype,), "the type of x_history")
    for name in ("dt_history", "state_scale", "out_scale"):
        if name in given:
            arguments.check_dtype(name, given[name], (torch.float32,))
    for name in (place_name, "prev_num_accepted_tokens"):
        arguments.check_dtype(name, given[name], (torch.int32,))
    for name in ("state_batch_indices", "dst_state_batch_indices", "num_tokens"):
        if name in given:
            arguments.check_dtype(name, given[name], INTEGERS)
    for name in ("state", "out"):
        _check_scales(name, given, o.out is o.state)
    if o.rand_seed is not None:
        arguments.check_dtype("rand_seed", o.rand_seed, (torch.int64,))
        if o.out.dtype is torch.float32:
            raise ValueError(describe("rand_seed", "None with a float32 result, which is not rounded", "a tensor"))
        if philox_rounds < 1:
            raise ValueError(describe("philox_rounds", "1 or more with rand_seed", philox_rounds))
        arguments.check_last_contiguous("rand_seed", o.rand_seed)
    for name in ("state", "out"):
        if given[name].stride(-1) != 1 or given[name].stride(-2) != given[name].shape[-1]:
            fix = arguments.allocation(given[name])
            raise ValueError(describe(name, "contiguous rows of dstate", f"strides {given[name].stride()}", fix))
    for name in ("x_history", "B_history", "dt_history", "state_scale", "out_scale"):
        if name in given:
            arguments.check_last_contiguous(name, given[name])
    for name in ("state", "out", "x_history", "B_history"):
        rows = given[name][..., 0, :] if name in ("state", "out") else given[name]
        if given[name].numel() and not arguments.aligned(rows, ROW_BYTES):
            got = f"address {rows.data_ptr():#x} and strides {given[name].stride()} of {rows.element_size()} bytes"
            expected = f"an address and strides of multiples of {ROW_BYTES} bytes"
            raise ValueError(describe(name, expected, got, arguments.allocation(given[name])))
    for name in ("out", "out_scale"):
        if name in given:
            arguments.check_writable(name, given[name])
    spec = MaterializeSpec(
        state_dtype=arguments.name_of(o.state.dtype),
        out_dtype=arguments.name_of(o.out.dtype),
        input_dtype=arguments.name_of(o.x_history.dtype),
        A_dtype=arguments.name_of(o.A.dtype),
        dim=o.state.shape[2],
        dstate=o.state.shape[3],
        history="ring" if ring else "double_x" if o.x_history.dim() == 5 else "double",
        src_dtype=arguments.name_of(o.state_batch_indices.dtype),
        dst_dtype=arguments.name_of(o.dst_state_batch_indices.dtype),
        count_dtype=None if o.num_tokens is None else arguments.name_of(o.num_tokens.dtype),
        philox_rounds=0 if o.rand_seed is None else philox_rounds,
        seed_per_slot=o.rand_seed is not None and o.rand_seed.shape[0] != 1,
        saturate=saturate,
    )
    spec.check()
    return spec


def check_A(name: str, A: Tensor, shape: Sequence[int]) -> None:
    """Raise unless A has the shape of one slot's state, a type that kernels read, and one value per head."""
    arguments.check_shape(name, A, tuple(shape), "(nheads, dim, dstate)")
    arguments.check_dtype(name, A, FLOATS)
    if any(A.stride()[1:]):
        fix = f"pass {name}[:, :1, :1].expand({name}.shape)"
        raise ValueError(describe(name, "stride 0 in its last 2 dimensions", f"strides {A.stride()}", fix))


def _check_scales(name: str, given: dict[str, Tensor], same: bool) -> None:
    """Raise unless a pool has scales exactly if it is quantised."""
    scale = "state_scale" if name == "state" or same else "out_scale"
    quantised = arguments.name_of(given[name].dtype) in QUANTISED
    if quantised != (scale in given):
        got = "a tensor" if scale in given else None
        expected = "scales of a quantised state" if quantised else f"None with {given[name].dtype}"
        raise ValueError(describe(scale, expected, got))


def _check_shapes(given: dict[str, Tensor], ring: bool) -> None:
    ranks = {
        "state": ((4,), "(slots, nheads, dim, dstate)"),
        "out": ((4,), "(slots, nheads, dim, dstate)"),
        "x_history": (
            ((4,), "(slots, nheads, L, dim)")
            if ring
            else ((4, 5), "(slots, W, nheads, dim) or (slots, 2, W, nheads, dim)")
        ),
        "B_history": ((4,), "(slots, ngroups, L, dstate)") if ring else ((5,), "(slots, 2, W, ngroups, dstate)"),
        "state_batch_indices": ((1,), "(batch,)"),
        "rand_seed": ((1,), "(1,) or (slots,)"),
    }
    for name, (allowed, letters) in ranks.items():
        if name in given and given[name].dim() not in allowed:
            raise ValueError(describe(name, f"shape {letters}", tuple(given[name].shape)))
    slots, nheads, dim, dstate = given["state"].shape
    groups = given["B_history"].shape[1 if ring else 3]
    rows = given["x_history"].shape[2 if ring else -3]
    batch = given["state_batch_indices"].shape[0]
    if groups < 1 or nheads % groups:
        raise ValueError(describe("B_history", f"ngroups that divides nheads = {nheads}", f"ngroups = {groups}"))
    most = MOST_PENDING * (2 if ring else 1)  # a ring has rows for new tokens too
    if rows > most:
        raise ValueError(describe("x_history", f"at most {most} rows of a slot", rows))
    two = (2,) if given["x_history"].dim() == 5 else ()
    history = {
        "x_history": (slots, *two, rows, nheads, dim),
        "B_history": (slots, 2, rows, groups, dstate),
        "dt_history": (slots, 2, nheads, rows),
    }
    if ring:
        history = {
            "x_history": (slots, nheads, rows, dim),
            "B_history": (slots, groups, rows, dstate),
            "dt_history": (slots, nheads, rows),
        }
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        **{name: (shape, "(slots, ..., rows, ...)") for name, shape in history.items()},
        "out": ((given["out"].shape[0], nheads, dim, dstate), "(slots, nheads, dim, dstate)"),
        "state_scale": ((slots, nheads, dim), "(slots, nheads, dim)"),
        "out_scale": ((given["out"].shape[0], nheads, dim), "(slots, nheads, dim)"),
        "ring_start" if ring else "cache_buf_idx": ((slots,), "(slots,)"),
        "prev_num_accepted_tokens": ((slots,), "(slots,)"),
        "dst_state_batch_indices": ((batch,), "(batch,)"),
        "num_tokens": ((batch,), "(batch,)"),
    }
    for name, (shape, letters) in shapes.items():
        if name in given:
            arguments.check_shape(name, given[name], shape, letters)
    seed = given.get("rand_seed")
    if seed is not None and seed.shape[0] not in (1, slots):
        raise ValueError(describe("rand_seed", f"shape (1,) or (slots,) = ({slots},)", tuple(seed.shape)))


def _run_library(
    state: Tensor,
    state_scale: Tensor | None,
    x_history: Tensor,
    B_history: Tensor,
    dt_history: Tensor,
    cursor: Tensor,
    pnat: Tensor,
    A: Tensor,
    out: Tensor | None,
    out_scale: Tensor | None,
    src: Tensor,
    dst: Tensor,
    counts: Tensor | None,
    seed: Tensor | None,
    ring: bool,
    pad_slot_id: int,
    philox_rounds: int,
    saturate: bool = False,
) -> None:
    target, target_scale = (state, state_scale) if out is None else (out, out_scale)
    _run(
        state, state_scale, x_history, B_history, dt_history, cursor, pnat, A, target, target_scale, src, dst, counts,
        seed, ring, pad_slot_id, philox_rounds, saturate,
    )  # fmt: skip


_eager, _overload, _ = _library.register(
    "serving_materialize(Tensor(a!) state, Tensor(b!)? state_scale, Tensor x_history, Tensor B_history, "
    "Tensor dt_history, Tensor cursor, Tensor prev_num_accepted_tokens, Tensor A, Tensor(c!)? out, "
    "Tensor(d!)? out_scale, Tensor state_batch_indices, Tensor dst_state_batch_indices, Tensor? num_tokens, "
    "Tensor? rand_seed, bool ring, int pad_slot_id, int philox_rounds, bool saturate=False) -> ()",
    _run_library,
    lambda *_: None,
    eager=_run,
)
