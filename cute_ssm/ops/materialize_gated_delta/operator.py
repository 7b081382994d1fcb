"""`materialize_gated_delta`: the states of gated delta nets behind pending tokens, written to slots of their own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cute_ssm import arch as archs
from cute_ssm import runtime
from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops import _library
from cute_ssm.ops._calls import CallPath
from cute_ssm.ops._gated_delta import arguments as checks
from cute_ssm.ops._gated_delta import config as tuning
from cute_ssm.ops._gated_delta.spec import WINDOW_BUCKETS, window_bucket
from cute_ssm.ops._plans import REFUSALS
from cute_ssm.ops._slot_rows import SlotRows
from cute_ssm.ops.materialize_gated_delta import reference
from cute_ssm.ops.materialize_gated_delta.spec import MaterializeGatedDeltaSpec
from cute_ssm.tuning import overridden

NO_PAD = -1  # negative slots are padding, and no others


def materialize_gated_delta(
    initial_state: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    g_cache: Tensor,
    beta_cache: Tensor,
    ring_start: Tensor,
    prev_num_accepted_tokens: Tensor,
    state_batch_indices: Tensor,
    dst_state_batch_indices: Tensor,
    *,
    num_tokens: Tensor | None = None,
    out: Tensor | None = None,
    use_qk_l2norm: bool = True,
    window: int | None = None,
    saturate: bool = False,
) -> Tensor:
    """Write the true state of slots, with their pending tokens folded in, to other slots or to another pool.

    What `materialize` is for `checkpointing_ssu`, for `gated_delta_rule_replay`: one launch for all rows of one layer,
    for prefix caching, preemption and migration.  Cursors and rings stay as they are: set the cursors of a
    destination to zero before its next step (`StatePool.materialize` does).

    Parameters
    ----------
    initial_state, k_cache, v_cache, g_cache, beta_cache, ring_start, prev_num_accepted_tokens
        As for `gated_delta_rule_replay`; read.  Rows of the rings behind the tokens that are folded are not.
    state_batch_indices, dst_state_batch_indices : Tensor, (batch,), int32/int64
        Slots that are read, and those of ``out`` that are written: distinct, and none that another row reads.  They
        may be the same: then pending tokens are folded in place.  A row with a negative one is skipped.
    num_tokens : Tensor, (batch,), int32/int64, optional
        How many pending tokens to fold, from the oldest on: 0 to all.  None: all.
    out : Tensor, (slots, value_heads, V, K), float32/bfloat16/float16, optional
        Pool that is **written**, of any number of slots, laid out like ``initial_state``; None: ``initial_state``.
    use_qk_l2norm : bool
        As the steps have it.
    window : int, optional
        Most pending tokens, 1 to 64, as the steps have it.  None: the rows of the rings, or 64.
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
    The state is that of a step of `gated_delta_rule_replay` that flushes, bit for bit, computed in float32 and rounded
    once to nearest even.  With ``num_tokens`` 0, and if both pools have the same type, it is copied byte for byte.
    """
    if not isinstance(k_cache, Tensor):
        raise TypeError(describe("k_cache", "a torch.Tensor", type(k_cache).__name__))
    if window is None:
        window = min(k_cache.shape[2] if k_cache.dim() > 2 else 1, WINDOW_BUCKETS[-1])
    target = initial_state if out is None else out
    tensors = (
        initial_state, k_cache, v_cache, g_cache, beta_cache, ring_start, prev_num_accepted_tokens, target,
        state_batch_indices, dst_state_batch_indices, num_tokens,
    )  # fmt: skip
    if type(initial_state) is Tensor and not torch.compiler.is_compiling():
        _eager(*tensors, use_qk_l2norm, window, saturate)
    else:
        # PyTorch lets no operator write an argument that is passed twice
        _overload(*tensors[:7], out, *tensors[8:], use_qk_l2norm, window, saturate)
    return target


class _Operands(NamedTuple):
    """The tensors of a call in the order of the kernel's arguments."""

    initial_state: Tensor
    k_cache: Tensor
    v_cache: Tensor
    g_cache: Tensor
    beta_cache: Tensor
    ring_start: Tensor
    prev_num_accepted_tokens: Tensor
    out: Tensor
    state_batch_indices: Tensor
    dst_state_batch_indices: Tensor
    num_tokens: Tensor | None


