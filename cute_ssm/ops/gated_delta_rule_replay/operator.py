"""`gated_delta_rule_replay`: verification from a checkpoint of the state and a ring of the tokens accepted since."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _library
from cute_ssm.ops._arguments import first_of_batch, not_tensors
from cute_ssm.ops._calls import CallPath, Checked
from cute_ssm.ops._gated_delta import config
from cute_ssm.ops._gated_delta.arguments import ROW_BYTES, default_scale, layout
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
    """Verify 1 to 16 new tokens of every request whose state lags behind by up to `window` accepted tokens.

    A slot holds a state, the checkpoint, and a ring with the keys, values and gates of the p tokens accepted after it,
    the pending ones: ``p = prev_num_accepted_tokens[slot]``, the oldest of them in row ``ring_start[slot]``.  A step

    - advances the checkpoint by the pending tokens, which nothing but a step with ``p + tokens > window`` stores: it
      *flushes*, and writes the advanced state over the checkpoint, if p > 0; otherwise the state stays as it is, byte
      for byte;
    - returns the outputs of `gated_delta_rule_mtp` at all new tokens from the advanced state, whether or not it
      flushes;
    - appends the new tokens to the ring, in rows ``(ring_start + p + t) mod L``.

    Which of the new tokens are accepted is decided later, by the caller: the first n of them, who then advances the
    cursors of the slot, which this function never does ::

        step did not flush:  prev_num_accepted_tokens += n
        step flushed:        ring_start = (ring_start + p) mod L;  prev_num_accepted_tokens = n

    The next step overwrites what was not accepted.  `cute_ssm.serving.commit` does so on the device.  So a state is
    written once in about ``window`` accepted tokens, and states after single tokens never are.

    Tensors on a GPU run the compiled kernel; tensors on the CPU run the PyTorch reference, or the same compiled kernel
    inside ``ptxsim.emulate()``.  The kernel computes eight pending tokens at a time, and then all new ones, on tensor
    cores, with an error like that of float32.

    No value of a token reaches outputs of earlier tokens, or states before it: NaN, infinite values and overflows in q,
    k, v, a or b change no bit of them, nor do rows of the rings that are not pending, such as tokens once rejected.

    Parameters
    ----------
    q, k : Tensor, (batch, tokens, heads, K), bfloat16/float16
        Queries and keys of the new tokens; tokens is 1 to 16, K a multiple of 16 up to 256.  Stride 1 in the last
        dimension, at any alignment; addresses and other strides of q and k that are multiples of 8 bytes, and of v of
        16, are fastest.
    v : Tensor, (batch, tokens, value_heads, V), type of q
        Values; V is a multiple of 16 up to 256, or 512, value_heads a multiple of heads.  Stride 1 in the last
        dimension.
    initial_state : Tensor, (slots, value_heads, V, K), float32/bfloat16/float16
        Pool of checkpoints, **updated in place** by steps that flush.  Stride 1 in the last dimension; other strides
        are free multiples of 4 elements, and so is the address.
    initial_state_indices : Tensor, (batch,), int32/int64
        Slot of each request, all different.  A negative entry is padding: nothing of the request is read or written,
        and its rows of ``output`` stay as they are, or are zero if ``output`` was not given.
    k_cache : Tensor, (slots, heads, L, K), type of q
        Ring of keys as they came, before any normalisation; **updated in place**.  L >= window + tokens; rows other
        than the pending ones may hold anything.  Layout as that of k.
    v_cache : Tensor, (slots, value_heads, L, V), type of q
        Ring of values, **updated in place**.  Layout as that of v.
    g_cache, beta_cache : Tensor, (slots, value_heads, L), float32
        Rings of the logarithms of the decays, ``-exp(A_log) softplus(a + dt_bias)``, at least -1e4, and of the steps,
        ``sigmoid(b)``; **updated in place**.  Any strides.
    ring_start : Tensor, (slots,), int32
        Row of the oldest pending token of each slot, from 0 to L - 1.
    prev_num_accepted_tokens : Tensor, (slots,), int32
        Pending tokens of each slot, from 0 to window.
    A_log : Tensor, (value_heads,), float32
    a, b : Tensor, (batch, tokens, value_heads), float32/bfloat16/float16
        Logits of the decay and of beta, both of one type; any strides.
    dt_bias : Tensor, (value_heads,), float32/bfloat16/float16
    scale : float, optional
        Of q after its normalisation; None: ``K ** -0.5``.
    output : Tensor, (batch, tokens, value_heads, V), float32/bfloat16/float16, optional
        **Written.**  Stride 1 in the last dimension, others free.  Allocated in the type of q if None.
    use_qk_l2norm : bool
        Divide q and all k by ``sqrt(sum of squares + 1e-6)``.
    window : int, optional
        Most pending tokens, 1 to 64; the same in all steps.  None: ``L - tokens``.
    saturate : bool
        Of new float16 states, make +-65504 what would round to an infinity, infinite sums included.  NaN stays NaN.
        An error with states of other types.

    Returns
    -------
    output : Tensor, (batch, tokens, value_heads, V)
    initial_state : Tensor
        The pool that was passed in.

    Raises
    ------
    ValueError, TypeError
        A shape, type, stride, device, index or cursor is not as described above.  Nothing has been written.  What
        tensors on a GPU hold is not looked at: there, a request whose slot or cursors are out of range is treated as
        padding.
    UnsupportedSpecError
        Sizes that no kernel is made for.
    UnsupportedArchError
        The tensors are on a GPU that the kernels are not compiled for.
    GradientError
        Grad mode is on, and an argument requires grad.  Weights that do are taken as constants, with one warning.

    Notes
    -----
    Index tensors may have more rows than the batch, as buffers of CUDA graphs do: the first ones count.

    On a GPU the kernel is launched as a programmatic dependent: it may start while the kernel before it on the stream
    still runs, waits for its end before it reads or writes anything, and lets the next kernel start at once.  A next
    kernel that is launched so has to wait likewise (``griddepcontrol.wait``) before it uses what this one reads or
    writes.

    The idea of a ring beside a checkpoint is that of ReplaySSM, and FlashInfer's ``checkpointing_ssu`` has it for
    Mamba-2.  Raw values are kept, from which every step solves for the updates anew, rather than the updates: those
    would have to be rounded to the type of the ring.
    """
    if not (isinstance(q, Tensor) and isinstance(v, Tensor) and isinstance(k_cache, Tensor)):
        raise not_tensors(q=q, v=v, k_cache=k_cache)
    allocated = output is None
    if output is None:
        output = torch.empty_like(v, dtype=q.dtype, memory_format=torch.contiguous_format)
    if scale is None:
        scale = default_scale(q)
    if window is None:
        if q.dim() != 4 or k_cache.dim() != 4:
            raise ValueError(describe("k_cache", "4 dimensions like q, or a window", f"{k_cache.dim()} and {q.dim()}"))
        window = k_cache.shape[2] - q.shape[1]
    _REGISTERED.route(q)(
        q, k, v, initial_state, initial_state_indices, k_cache, v_cache, g_cache, beta_cache, ring_start,
        prev_num_accepted_tokens, A_log, a, dt_bias, b, scale, output, use_qk_l2norm, window, allocated,
        saturate,
    )  # fmt: skip
    return output, initial_state


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
    spec = arguments.check(call)
    units = call.v.shape[0] * call.v.shape[2]
    return Checked(
        spec,
        operands=operands,
        units=units,
        choose=lambda arch, sm_count: config.choose(spec, arch, units, sm_count),
        check_contents=lambda: arguments.check_contents(call),
        reference=lambda: reference.step(call),
        strict=spec.input_bytes == ROW_BYTES,
    )


_REGISTERED = _library.register(TABLE.schema("gated_delta_rule_replay"), _run)
