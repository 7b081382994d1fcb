"""`gated_delta_rule_replay`: verification from a checkpoint of the state and rings of the tokens accepted since."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _library
from cute_ssm.ops._arguments import first_of_batch, not_tensors
from cute_ssm.ops._calls import CallPath, Checked
from cute_ssm.ops._dlpack import NotTensorError, again
from cute_ssm.ops._gated_delta.arguments import ROW_BYTES, default_scale, layout
from cute_ssm.ops._gated_delta.calls import checked_step
from cute_ssm.ops.gated_delta_rule_replay import arguments, reference
from cute_ssm.ops.gated_delta_rule_replay.arguments import TABLE, Arguments


def gated_delta_rule_replay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor,
    initial_state_indices: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    g_cache: Tensor,
    beta_cache: Tensor,
    ring_start: Tensor,
    prev_num_accepted_tokens: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    output: Tensor | None = None,
    use_qk_l2norm: bool = True,
    *,
    window: int | None = None,
    saturate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Verify 1 to 16 new tokens per request, from states with up to `window` pending tokens.

    A slot holds a *checkpoint* of its state, and rings with the keys, values and gates of the p *pending* tokens, which
    were accepted since: ``p = prev_num_accepted_tokens[slot]``, with the oldest in row ``ring_start[slot]``.  A step

    - folds the pending tokens into the checkpoint in registers.  Only a step with p > 0 and ``p + tokens > window``
      *flushes*: it writes the folded state over the checkpoint.  Otherwise the checkpoint is left unchanged;
    - returns the outputs of `gated_delta_rule_mtp` at all new tokens from the folded state, whether or not it flushes;
    - appends the new tokens to the rings, in rows ``(ring_start + p + t) mod L``.

    The caller then decides how many of the new tokens are accepted, the first n of them, and advances the cursors of
    the slot, which this function never does; `cute_ssm.serving.commit` does it on the device::

        step did not flush:  prev_num_accepted_tokens += n
        step flushed:        ring_start = (ring_start + p) mod L;  prev_num_accepted_tokens = n

    The next step overwrites the rows of tokens that were not accepted.  So a state is written once in about ``window``
    accepted tokens, and states after single tokens are never written.

    The kernel decides for each request whether it flushes, so there are no ``work_items`` to pass, unlike
    `checkpointing_ssu`.  A step writes one state for every request of the batch with p > 0 and ``p + tokens > window``,
    which may be none or all.

    Tensors on a GPU run the compiled kernel.  Tensors on the CPU run the PyTorch reference or, inside
    ``ptxsim.emulate()``, the compiled kernel in the emulator.  The kernel folds eight pending
    tokens at a time, and then computes all new ones at once, on tensor cores; its error is like that of float32.

    The outputs and states up to a token do not depend on later tokens: NaN, infinities and overflows in q, k, v, a or b
    of a later token change none of their bits.  Neither do rows of the rings that are not pending, such as those of
    rejected tokens.

    Parameters
    ----------
    q, k : Tensor, (batch, tokens, heads, K), bfloat16/float16
        Queries and keys of the new tokens; tokens is 1 to 16, K a multiple of 16 up to 256.  Stride 1 in the last
        dimension, and any alignment.  Fastest if addresses and other strides are multiples of 8 bytes in q and k, and
        of 16 bytes in v.
    v : Tensor, (batch, tokens, value_heads, V), type of q
        Values; V is a multiple of 16 up to 256, or 512, value_heads a multiple of heads.  Stride 1 in the last
        dimension.
    initial_state : Tensor, (slots, value_heads, V, K), float32/bfloat16/float16
        Pool of checkpoints, **updated in place** by steps that flush.  Stride 1 in the last dimension; the address and
        the other strides are any multiples of 4 elements.
    initial_state_indices : Tensor, (batch,), int32/int64
        Slot of each request, all distinct.  A negative entry is padding: nothing of the request is read or written,
        and its rows of ``output`` are left unchanged, or are zero if ``output`` was not given.
    k_cache : Tensor, (slots, heads, L, K), type of q
        Ring of keys before normalisation, **updated in place**; L is at least window + tokens.  Rows that are not
        pending may hold anything.  Stride 1 in the last dimension; the address and the other strides are any multiples
        of 4 elements.
    v_cache : Tensor, (slots, value_heads, L, V), type of q
        Ring of values, **updated in place**.  Stride 1 in the last dimension; the address and the other strides are
        any multiples of 16 bytes.
    g_cache, beta_cache : Tensor, (slots, value_heads, L), float32
        Rings of the logarithms of the decays, ``-exp(A_log) softplus(a + dt_bias)``, clamped to at least -1e4, and of
        the step sizes, ``sigmoid(b)``; **updated in place**.  Any strides.
    ring_start : Tensor, (slots,), int32
        Row of the oldest pending token of each slot, from 0 to L - 1.
    prev_num_accepted_tokens : Tensor, (slots,), int32
        Number of pending tokens of each slot, from 0 to window.
    A_log : Tensor, (value_heads,), float32
    a, b : Tensor, (batch, tokens, value_heads), float32/bfloat16/float16
        Logits of the decay and of beta, both of one type; any strides.
    dt_bias : Tensor, (value_heads,), float32/bfloat16/float16
    scale : float, optional
        Factor of q after normalisation; None: ``K ** -0.5``.
    output : Tensor, (batch, tokens, value_heads, V), float32/bfloat16/float16, optional
        **Written.**  Stride 1 in the last dimension and any other strides.  Allocated in the type of q if None.
    use_qk_l2norm : bool
        Divide q and all k by ``sqrt(sum of squares + 1e-6)``.
    window : int, optional
        Largest number of pending tokens, 1 to 64; the same in all steps.  None: ``L - tokens``, which is 1 at least.
        0: no token is ever pending; the call stores its tokens in the rings, and changes no state.
    saturate : bool
        Clamp new float16 states to +-65504 where they would be infinite; NaN stays NaN.  Raises for states of other
        types.

    Returns
    -------
    output : Tensor, (batch, tokens, value_heads, V)
    initial_state : Tensor
        The pool that was passed in.

    Raises
    ------
    ValueError, TypeError
        A shape, type, stride, device, index or cursor is not as described above.  Nothing has been written.
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

    The host never reads the contents of tensors on a GPU.  There, a request whose slot or cursors are out of range is
    treated as padding.

    Rings next to a checkpoint are the idea of ReplaySSM; FlashInfer's ``checkpointing_ssu`` has them for Mamba-2.  The
    rings hold raw values, from which every step computes the updates of the state again, because updates would have to
    be rounded to the type of the ring.
    """
    try:
        if not (isinstance(q, Tensor) and isinstance(v, Tensor) and isinstance(k_cache, Tensor)):
            raise not_tensors(q=q, v=v, k_cache=k_cache)
        result = output
        if result is None:
            result = torch.empty_like(v, dtype=q.dtype, memory_format=torch.contiguous_format)
        if scale is None:
            scale = default_scale(q)
        if window is None:
            if q.dim() != 4 or k_cache.dim() != 4:
                raise ValueError(
                    describe("k_cache", "4 dimensions like q, or a window", f"{k_cache.dim()} and {q.dim()}")
                )
            window = k_cache.shape[2] - q.shape[1]
            if window < 1:
                expected = f"more rows than tokens = {q.shape[1]}, or a window"
                raise ValueError(describe("k_cache", expected, k_cache.shape[2], "allocate all rings with more rows"))
        _REGISTERED.route(q)(
            q, k, v, initial_state, initial_state_indices, k_cache, v_cache, g_cache, beta_cache, ring_start,
            prev_num_accepted_tokens, A_log, a, dt_bias, b, scale, result, use_qk_l2norm, window, output is None,
            saturate,
        )  # fmt: skip
        return result, initial_state
    except NotTensorError:
        return again(gated_delta_rule_replay, locals(), *TABLE.written)


