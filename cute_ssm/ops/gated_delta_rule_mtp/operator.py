"""`gated_delta_rule_mtp`: several tokens of a gated delta net's recurrence per request, on a pool of states."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from cute_ssm.ops import _library
from cute_ssm.ops._arguments import first_of_batch, not_tensors
from cute_ssm.ops._calls import CallPath, Checked
from cute_ssm.ops._dlpack import NotTensorError, again
from cute_ssm.ops._gated_delta.arguments import ROW_BYTES, default_scale, layout
from cute_ssm.ops._gated_delta.calls import checked_step
from cute_ssm.ops.gated_delta_rule_mtp import arguments, reference
from cute_ssm.ops.gated_delta_rule_mtp.arguments import TABLE, Arguments


def gated_delta_rule_mtp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor,
    initial_state_indices: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    output: Tensor | None = None,
    intermediate_states_buffer: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    disable_state_update: bool | None = None,
    use_qk_l2norm: bool = True,
    output_state_indices: Tensor | None = None,
    *,
    accepted_steps: Tensor | None = None,
    saturate: bool = False,
    gate_logits: bool = True,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run 1 to 64 tokens of the gated delta rule for every request, and return all outputs.

    With the state S [V, K] of a (request, value head) and k^, q^ normalised (if ``use_qk_l2norm``), token by token::

        g = -exp(A_log) softplus(a + dt_bias);   beta = sigmoid(b);   q^ <- scale q^
        S <- e^g S;   u = beta (v - S k^);   S <- S + u k^^T;   out = S q^

    Tensors on a GPU run the compiled kernel.  Tensors on the CPU run the PyTorch reference or, inside
    ``ptxsim.emulate()``, the compiled kernel in the emulator.  The kernel computes up to 16 tokens at once on tensor
    cores, with float32 states and coefficients split into two parts, so that its error is that of float32.  More tokens
    are processed in chunks, in one launch, and the state stays on the chip between them.

    The outputs and states up to a token do not depend on later tokens: NaN, infinities and overflows in q, k, v, a or b
    of a later token change none of their bits.  Tokens that are not accepted, such as padding, may hold anything.

    Parameters
    ----------
    q, k : Tensor, (batch, tokens, heads, K), bfloat16/float16
        Queries and keys; tokens is 1 to 64, K a multiple of 16 up to 256.  With ``cu_seqlens``, (1, total, heads, K),
        and so for the other tensors of tokens.  Stride 1 in the last dimension.  Any alignment is allowed, such as that
        of slices of a fused projection.  Fastest if addresses and other strides are multiples of 8 bytes in q and k,
        and of 16 bytes in v.
    v : Tensor, (batch, tokens, value_heads, V), type of q
        Values; V is a multiple of 16 up to 256, or 512, value_heads a multiple of heads, and value head h uses row
        ``h // (value_heads / heads)`` of q and k.  Stride 1 in the last dimension.
    initial_state : Tensor, (slots, value_heads, V, K), float32/bfloat16/float16
        Pool of states, **updated in place** unless that is disabled.  Stride 1 in the last dimension; the address and
        the other strides are any multiples of 4 elements, so pages may hold other data as well.
    initial_state_indices : Tensor, (batch,), int32/int64
        Slot of each request.  A negative entry is padding: nothing of the request is read or written, and its rows of
        ``output`` are left unchanged, or are zero if ``output`` was not given.
    A_log : Tensor, (value_heads,), float32
    a, b : Tensor, (batch, tokens, value_heads), float32/bfloat16/float16
        Logits of the decay and of beta, both of one type; any strides.
    dt_bias : Tensor, (value_heads,), float32/bfloat16/float16
    scale : float, optional
        Factor of q after normalisation; None: ``K ** -0.5``.
    output : Tensor, (batch, tokens, value_heads, V), float32/bfloat16/float16, optional
        **Written.**  Stride 1 in the last dimension and any other strides.  Allocated in the type of q if None; with
        ``cu_seqlens``, rows of no request are then zero, which takes another launch.
    intermediate_states_buffer : Tensor, (>= batch, >= tokens, value_heads, V, K), type of initial_state, optional
        **Written** with the state of request i after token t at ``[i, t]``, by position in the batch.  Same
        requirements on strides as initial_state.
    ssm_state_indices : Tensor, (batch, tokens), int32/int64, optional
        Slots that the states after each token are written to; negative entries are skipped.  The final state is then
        written to no other slot, and ``output_state_indices`` is ignored.  Requires ``disable_state_update=False`` and
        no buffer.
    disable_state_update : bool, optional
        False: write the final state to its slot.  True: leave the pool unchanged.  None: like True, with a
        FutureWarning once per process, because FlashInfer has announced that its own default will become False.
    use_qk_l2norm : bool
        Divide q and k by ``sqrt(sum of squares + 1e-6)``.
    output_state_indices : Tensor, (batch,), int32/int64, optional
        Slots that the final states are written to instead of the slots read; negative entries are skipped.  The slots
        that a call writes are distinct, and none is read by another request.
    accepted_steps : Tensor, (batch,), int32/int64, optional
        Number of accepted tokens, 0 to tokens: the state after the last accepted one is written to the pool; outputs
        are those of all tokens.  None: all tokens.  Excludes ``ssm_state_indices``.
    saturate : bool
        Clamp new float16 states to +-65504 where they would be infinite; NaN stays NaN.  Raises for states of other
        types.
    gate_logits : bool
        False: a and b are the gates themselves, g of any sign and any beta (up to 2 for negative eigenvalues);
        ``A_log`` and ``dt_bias`` are ignored.
    cu_seqlens : Tensor, (batch + 1,), int32/int64, optional
        Request i has the packed tokens ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``.  One without tokens is padding.  In
        ``intermediate_states_buffer`` and ``ssm_state_indices``, tokens is ``max_seqlen``, and entries past those of a
        request are neither read nor written.
    max_seqlen : int, 1 to 64
        The largest number of tokens of a request.  Required with ``cu_seqlens``; None without.

    Returns
    -------
    output : Tensor, (batch, tokens, value_heads, V)
    initial_state : Tensor
        The pool that was passed in.

    Raises
    ------
    ValueError, TypeError
        A shape, type, stride, device or index is not as described above.  Nothing has been written.
    UnsupportedSpecError
        The call is legal, but this version has no kernel for its sizes.
    UnsupportedArchError
        The tensors are on a GPU that the kernels are not compiled for.
    GradientError
        Grad mode is on, and an argument requires grad.  Weights that require grad are treated as constants, with one
        warning.

    Notes
    -----
    Index tensors may have more rows than the batch, as static buffers of CUDA graphs do; the extra rows are ignored.

    On a GPU the kernel uses programmatic dependent launch: it may start while the previous kernel on the stream still
    runs, waits for that kernel before it reads or writes anything, and lets the next kernel start at once.  If the next
    kernel is launched the same way, it has to wait (``griddepcontrol.wait``) before it uses what this one reads or
    writes.

    The host never reads the contents of tensors on a GPU.  There, a request whose ``initial_state_indices``,
    ``accepted_steps`` or ``cu_seqlens`` are out of range is treated as padding, and a destination out of range is not
    written.

    The signature follows ``flashinfer.gdn_decode.gated_delta_rule_mtp``; the recurrence is that of Yang, Kautz and
    Hatamizadeh, "Gated Delta Networks" (2024), and its form by products that of Yang et al., "Parallelizing Linear
    Transformers with the Delta Rule over Sequence Length" (2024).
    """
    try:
        if not (isinstance(q, Tensor) and isinstance(v, Tensor)):
            raise not_tensors(q=q, v=v)
        if disable_state_update is None:
            _warn_of_default()
            disable_state_update = True
        result = output
        if result is None:
            allocate = torch.empty_like if cu_seqlens is None else torch.zeros_like
            result = allocate(v, dtype=q.dtype, memory_format=torch.contiguous_format)
        if scale is None:
            scale = default_scale(q, cu_seqlens is not None)
        _REGISTERED.route(q)(
            q, k, v, initial_state, initial_state_indices, A_log, a, dt_bias, b, scale, result,
            intermediate_states_buffer, ssm_state_indices, disable_state_update, use_qk_l2norm, output_state_indices,
            accepted_steps, cu_seqlens, output is None and cu_seqlens is None, saturate, gate_logits, max_seqlen,
        )  # fmt: skip
        return result, initial_state
    except NotTensorError:
        return again(gated_delta_rule_mtp, locals(), *TABLE.written)