# Steady state: all that a kernel is chosen by, and what its own entry does not check before it launches.
_path = CallPath()


def _run(
    state: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    g_cache: Tensor,
    beta_cache: Tensor,
    ring_start: Tensor,
    pnat: Tensor,
    out: Tensor,
    src: Tensor,
    dst: Tensor,
    counts: Tensor | None,
    use_qk_l2norm: bool,
    window: int,
    saturate: bool = False,
) -> None:
    if isinstance(src, Tensor) and src.dim() == 1:
        dst, counts = arguments.first_rows(src.shape[0], dst, counts)
    tensors = (state, k_cache, v_cache, g_cache, beta_cache, ring_start, pnat, out, src, dst, counts)
    key: tuple[object, ...] | None
    try:
        key = (
            state.shape, out.shape, k_cache.shape, v_cache.shape, state.dtype, out.dtype, k_cache.dtype, src.dtype,
            dst.dtype, None if counts is None else counts.dtype, use_qk_l2norm, window, state.device, src.shape[0],
            state.stride(), out.stride(), k_cache.stride(), v_cache.stride(), saturate,
        )  # fmt: skip
    except (AttributeError, IndexError):  # something is no tensor, or has no axes, which the checks will name
        key = None
    plan = _path.plans.get(key)
    if plan is not None and not overridden():
        try:
            plan(*tensors, window)
            return
        except REFUSALS:
            pass  # other alignment than last time, or a bad argument: the checks below tell
    operands = _Operands(*tensors)
    spec = _check(operands, use_qk_l2norm, window, saturate)
    units = src.shape[0] * state.shape[1]
    if state.is_cuda:
        if units:
            sm_count = torch.cuda.get_device_properties(state.device).multi_processor_count
            config = tuning.choose_untuned(spec, units, sm_count)
            function = runtime.get(spec, config, runtime.target(state.device))
            _path.plans.remember(key, function)
            function(*operands, window)
        return
    rows = SlotRows(
        state, out, src, dst, counts, pnat, window, ring_start, "ring_start", k_cache.shape[2]
    ).read((src >= 0) & (dst >= 0), NO_PAD)  # fmt: skip
    emulator = runtime.emulator()
    if emulator is None:
        runtime.by_reference(spec, operands)
        rings = reference.DeltaRings(k_cache, v_cache, g_cache, beta_cache)
        reference.materialize_gated_delta(state, rings, out, rows, use_qk_l2norm, saturate=saturate)
    elif units:
        arch = archs.by_name(emulator.arch)
        config = tuning.choose_untuned(spec, units, emulator.sm_count or arch.sm_count)
        runtime.emulated(spec, config, arch)(*operands, window)