_path = CallPath(layout)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    src: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    g_cache: Tensor,
    beta_cache: Tensor,
    ring_start: Tensor,
    pending: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float,
    output: Tensor,
    use_qk_l2norm: bool,
    window: int,
    zero_padding: bool,
    saturate: bool = False,
) -> None:
    key: tuple[object, ...] | None
    try:
        shape = q.shape
        if src.shape[0] > shape[0]:
            src = src[: shape[0]]
        key = (
            shape, v.shape, state.dtype, q.dtype, src.dtype, a.dtype, dt_bias.dtype, output.dtype, k_cache.shape,
            window, use_qk_l2norm, zero_padding, saturate, q.device,
            output.data_ptr() % ROW_BYTES, output.stride(), state.stride(),
            k_cache.stride(), v_cache.stride(), g_cache.stride(), beta_cache.stride(),
        )  # fmt: skip
    except (AttributeError, IndexError):  # something is no tensor, or has no axes, which the checks will name
        key = None
        (src,) = first_of_batch(q, None, src)
    operands = (
        q, k, v, state, src, k_cache, v_cache, g_cache, beta_cache, ring_start, pending, A_log, a, dt_bias, b, output,
        scale, window,
    )  # fmt: skip
    if _path.run_plan(key, operands):
        return
    call = Arguments(
        q, k, v, state, src, k_cache, v_cache, g_cache, beta_cache, ring_start, pending, A_log, a, dt_bias, b, scale,
        output, use_qk_l2norm, window, zero_padding, saturate,
    )  # fmt: skip
    _path.run(key, _checked(call, operands))


def _checked(call: Arguments, operands: tuple[object, ...]) -> Checked:
    """Check the arguments of a call, and say how it runs."""
    spec, units = arguments.check(call), call.v.shape[0] * call.v.shape[2]
    return checked_step(spec, operands, units, lambda: arguments.check_contents(call), lambda: reference.step(call))


_REGISTERED = _library.register(TABLE.schema("gated_delta_rule_replay"), _run)