_warned = False


def _warn_of_default() -> None:
    global _warned
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(
            "disable_state_update: None leaves the states unchanged, like True, but FlashInfer has announced that "
            "its default becomes False; pass True or False",
            FutureWarning,
            stacklevel=3,
        )


_path = CallPath(layout)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    src: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float,
    output: Tensor,
    buffer: Tensor | None,
    scatter: Tensor | None,
    disable_state_update: bool,
    use_qk_l2norm: bool,
    dst: Tensor | None,
    accepted: Tensor | None,
    cu_seqlens: Tensor | None,
    zero_padding: bool,
    saturate: bool = False,
    gate_logits: bool = True,
    max_seqlen: int | None = None,
) -> None:
    if scatter is not None or disable_state_update:
        dst = None
    key: tuple[object, ...] | None
    try:
        shape: tuple[object, ...] = q.shape
        values: tuple[object, ...] = v.shape
        batch, tokens = q.shape[:2]
        if cu_seqlens is not None:  # the total is left out: the entry compares it among the tensors that have it
            batch, tokens = cu_seqlens.shape[0] - 1, max_seqlen or 0
            shape, values = (cu_seqlens.shape, cu_seqlens.dtype, *shape[2:]), values[2:]
        if scatter is not None and (scatter.shape[0] > batch or scatter.shape[1] > tokens):
            scatter = scatter[:batch, :tokens]
        if src.shape[0] > batch:
            src = src[:batch]
        if dst is not None and dst.shape[0] > batch:
            dst = dst[:batch]
        if accepted is not None and accepted.shape[0] > batch:
            accepted = accepted[:batch]
        key = (
            shape, values, max_seqlen, state.dtype, q.dtype, src.dtype, a.dtype, dt_bias.dtype, output.dtype,
            None if buffer is None else (buffer.dtype, buffer.shape),
            None if scatter is None else (scatter.dtype, scatter.shape[1]),  # with max_seqlen, which no entry sees
            None if dst is None else dst.dtype,
            None if accepted is None else accepted.dtype, disable_state_update, use_qk_l2norm, zero_padding, saturate,
            gate_logits, q.device, output.data_ptr() % ROW_BYTES, output.stride(),
        )  # fmt: skip
    except (AttributeError, IndexError):  # something is no tensor, or has no axes, which the checks will name
        key = None
        src, scatter, dst, accepted = first_of_batch(q, cu_seqlens, src, scatter, dst, accepted)
    operands = (
        q, k, v, state, src, A_log, a, dt_bias, b, output, buffer, scatter, dst,
        None if disable_state_update else accepted,  # without a state to write, the kernel has no such argument
        cu_seqlens, scale, max_seqlen,
    )  # fmt: skip
    if _path.run_plan(key, operands):
        return
    call = Arguments(
        q, k, v, state, src, A_log, a, dt_bias, b, scale, output, buffer, scatter, disable_state_update, use_qk_l2norm,
        dst, accepted, cu_seqlens, zero_padding, saturate, gate_logits, max_seqlen,
    )  # fmt: skip
    _path.run(key, _checked(call, operands))


def _checked(call: Arguments, operands: tuple[object, ...]) -> Checked:
    """Check the arguments of a call, and say how it runs."""
    spec = arguments.check(call)
    batch = call.v.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    units = batch * call.v.shape[2]
    return checked_step(spec, operands, units, lambda: arguments.check_contents(call), lambda: reference.step(call))


_REGISTERED = _library.register(TABLE.schema("gated_delta_rule_mtp"), _run)
