"""`selective_state_update`: advance a pool of state-space-model states, in place, by the tokens of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cute_ssm.arch import Arch
from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.ops import _library
from cute_ssm.ops._arguments import first_of_batch, first_rows, not_tensors
from cute_ssm.ops._calls import CallPath, Checked, Plan
from cute_ssm.ops._dlpack import NotTensorError, again, not_tensor
from cute_ssm.ops.selective_state_update import arguments, config
from cute_ssm.ops.selective_state_update.arguments import TABLE, Arguments
from cute_ssm.ops.selective_state_update.reference import update as reference

MOST_UNITS = 2**30  # the kernel counts in 32 bits, and one grid past the last
ALGORITHMS = ("auto", "simple", "vertical", "horizontal", "async_horizontal")


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    state_scale: Tensor | None = None,
    out: Tensor | None = None,
    disable_state_update: bool = False,
    intermediate_states_buffer: Tensor | None = None,
    intermediate_state_indices: Tensor | None = None,
    intermediate_state_scales: Tensor | None = None,
    rand_seed: Tensor | None = None,
    philox_rounds: int = 10,
    cache_steps: int = 0,
    algorithm: str = "auto",
    dst_state_batch_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    *,
    saturate: bool = False,
) -> Tensor:
    """Advance the state of every sequence by its tokens and return the outputs.

    With the state h [dim, dstate] of a (sequence, head), in float32, token by token::

        dt' = softplus(dt + dt_bias);  h <- exp(A dt') h + (dt' x) B^T;  out = (h C + D x) silu(z)

    ``out`` is computed from h before h is rounded to the type of ``state``; h is not rounded between tokens.  The
    outputs and states up to a token do not depend on later tokens: NaN and infinities in x, dt, B, C or z of a later
    token change none of their bits.

    Tensors on a GPU run the compiled kernel.  Tensors on the CPU run the PyTorch reference or, inside
    ``ptxsim.emulate()``, the compiled kernel in the emulator.

    Tokens have one of three layouts: one token per sequence, with x of shape (batch, nheads, dim); T tokens per
    sequence, (batch, T, nheads, dim); or packed tokens, (total, nheads, dim) with ``cu_seqlens``.  Below,
    ``batch[, T]`` stands for the leading axes of the layout.

    Parameters
    ----------
    state : Tensor, (slots, nheads, dim, dstate), float32/bfloat16/float16/int16/int8/float8_e4m3fn
        Pool of states, **updated in place**.  The last two dimensions are contiguous; the address and the strides of
        slots and heads are any multiples of 16 bytes.  dim is a multiple of 8, dstate 8 to 256.
    x : Tensor, (batch[, T], nheads, dim), float32/bfloat16/float16
        Input.  x, z, B, C and out have stride 1 in the last dimension and any other strides.
    dt : Tensor, (batch[, T], nheads, dim), float32/bfloat16/float16
        Step size before bias and softplus.  Stride 0 in the last dimension means one value per head.
    A : Tensor, (nheads, dim, dstate), float32/bfloat16/float16
        Decay rates.  Strides 0 in the last two dimensions mean one value per head (Mamba-2); otherwise the last
        dimension is contiguous (Mamba-1).  Compute A, then expand it: ``(-torch.exp(A_log)).expand(...)``.  Without
        the outer parentheses, the expanded tensor is negated, which makes a dense one.
    B, C : Tensor, (batch[, T], ngroups, dstate), type of x
        Input and output projections; nheads is a multiple of ngroups.
    D : Tensor, (nheads, dim), float32/bfloat16/float16, optional
        Skip weights, any strides.
    z : Tensor, (batch[, T], nheads, dim), type of x, optional
        Gate.
    dt_bias : Tensor, (nheads, dim), float32/bfloat16/float16, optional
        Any strides.
    dt_softplus : bool
        Apply softplus to dt + dt_bias (the identity above 20).
    state_batch_indices : Tensor, (batch,) or (batch, n), int32/int64, optional
        Slot of each sequence.  Slots are distinct if states are updated in place.  Of a matrix, column 0 is used unless
        ``num_accepted_tokens`` selects another.  None: sequence b uses slot b, and no sequence is padding.
    pad_slot_id : int
        A sequence with this slot is padding: its state is neither read nor written, and its rows of ``out`` are
        left unchanged, or are zero if ``out`` was not given.
    state_scale : Tensor, (slots, nheads, dim), float32, for int16/int8/float8_e4m3fn states only
        Scale of each row of the state, **updated with it**; stride 1 in the last dimension.
    out : Tensor, (batch[, T], nheads, dim), type of x, optional
        **Written.**  Allocated if None; packed rows that belong to no sequence are then undefined.
    disable_state_update : bool
        Do not write ``state``.
    intermediate_states_buffer : Tensor, (rows, steps, nheads, dim, dstate), type of state, optional
        **Written** with the state after token t of a sequence at [row, t]; steps is at least T.  The state after the
        last token is also written to ``state`` unless that is disabled.  Same requirements on strides as ``state``.
    intermediate_state_indices : Tensor, (batch,), int32/int64, optional
        Row of each sequence in that buffer, all distinct; None: the slot that the sequence reads.
    intermediate_state_scales : Tensor, (rows, steps, nheads, dim), float32
        **Written**; scales of the buffer of a quantised state.
    rand_seed : Tensor, (1,) or (slots,), int64, optional
        Round states stochastically, with one seed or with that of the slot that is read; not for float32 states.  Pass
        another seed at every step.  `cute_ssm.reference.rounding` documents which random bits each element uses.
    philox_rounds : int
        Rounds of the Philox generator.
    cache_steps : int
        With ``cu_seqlens``, an upper bound of the tokens of a sequence; 0: no bound.
    algorithm : {"auto", "simple", "vertical", "horizontal", "async_horizontal"}
        Accepted for compatibility and ignored: there is one kernel, whose tiles depend on the amount of work.
    dst_state_batch_indices : Tensor, (batch,) or (batch, n), int32/int64, optional
        Slots that new states are written to instead of the slots read; ``pad_slot_id`` entries are skipped.  A vector
        holds the slots of the states after the last token; column t of a matrix those of the states after token t (with
        one token per sequence, column 0 is used).  The slots of a call are distinct, and none is read by another
        sequence.
    cu_seqlens : Tensor, (batch + 1,), int32/int64, optional
        The packed rows cu_seqlens[b] to cu_seqlens[b + 1] are the tokens of sequence b; there may be none.
    num_accepted_tokens : Tensor, (batch,), int32/int64, optional
        Sequence b starts from the slot in column ``num_accepted_tokens[b] - 1`` (at least 0) of state_batch_indices.
    saturate : bool
        Clamp new float16 states to +-65504 where they would be infinite; NaN stays NaN.  Raises for states of other
        types.

    Returns
    -------
    Tensor
        ``out``, of the shape of x.

    Raises
    ------
    ValueError, TypeError
        A shape, type, stride, device or index is not as described above.  Nothing has been written.  Whether elements
        of a written tensor share memory is checked on the first call with given shapes and types only.
    UnsupportedSpecError
        The call is legal, but this version has no kernel for it.
    UnsupportedArchError
        The tensors are on a GPU that the kernels are not compiled for.
    GradientError
        Grad mode is on, and an argument requires grad.  Weights that require grad are treated as constants, with one
        warning.

    Notes
    -----
    Index tensors may have more rows than the batch, as static buffers of CUDA graphs do; the extra rows are ignored.

    The axis of a single head may be left out: state (slots, dim, dstate), x, dt, z, out (batch, dim), A (dim, dstate),
    B, C (batch, dstate), D, dt_bias (dim,).  The shorthand is recognised by state, x, A or B, with one token per
    sequence or packed tokens.

    On a GPU the kernel uses programmatic dependent launch: it may start while the previous kernel on the stream still
    runs, waits for that kernel before it reads or writes anything, and lets the next kernel start at once.  If the next
    kernel is launched the same way, it has to wait (``griddepcontrol.wait``) before it uses what this one reads or
    writes.

    The host never reads the contents of tensors on a GPU.  There, a sequence whose slot, offsets or
    ``num_accepted_tokens`` are out of range is treated as padding, a destination out of range is not written, and no
    sequence of ``cu_seqlens`` is followed past ``cache_steps``, or past the columns and steps of its destinations.

    The signature follows ``flashinfer.mamba.selective_state_update``; the recurrence is that of Dao and Gu,
    "Transformers are SSMs" (2024), and of Gu and Dao, "Mamba" (2023), whose layouts are distinguished by strides.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(describe("algorithm", " or ".join(ALGORITHMS), repr(algorithm)))
    given = (state, x, dt, A, B, C, D, z, dt_bias)
    try:
        if not (
            isinstance(state, Tensor) and isinstance(x, Tensor) and isinstance(A, Tensor) and isinstance(B, Tensor)
        ):
            raise not_tensors(state=state, x=x, A=A, B=B)
        src, dst, zero_padding = state_batch_indices, dst_state_batch_indices, out is None
        result = out if out is not None else torch.empty_like(x, memory_format=torch.contiguous_format)
        written, rank = result, x.dim()
        if rank < 3 and state.dim() == 4 and state.shape[1] != 1:
            nheads, dim = state.shape[1:3]
            fix = f"pass x.unflatten(-1, ({nheads}, {dim}))" if rank and x.shape[-1] == nheads * dim else ""
            expected = f"shape {arguments.X_SHAPES['dense' if cu_seqlens is None else 'packed']}"
            raise ValueError(describe("x", expected, tuple(x.shape), fix))
        if rank == 2 or state.dim() == 3 or A.dim() == 2 or B.dim() == 2:
            x, dt, B = (_insert(tensor, 3, 1) for tensor in (x, dt, B))
            C, z, written = (_insert(tensor, 3, 1) for tensor in (C, z, result))
            state, A = _insert(state, 4, 1), _insert(A, 3, 0)
            D, dt_bias = (_insert(tensor, 2, 0) for tensor in (D, dt_bias))
        if cu_seqlens is None:
            has_steps = num_accepted_tokens is not None or intermediate_states_buffer is not None
            if has_steps and x.dim() == 3:
                x, dt, B = (_insert(tensor, 4, 1) for tensor in (x, dt, B))
                C, z, written = (_insert(tensor, 4, 1) for tensor in (C, z, written))
            elif rank == 4 and not has_steps and x.shape[1] == 1:
                x, dt, B = (_drop_step(tensor) for tensor in (x, dt, B))
                C, z, written = (_drop_step(tensor) for tensor in (C, z, written))
        if src is not None and num_accepted_tokens is None and _is_matrix("state_batch_indices", src):
            src = src[:, 0]
        if dst is not None and x.dim() == 3 and cu_seqlens is None and _is_matrix("dst_state_batch_indices", dst):
            dst = dst[:, 0]
        _REGISTERED.route(x)(
            state, x, dt, A, B, C, D, z, dt_bias, written, state_scale, src, dst, num_accepted_tokens, cu_seqlens,
            intermediate_states_buffer, intermediate_state_indices, intermediate_state_scales, rand_seed,
            dt_softplus, disable_state_update, zero_padding, philox_rounds, cache_steps, pad_slot_id, saturate,
        )  # fmt: skip
        return result
    except NotTensorError:
        return again(selective_state_update, {**locals(), **dict(zip(_RESHAPED, given))}, *TABLE.written)


_RESHAPED = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")  # may get or lose an axis of one element


def _insert(tensor: Any, rank: int, axis: int) -> Any:
    """Insert an axis of one element that a tensor of this rank has and the argument leaves out."""
    return tensor.unsqueeze(axis) if isinstance(tensor, Tensor) and tensor.dim() == rank - 1 else tensor


def _drop_step(tensor: Any) -> Any:
    """Drop the axis of tokens where it has one element."""
    return tensor[:, 0] if isinstance(tensor, Tensor) and tensor.dim() == 4 and tensor.shape[1] == 1 else tensor


def _is_matrix(name: str, indices: Tensor) -> bool:
    if not isinstance(indices, Tensor):
        raise not_tensor(name, indices)
    return indices.dim() == 2 and indices.shape[1] > 0


_free_strides, _optional_free_strides = TABLE.getter("dt", "A", "B", "C", "out"), TABLE.getter("D", "dt_bias")
_free_alignment = TABLE.getter("A", "B", "C")


def _layout(operands: tuple[Any, ...]) -> tuple[object, ...]:
    """Return the strides and the alignment that a kernel for free strides does not check."""
    required = [tensor.stride() for tensor in _free_strides(operands)]
    optional = [None if tensor is None else tensor.stride() for tensor in _optional_free_strides(operands)]
    A, B, C = _free_alignment(operands)
    aligned = (A.data_ptr() | B.data_ptr() | C.data_ptr()) & 15
    return (*required, *optional, aligned)


_path = CallPath(_layout)


def _run(
    state: Tensor,
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
    src: Tensor | None,
    dst: Tensor | None,
    num_accepted: Tensor | None,
    cu_seqlens: Tensor | None,
    buffer: Tensor | None,
    buffer_rows: Tensor | None,
    buffer_scale: Tensor | None,
    rand_seed: Tensor | None,
    dt_softplus: bool,
    disable_state_update: bool,
    zero_padding: bool,
    philox_rounds: int,
    cache_steps: int,
    pad_slot_id: int,
    saturate: bool = False,
) -> None:
    key: tuple[object, ...] | None
    try:
        # not the total of packed tokens: the kernel's entry checks that all tensors have the same
        sizes: tuple[object, ...] = (x.shape, B.shape)
        batch = x.shape[0]
        if cu_seqlens is not None:
            sizes, batch = (x.shape[1:], B.shape[1:], x.shape[0] > 0), cu_seqlens.shape[0] - 1
        src_shape = None if src is None else src.shape
        dst_shape = None if dst is None else dst.shape
        if (src_shape and src_shape[0] > batch) or (dst_shape and dst_shape[0] > batch):
            src, dst = first_rows(batch, src, dst)
            src_shape, dst_shape = getattr(src, "shape", None), getattr(dst, "shape", None)
        key = (
            sizes, state.dtype, x.dtype, dt.dtype, A.dtype, x.device, dt_softplus, disable_state_update, zero_padding,
            z is None, None if D is None else D.dtype, None if dt_bias is None else dt_bias.dtype,
            src_shape, None if src is None else src.dtype, dst_shape, None if dst is None else dst.dtype,
            src is not None or state.shape[0] >= batch, saturate,
        )  # fmt: skip
        if cu_seqlens is not None or buffer is not None or num_accepted is not None or rand_seed is not None:
            rows_shape = None if buffer_rows is None else buffer_rows.shape
            if (rows_shape and rows_shape[0] > batch) or (num_accepted is not None and num_accepted.shape[0] > batch):
                num_accepted, buffer_rows = first_rows(batch, num_accepted, buffer_rows)
                rows_shape = getattr(buffer_rows, "shape", None)
            key += (
                None if cu_seqlens is None else (cu_seqlens.dtype, batch), cache_steps,
                None if num_accepted is None else num_accepted.dtype,
                None if rand_seed is None else (rand_seed.shape, philox_rounds),
                None if buffer is None else buffer.shape,
                rows_shape, None if buffer_rows is None else buffer_rows.dtype,
                buffer is None or buffer_rows is not None or buffer.shape[0] >= state.shape[0],
            )  # fmt: skip
    except (AttributeError, IndexError):  # not a tensor, or without axes: the checks name the argument
        key = None
        src, dst = first_of_batch(x, cu_seqlens, src, dst)
        num_accepted, buffer_rows = first_of_batch(x, cu_seqlens, num_accepted, buffer_rows)
    operands = (
        state, x, dt, A, B, C, D, z, dt_bias, out, state_scale, src, dst, num_accepted, cu_seqlens, buffer, buffer_rows,
        buffer_scale, rand_seed, pad_slot_id,
    )  # fmt: skip
    if _path.run_plan(key, operands):
        return
    settings = (dt_softplus, disable_state_update, zero_padding, philox_rounds, cache_steps, pad_slot_id, saturate)
    _path.run(key, _checked(Arguments(*operands[:-1], *settings)))


def _checked(call: Arguments) -> Checked:
    """Check the arguments of a call, and say how it runs."""
    spec = arguments.check(call)
    arguments.warn_of_dense_A(spec, call.A)
    heads, most = _heads(call), arguments.limit(call)

    def choose(arch: Arch, sm_count: int) -> config.SelectiveStepConfig:
        chosen = config.choose(spec, arch, heads, sm_count, most)
        units = heads * (spec.dim // chosen.rows)
        if units >= MOST_UNITS:
            fix = "split the batch"
            raise UnsupportedSpecError(describe("x", f"fewer than {MOST_UNITS} tiles of the state", units, fix))
        return chosen

    def bind(kernel: Callable[..., None], chosen: config.SelectiveStepConfig, sm_count: int) -> Plan:
        return Plan(kernel, (most, sm_count * chosen.ctas_per_sm))

    tied = spec.A_tied and spec.dt_tied and (spec.D_tied or spec.D_dtype is None)
    return Checked(
        spec,
        operands=(*call[: len(TABLE.tensors)], call.pad_slot_id),
        units=heads if call.x.numel() else 0,
        choose=choose,
        check_contents=lambda: arguments.check_contents(call),
        reference=lambda: reference(call, spec.philox_rounds),
        bind=bind,
        strict=tied and spec.vector_inputs,
    )


def _heads(call: Arguments) -> int:
    """Number of (sequence, head) pairs."""
    packed = call.cu_seqlens
    batch = call.x.shape[0] if packed is None else packed.shape[0] - 1
    return batch * call.state.shape[1]


_REGISTERED = _library.register(TABLE.schema("selective_state_update"), _run)
