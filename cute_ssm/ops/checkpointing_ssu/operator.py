"""`checkpointing_ssu` and `checkpointing_ssu_ring`: tokens of a recurrence whose state is written now and then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cute_ssm.arch import Arch
from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.ops import _library
from cute_ssm.ops._arguments import check_tied, first_of_batch, first_rows
from cute_ssm.ops._calls import CallPath, Checked, Plan
from cute_ssm.ops._dlpack import NotTensorError, again, not_tensor
from cute_ssm.ops.checkpointing_ssu import arguments, config
from cute_ssm.ops.checkpointing_ssu.arguments import TABLE, TIED, Arguments
from cute_ssm.ops.checkpointing_ssu.reference import update as reference

MOST_UNITS = 2**30  # the kernel counts in 32 bits, and up to one grid further than the last unit
NO_PAD = -1  # no sequence's number


def checkpointing_ssu(
    state: Tensor,
    old_x: Tensor,
    old_B: Tensor,
    old_dt: Tensor,
    old_cumAdt: Tensor,
    cache_buf_idx: Tensor,
    prev_num_accepted_tokens: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    out: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    state_scale: Tensor | None = None,
    rand_seed: Tensor | None = None,
    philox_rounds: int = 10,
    d_split: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    enable_pdl: bool | str = False,
    *,
    work_items: Tensor | None = None,
    num_writes: Tensor | None = None,
    saturate: bool = False,
) -> Tensor:
    """Return the outputs at T new tokens of every sequence, from a state with up to W pending tokens.

    A slot holds a state and a history: the inputs of the k pending tokens, which were accepted after the state was
    stored.  A step computes the outputs at n new tokens from both, and appends the new tokens to the history.  If they
    do not fit, ``k + n > W``, the step writes the state after the k pending tokens, and starts the other buffer with
    the new tokens.  Otherwise the state does not change.  Later the caller accepts the first `a` of the new tokens and
    advances the cursors of the slot, which this function never does ::

        step did not write:  prev_num_accepted_tokens += a
        step wrote:          prev_num_accepted_tokens  = a;  cache_buf_idx = 1 - cache_buf_idx

    `cute_ssm.serving.commit` advances the cursors on the device.  The next step overwrites tokens that were not
    accepted.  The mathematics is in `cute_ssm.ops.checkpointing_ssu.reference`; an output does not depend on whether
    its step writes.  Tensors on a GPU run the compiled kernel; tensors on the CPU run the PyTorch reference, or the
    same compiled kernel inside ``ptxsim.emulate()``.

    An output, and a state that is written, depend on no value of a later token.  NaN or infinities in x, dt, B, C or z
    of later tokens or of tokens that were not accepted, or in rows of the history from k on, do not change a bit.

    Parameters
    ----------
    state : Tensor, (slots, nheads, dim, dstate), float32/bfloat16/float16/int16/int8/float8_e4m3fn
        Pool of states, **updated in place** by steps that write.  The inner three dimensions are contiguous, the
        stride of slots is free.  dim is a multiple of 16 up to 128; dstate is 64, 96, 128 or 256.
    old_x : Tensor, (slots, W, nheads, dim) or (slots, 2, W, nheads, dim), type of x
        **Updated in place**: x of pending and new tokens.  1 <= W <= 64, for any T.
    old_B : Tensor, (slots, 2, W, ngroups, dstate), type of x
        **Updated in place**: B of both buffers.
    old_dt, old_cumAdt : Tensor, (slots, 2, nheads, W), float32
        **Updated in place**: processed step sizes dt', and the running sums of A dt' since the start of the buffer.
        ``old_cumAdt`` is never read.  Stride 1 in the last dimension.
    cache_buf_idx : Tensor, (slots,), int32
        Active buffer of each slot, 0 or 1.
    prev_num_accepted_tokens : Tensor, (slots,), int32
        k of each slot, 0 to W.  Rows of the history from k on, and the other buffer, are never read.
    x : Tensor, (batch, T, nheads, dim), bfloat16/float16
        Input at the new tokens, 1 <= T <= 64.  With ``cu_seqlens``, (1, total, nheads, dim), and so below.  Of tokens
        beyond W only outputs are computed; no more than W may be accepted.
    dt : Tensor, (batch, T, nheads, dim), float32/bfloat16/float16
        Step size before bias and softplus, one value per head: stride 0 in the last dimension.
    A : Tensor, (nheads, dim, dstate), float32/bfloat16/float16
        Decay rate, not positive, one value per head: strides 0 in the last two dimensions.
    B, C : Tensor, (batch, T, ngroups, dstate), type of x
        Input and output projections; nheads is a multiple of ngroups.
    out : Tensor, (batch, T, nheads, dim), type of x
        **Written.**
    D, dt_bias : Tensor, (nheads, dim), float32/bfloat16/float16, optional
        Skip connection, and what is added to dt; stride 0 in the last dimension.
    z : Tensor, (batch, T, nheads, dim), type of x, optional
        Gate.
    dt_softplus : bool
        Apply softplus to dt + dt_bias (the identity above 20).
    state_batch_indices : Tensor, (batch,), int32/int64, optional
        Slot of each sequence, all different.  None: sequence b uses slot b, and none is padding.
    pad_slot_id : int
        A sequence whose slot is this one is padding: nothing of it is read or written, ``out`` included.
    state_scale : Tensor, (slots, nheads, dim), float32, for int16/int8/float8_e4m3fn states only
        Scale of each row of the state, **updated with it**; the last two dimensions are contiguous.
    rand_seed : Tensor, (1,) or (slots,), int64, optional
        Round states stochastically, with this seed or that of the slot.  Not for float32 states.  Which random bits an
        element takes is documented in `cute_ssm.reference.rounding`; pass another seed every step.
    philox_rounds : int
        Rounds of the Philox generator.
    d_split : {None, 1, 2, 4}
        Number of parts that the rows of a head are divided into, multiples of 16 rows.  None: chosen by the amount of
        work.  Results do not depend on it.
    cu_seqlens : Tensor, (batch + 1,), int32/int64, optional
        Sequence b has the packed tokens cu_seqlens[b] to cu_seqlens[b + 1].  One without tokens is padding.
    max_seqlen : int, optional
        With ``cu_seqlens``, the largest number of tokens of a sequence.  None: W.
    enable_pdl : bool or "early_reads"
        True: launch before the previous kernel on the stream has ended (programmatic dependent launch), and wait for
        its end before any read or write.  "early_reads": read ``state``, slots, cursors, ``cu_seqlens``,
        ``work_items`` and ``num_writes`` before its end; see Notes for what this requires of earlier kernels.  Results
        do not depend on it.
    work_items : Tensor, (batch, 4), int32, contiguous, optional
        Position in the batch, slot, k and active buffer of every sequence, in place of ``state_batch_indices`` and the
        cursors.  Sequences that write their state come first.  Padding and sequences without tokens have the slot
        ``pad_slot_id``.  `cute_ssm.serving.build_work_items` makes such a list.
    num_writes : Tensor, (1,), int32
        Number of work items that write.
    saturate : bool
        Store +-65504 in place of infinities in new float16 states, infinite sums included.  NaN stays NaN.  An error
        with states of other types.

    Returns
    -------
    Tensor
        ``out``.

    Raises
    ------
    ValueError, TypeError
        A shape, type, stride, device, index or cursor is not as described above.  Nothing has been written.  Whether
        elements of a written tensor share memory is checked on the first call of a kind.
    UnsupportedSpecError
        This version has no kernel for the call.
    UnsupportedArchError
        The tensors are on a GPU that the kernels are not compiled for.
    GradientError
        Grad mode is on, and an argument requires grad.  Weights that require grad are used as constants, with one
        warning.

    Notes
    -----
    Index tensors may have more rows than the batch, as buffers of CUDA graphs do; further rows are ignored.

    The address, and all strides but the last, of state, state_scale, old_x and old_B are multiples of 16 bytes; the
    last two dimensions of x, B, C, z, out, old_x and old_B are contiguous.  If addresses and strides of x, B, C, z and
    out are multiples of 16 bytes too, their rows are copied in bulk.  Otherwise, as for most views of a fused
    projection, another kernel copies them by the widest accesses that all of them allow: 8, 4 or 2 bytes.  Results are
    the same, for about 12 %, 20 % and 60 % more instructions (6 tokens of 4 to 12 heads of 64 x 128).

    With ``enable_pdl="early_reads"`` the previous kernel on the stream may write x, dt, B, C and z, but nothing else
    that is read here.  Kernels that write the tensors that are read early must be complete when that kernel starts.
    So every upstream kernel that is itself launched as a dependent must wait (``griddepcontrol.wait``) before it
    releases its dependents, as those of this package do, and the previous kernel must not be
    `cute_ssm.serving.build_work_items` or ``commit``.

    The host never reads the contents of tensors on a GPU.  There, a sequence whose slot, k, active buffer or length is
    out of range is skipped; on the CPU it is an error.

    The kernel multiplies on tensor cores and sums in float32.  Coefficients of outputs are sums of two bfloat16, or for
    float16 inputs of two numbers of 11 bits.  Coefficients of new states are too, with two exceptions: sums of three
    for float32 states, and single numbers where rounding the state adds a larger error (float8, and bfloat16 or int8
    with float16 inputs).  Outputs read a float32 state as numbers of 11 bits, and are then off by up to 2^-11 of the
    terms that they sum over the state, before they are rounded to the type of x.  Those of an int8 or int16 state are
    off by up to 2^-13 of the largest element of its row times the sum of ``|C|``, because codes are multiplied with an
    offset that cancels.  Everything else is float32, but sums are cut by tensor cores, not rounded.

    The root mean square error of a new state of any type but float32 is at most 1.1 times that of the exact state
    rounded once, for any decay.  That of a float32 state is at most 1.1 times that of float32 PyTorch which sums the
    exponents of the decays from the last token on, 1.2 to 3 roundings, plus the error of the hardware's 2^x: up to
    2^-22 of the terms that an element is a sum of.

    The signature follows ``flashinfer.mamba.checkpointing_ssu`` of FlashInfer 0.6, whose kernel restarts the running
    sums where a step appends to a history.  The recurrence is that of Dao and Gu, "Transformers are SSMs" (2024).
    """
    pdl = None if enable_pdl is False else arguments.pdl_of(enable_pdl)
    settings = (False, dt_softplus, pad_slot_id, philox_rounds, d_split, max_seqlen, None, pdl, saturate)
    tensors = (
        state, old_x, old_B, old_dt, old_cumAdt, cache_buf_idx, prev_num_accepted_tokens, x, dt, A, B, C, D, z, dt_bias,
        out, state_scale, state_batch_indices, cu_seqlens, rand_seed, work_items, num_writes,
    )  # fmt: skip
    try:
        run = _REGISTERED.route(x)
        if run is _REGISTERED.overload:
            run = _traced
        run(*tensors, *settings)
        return out
    except NotTensorError:
        return again(checkpointing_ssu, locals(), *(arguments.DOUBLE.get(name, name) for name in TABLE.written))


def checkpointing_ssu_ring(
    state: Tensor,
    x_cache: Tensor,
    B_cache: Tensor,
    dt_cache: Tensor,
    ring_start: Tensor,
    prev_num_accepted_tokens: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    out: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    state_scale: Tensor | None = None,
    rand_seed: Tensor | None = None,
    philox_rounds: int = 10,
    d_split: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    enable_pdl: bool | str = False,
    *,
    window: int | None = None,
    work_items: Tensor | None = None,
    num_writes: Tensor | None = None,
    saturate: bool = False,
) -> Tensor:
    """Run `checkpointing_ssu` with the history in a ring of L rows per slot.

    The k pending tokens are in the rows ``(ring_start + j) mod L``, oldest first.  New token t is stored in the row
    ``(ring_start + k + t) mod L``, whether or not the step writes the state.  The caller advances the cursors, as
    `cute_ssm.serving.commit` does on the device ::

        step did not write:  prev_num_accepted_tokens += a
        step wrote:          ring_start = (ring_start + prev_num_accepted_tokens) mod L;  prev_num_accepted_tokens = a

    As in `checkpointing_ssu`, an output, and a state that is written, depend on no value of a later token.

    Parameters
    ----------
    state : Tensor, (slots, nheads, dim, dstate), float32/bfloat16/float16/int16/int8/float8_e4m3fn
        Pool of states, **updated in place** by steps that write.
    x_cache : Tensor, (slots, nheads, L, dim), type of x
    B_cache : Tensor, (slots, ngroups, L, dstate), type of x
        **Updated in place.**  The last dimension is contiguous; the address and other strides are multiples of 16
        bytes.  L is at least W + T.
    dt_cache : Tensor, (slots, nheads, L), float32
        **Updated in place**: processed step sizes.  Stride 1 in the last dimension.
    ring_start : Tensor, (slots,), int32
        Row of the oldest pending token, 0 to L - 1.
    prev_num_accepted_tokens, x, dt, A, B, C, out, D, z, dt_bias, dt_softplus, state_batch_indices, pad_slot_id
        As for `checkpointing_ssu`.
    state_scale, rand_seed, philox_rounds, d_split, cu_seqlens, enable_pdl, num_writes
        As for `checkpointing_ssu`.
    max_seqlen : int, optional
        The largest number of tokens of a sequence.  Required with ``cu_seqlens``; None without.
    window : int, optional
        W.  None: L - T, where T is ``max_seqlen`` with ``cu_seqlens``.
    work_items : Tensor, (batch, 4), int32, contiguous, optional
        As for `checkpointing_ssu`, with ``ring_start`` in place of the active buffer.
    saturate : bool
        As for `checkpointing_ssu`.

    Returns
    -------
    Tensor
        ``out``.

    Raises
    ------
    ValueError, TypeError, UnsupportedSpecError, UnsupportedArchError
        As for `checkpointing_ssu`.

    Notes
    -----
    The signature follows ``flashinfer.mamba.checkpointing_ssu`` of FlashInfer 0.7, without its scratch buffers,
    which `cute_ssm.compat.flashinfer.mamba.checkpointing_ssu` accepts.
    """
    pdl = None if enable_pdl is False else arguments.pdl_of(enable_pdl)
    settings = (True, dt_softplus, pad_slot_id, philox_rounds, d_split, max_seqlen, window, pdl, saturate)
    tensors = (
        state, x_cache, B_cache, dt_cache, None, ring_start, prev_num_accepted_tokens, x, dt, A, B, C, D, z, dt_bias,
        out, state_scale, state_batch_indices, cu_seqlens, rand_seed, work_items, num_writes,
    )  # fmt: skip
    try:
        run = _REGISTERED.route(x)
        if run is _REGISTERED.overload:
            run = _traced
        run(*tensors, *settings)
        return out
    except NotTensorError:
        return again(checkpointing_ssu_ring, locals(), *(arguments.RING.get(name, name) for name in TABLE.written))


_rows = TABLE.getter("x", "B", "C", "out", "z")


def _layout(operands: tuple[Any, ...]) -> tuple[object, ...]:
    """Return all that `arguments.input_bytes` depends on."""
    bits, strides = 0, []
    for tensor in _rows(operands):
        bits |= 0 if tensor is None else tensor.data_ptr()
        strides.append(None if tensor is None else tensor.stride())
    return bits % arguments.ROW_BYTES, *strides


_path = CallPath(_layout)


def _run(
    state: Tensor,
    x_history: Tensor,
    B_history: Tensor,
    dt_history: Tensor,
    cum_history: Tensor | None,
    cursor: Tensor,
    prev_num_accepted_tokens: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    out: Tensor,
    state_scale: Tensor | None,
    state_batch_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    rand_seed: Tensor | None,
    work_items: Tensor | None,
    num_writes: Tensor | None,
    ring: bool,
    dt_softplus: bool,
    pad_slot_id: int,
    philox_rounds: int,
    d_split: int | None,
    max_seqlen: int | None,
    window: int | None,
    pdl: str | None,
    saturate: bool = False,
) -> None:
    if state_batch_indices is None and work_items is None:
        pad_slot_id = NO_PAD
    key: tuple[object, ...] | None
    try:
        # the total of packed tokens is left out: the entry compares it among the tensors that have it
        shape = x.shape
        sizes: tuple[object, ...] = (shape, x_history.shape, B.shape, state.shape)
        batch = shape[0]
        if cu_seqlens is not None:
            batch = cu_seqlens.shape[0] - 1
            sizes = (shape[2:], x_history.shape, B.shape[2:], state.shape, cu_seqlens.shape, cu_seqlens.dtype)
        slots_shape = None if state_batch_indices is None else state_batch_indices.shape
        items_shape = None if work_items is None else work_items.shape
        if (slots_shape and slots_shape[0] > batch) or (items_shape and items_shape[0] > batch):
            state_batch_indices, work_items = first_rows(batch, state_batch_indices, work_items)
            slots_shape, items_shape = getattr(state_batch_indices, "shape", None), getattr(work_items, "shape", None)
        key = (
            sizes, state.dtype, x.dtype, dt.dtype, A.dtype, x.device, ring, dt_softplus, d_split, pdl, window,
            saturate,
            max_seqlen, z is None, None if D is None else D.dtype, None if dt_bias is None else dt_bias.dtype,
            slots_shape, None if state_batch_indices is None else state_batch_indices.dtype, items_shape,
            None if rand_seed is None else (rand_seed.shape, philox_rounds),
        )  # fmt: skip
    except (AttributeError, IndexError):  # something is no tensor, or has no axes, which the checks will name
        key = None
        state_batch_indices, work_items = first_of_batch(x, cu_seqlens, state_batch_indices, work_items)
    operands = (
        state, x_history, B_history, dt_history, cum_history, cursor, prev_num_accepted_tokens, x, dt, A, B, C, D, z,
        dt_bias, out, state_scale, state_batch_indices, cu_seqlens, rand_seed, work_items, num_writes, pad_slot_id,
    )  # fmt: skip
    if _path.run_plan(key, operands):
        return
    settings = (ring, dt_softplus, pad_slot_id, philox_rounds, d_split, max_seqlen, window, pdl, saturate)
    _path.run(key, _checked(Arguments(*operands[:-1], *settings)))


def _checked(given: Arguments) -> Checked:
    """Check the arguments of a call, and say how it runs."""
    call, spec = arguments.check(given)
    batch = arguments.batch_of(call)

    def choose(arch: Arch, sm_count: int) -> config.CheckpointingSSUConfig:
        units = batch * spec.heads * max(arguments.D_SPLITS)
        if units >= MOST_UNITS:
            fix = "split the batch"
            raise UnsupportedSpecError(describe("x", f"fewer than {MOST_UNITS} tiles of the state", units, fix))
        return config.choose(spec, arch, batch, sm_count, call.d_split)

    def bind(kernel: Callable[..., None], chosen: config.CheckpointingSSUConfig, sm_count: int) -> Plan:
        return Plan(kernel, (sm_count,))

    return Checked(
        spec,
        operands=(*call[: len(TABLE.tensors)], call.pad_slot_id),
        units=batch if call.x.numel() else 0,
        choose=choose,
        check_contents=lambda: arguments.check_contents(call, spec),
        reference=lambda: reference(call, spec),
        bind=bind,
        strict=spec.aligned,
    )


def _traced(*values: Any) -> None:
    """Call the operator that PyTorch knows.

    It takes one value per head of dt, A, D and dt_bias as a tensor of its own: whoever traces a call may copy
    arguments, and a copy has other strides.
    """
    call = Arguments(*values)
    if not isinstance(call.x, Tensor):
        raise not_tensor("x", call.x)
    tied = {}
    for name, inner in TIED.items():
        tensor = getattr(call, name)
        if tensor is not None:
            check_tied(name, tensor, inner, call.state)
            tied[name] = tensor[(..., *[0] * inner)]
    _REGISTERED.overload(*call._replace(**tied))


def _run_traced(*values: Any) -> None:
    call = Arguments(*values)
    tied = {}
    for name, inner in TIED.items():
        tensor = getattr(call, name)
        if tensor is not None:
            expanded = tensor[(..., *[None] * inner)]
            tied[name] = expanded.expand(*tensor.shape, *call.state.shape[2 : 2 + inner])
    _run(*call._replace(**tied))


_REGISTERED = _library.register(
    TABLE.schema("checkpointing_ssu"),
    _run_traced,
    eager=_run,
    names=lambda call: arguments.RING if call["ring"] else arguments.DOUBLE,
)