def _check(o: _Operands, use_qk_l2norm: bool, window: int, saturate: bool) -> MaterializeGatedDeltaSpec:
    """Validate the arguments and return the spec of the call."""
    named = o._asdict()
    arguments.check_tensors(named, ("num_tokens",))
    ranks = {"initial_state": "(slots, value_heads, V, K)", "k_cache": "(slots, heads, L, K)"}
    for name, letters in ranks.items():
        if named[name].dim() != 4:
            raise ValueError(describe(name, f"shape {letters}", tuple(named[name].shape)))
    if o.state_batch_indices.dim() != 1:
        got = tuple(o.state_batch_indices.shape)
        raise ValueError(describe("state_batch_indices", "shape (batch,)", got))
    slots, value_heads, V, K = o.initial_state.shape
    heads, length = o.k_cache.shape[1:3]
    gates, per_row = (
        ((slots, value_heads, length), "(slots, value_heads, L)"),
        (o.state_batch_indices.shape, "(batch,)"),
    )
    shapes: checks.Shapes = {
        "k_cache": ((slots, heads, length, K), "(slots, heads, L, K)"),
        "v_cache": ((slots, value_heads, length, V), "(slots, value_heads, L, V)"),
        "g_cache": gates,
        "beta_cache": gates,
        "ring_start": ((slots,), "(slots,)"),
        "prev_num_accepted_tokens": ((slots,), "(slots,)"),
        "out": ((o.out.shape[0] if o.out.dim() else 0, value_heads, V, K), "(slots, value_heads, V, K)"),
        "dst_state_batch_indices": per_row,
        "num_tokens": per_row,
    }
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    for name, (shape, letters) in shapes.items():
        if name in given:
            arguments.check_shape(name, given[name], shape, letters)
    checks.check_heads("initial_state", heads, value_heads)
    if not isinstance(window, int) or isinstance(window, bool):
        raise TypeError(describe("window", "an int", type(window).__name__))
    bucket = window_bucket(window)
    if window > length:
        raise ValueError(describe("window", f"at most {length}, the rows of the rings", window))
    for name in ("initial_state", "out"):
        arguments.check_dtype(name, given[name], checks.FLOATS)
    arguments.check_saturate(saturate, "initial_state" if o.out is o.initial_state else "out", o.out.dtype)
    arguments.check_dtype("k_cache", o.k_cache, checks.HALVES)
    arguments.check_dtype("v_cache", o.v_cache, (o.k_cache.dtype,), "the type of k_cache")
    for name in ("g_cache", "beta_cache"):
        arguments.check_dtype(name, given[name], (torch.float32,))
    for name in ("ring_start", "prev_num_accepted_tokens"):
        arguments.check_dtype(name, given[name], (torch.int32,))
    for name in ("state_batch_indices", "dst_state_batch_indices", "num_tokens"):
        if name in given:
            arguments.check_dtype(name, given[name], checks.INTEGERS)
    quads = {name: checks.QUAD * given[name].element_size() for name in ("initial_state", "out", "k_cache")}
    for name, n_bytes in {**quads, "v_cache": checks.ROW_BYTES}.items():
        arguments.check_last_contiguous(name, given[name])
        checks.check_aligned(name, given[name], n_bytes)
    arguments.check_writable("out", o.out)
    spec = MaterializeGatedDeltaSpec(
        state_dtype=arguments.name_of(o.initial_state.dtype),
        out_dtype=arguments.name_of(o.out.dtype),
        input_dtype=arguments.name_of(o.k_cache.dtype),
        K=K,
        V=V,
        window=bucket,
        l2norm=bool(use_qk_l2norm),
        src_dtype=arguments.name_of(o.state_batch_indices.dtype),
        dst_dtype=arguments.name_of(o.dst_state_batch_indices.dtype),
        count_dtype=None if o.num_tokens is None else arguments.name_of(o.num_tokens.dtype),
        saturate=saturate,
    )
    spec.check()
    return spec


def _run_library(
    state: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    g_cache: Tensor,
    beta_cache: Tensor,
    ring_start: Tensor,
    pnat: Tensor,
    out: Tensor | None,
    src: Tensor,
    dst: Tensor,
    counts: Tensor | None,
    use_qk_l2norm: bool,
    window: int,
    saturate: bool = False,
) -> None:
    target = state if out is None else out
    _run(
        state, k_cache, v_cache, g_cache, beta_cache, ring_start, pnat, target, src, dst, counts, use_qk_l2norm, window,
        saturate,
    )  # fmt: skip


_eager, _overload, _ = _library.register(
    "serving_materialize_gated_delta(Tensor(a!) initial_state, Tensor k_cache, Tensor v_cache, Tensor g_cache, "
    "Tensor beta_cache, Tensor ring_start, Tensor prev_num_accepted_tokens, Tensor(b!)? out, "
    "Tensor state_batch_indices, Tensor dst_state_batch_indices, Tensor? num_tokens, bool use_qk_l2norm, int window, "
    "bool saturate=False) -> ()",
    _run_library,
    lambda *_: None,
    eager=_run,
)
