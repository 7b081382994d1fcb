"""`gated_delta_rule_replay`: verification from a checkpoint of the state and a ring of the tokens accepted since."""

from __future__ import annotations

import torch
from torch import Tensor, is_grad_enabled

from cute_ssm import arch as archs
from cute_ssm import runtime
from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops import _library
from cute_ssm.ops._calls import CallPath
from cute_ssm.ops._gated_delta import arguments as checks
from cute_ssm.ops._gated_delta import config as tuning
from cute_ssm.ops._gated_delta.reference import gates
from cute_ssm.ops._gated_delta.spec import WINDOW_BUCKETS, token_bucket, window_bucket
from cute_ssm.ops._library import transform_level
from cute_ssm.ops._plans import REFUSALS
from cute_ssm.ops.gated_delta_rule_replay.reference import gated_delta_rule_replay as reference
from cute_ssm.ops.gated_delta_rule_replay.spec import GatedDeltaRuleReplaySpec
from cute_ssm.reference.rounding import saturated
from cute_ssm.tuning import overridden

MOST_WINDOW = WINDOW_BUCKETS[-1]
LEAST_G = -1e4  # logarithms of decays in the ring are not smaller: e^g is zero long before
RINGS = ("k_cache", "v_cache", "g_cache", "beta_cache")
CURSORS = ("ring_start", "prev_num_accepted_tokens")


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
    for name, value in (("q", q), ("v", v), ("k_cache", k_cache)):
        if not isinstance(value, Tensor):
            raise TypeError(describe(name, "a torch.Tensor", type(value).__name__))
    allocated = output is None
    if output is None:
        output = torch.empty_like(v, dtype=q.dtype, memory_format=torch.contiguous_format)
    if scale is None:
        scale = checks.default_scale(q)
    if window is None:
        if q.dim() != 4 or k_cache.dim() != 4:
            raise ValueError(describe("k_cache", "4 dimensions like q, or a window", f"{k_cache.dim()} and {q.dim()}"))
        window = k_cache.shape[2] - q.shape[1]
    if type(q) is not Tensor or torch.compiler.is_compiling():
        run = _overload
    else:
        run = _eager if is_grad_enabled() or transform_level() is not None else _run
    run(
        q, k, v, initial_state, initial_state_indices, k_cache, v_cache, g_cache, beta_cache, ring_start,
        prev_num_accepted_tokens, A_log, a, dt_bias, b, scale, output, use_qk_l2norm, window, allocated,
        saturate,
    )  # fmt: skip
    return output, initial_state


# Steady state: everything a kernel is chosen by, but for strides and alignment.  Those, and the equality of sizes and
# types, the kernel's own entry checks before it launches; if it refuses, the arguments are examined one by one.  A
# kernel for fully aligned q, k and v refuses others, and is tried first.  One for narrower accesses would take all, and
# is remembered with the layout it was chosen for.
_path = CallPath()


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
    counts: Tensor,
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
            output.data_ptr() % checks.ROW_BYTES, output.stride(), state.stride(),
            k_cache.stride(), v_cache.stride(), g_cache.stride(), beta_cache.stride(),
        )  # fmt: skip
    except (AttributeError, IndexError):  # something is no tensor, or has no axes, which `_check` will name
        key = None
        (src,) = arguments.first_of_batch(q, None, src)
    tensors = (
        q, k, v, state, src, k_cache, v_cache, g_cache, beta_cache, ring_start, counts, A_log, a, dt_bias, b, output,
    )  # fmt: skip
    plan = _path.plans.get(key)
    if plan is not None and not overridden():
        try:
            plan(*tensors, scale, window)
            return
        except REFUSALS:
            pass  # other strides or alignment than last time, or a bad argument: the checks below tell
    if _path.loose_plans and checks.run_loose(_path.loose_plans, key, (*tensors, scale, window)):
        return
    given = _named(*tensors)
    spec = _check(given, window, use_qk_l2norm, zero_padding, saturate)
    units = v.shape[0] * v.shape[2]
    if not q.is_cuda:
        _check_values(src, ring_start, counts, state.shape[0], k_cache.shape[2], window)
        emulator = runtime.emulator()
        if emulator is None:
            runtime.by_reference(spec, tensors)
            _reference(given, scale, window, use_qk_l2norm, zero_padding, saturate)
        elif units:
            arch = archs.by_name(emulator.arch)
            config = tuning.choose(spec, arch, units, emulator.sm_count or arch.sm_count)
            runtime.emulated(spec, config, arch)(*tensors, scale, window)
    elif units:
        arch = runtime.target(q.device)
        config = tuning.choose(spec, arch, units, torch.cuda.get_device_properties(q.device).multi_processor_count)
        plan = runtime.get(spec, config, arch)
        checks.remember(_path.plans, _path.loose_plans, key, plan, spec, (q, k, v))
        plan(*tensors, scale, window)


NAMES = (
    "q", "k", "v", "initial_state", "initial_state_indices", *RINGS, *CURSORS, "A_log", "a", "dt_bias", "b", "output",
)  # fmt: skip


def _named(*tensors: Tensor) -> dict[str, Tensor]:
    return dict(zip(NAMES, tensors))


def _check(
    given: dict[str, Tensor], window: int, use_qk_l2norm: bool, zero_padding: bool, saturate: bool
) -> GatedDeltaRuleReplaySpec:
    """Validate the arguments and return the spec of the call."""
    arguments.check_tensors(given, ())
    q, state, k_cache = (given[name] for name in ("q", "initial_state", "k_cache"))
    slots = state.shape[0] if state.dim() else 0
    heads, K = (*q.shape, 0, 0, 0, 0)[2:4]
    value_heads, V = (*given["v"].shape, 0, 0, 0, 0)[2:4]
    length = k_cache.shape[2] if k_cache.dim() > 2 else 0
    gates_shape = ((slots, value_heads, length), "(slots, value_heads, L)")
    shapes: checks.Shapes = {
        "k_cache": ((slots, heads, length, K), "(slots, heads, L, K)"),
        "v_cache": ((slots, value_heads, length, V), "(slots, value_heads, L, V)"),
        "g_cache": gates_shape,
        "beta_cache": gates_shape,
        **dict.fromkeys(CURSORS, ((slots,), "(slots,)")),
    }
    checks.check_shapes(given, shapes)
    tokens = q.shape[1]
    if not isinstance(window, int) or isinstance(window, bool):
        raise TypeError(describe("window", "an int", type(window).__name__))
    if not 1 <= window <= MOST_WINDOW:
        raise ValueError(
            describe("window", f"1 to {MOST_WINDOW} pending tokens", window, "pass window, or other rings")
        )
    if length < window + tokens:
        expected = f"at least window + tokens = {window} + {tokens} rows"
        raise ValueError(describe("k_cache", expected, length, "all rings are as long"))
    checks.check_types(given)
    arguments.check_saturate(saturate, "initial_state", state.dtype)
    for name in ("k_cache", "v_cache"):
        arguments.check_dtype(name, given[name], (q.dtype,), "the type of q")
    for name in ("g_cache", "beta_cache"):
        arguments.check_dtype(name, given[name], (torch.float32,))
    for name in CURSORS:
        arguments.check_dtype(name, given[name], (torch.int32,))
    checks.check_rows(given, {"k_cache": checks.QUAD * q.element_size(), "v_cache": checks.ROW_BYTES})
    for name in ("initial_state", *RINGS, "output"):
        arguments.check_writable(name, given[name])
    spec = GatedDeltaRuleReplaySpec(
        **{**checks.spec_fields(given, use_qk_l2norm, zero_padding), "tokens": token_bucket(max(tokens, 4))},
        window=window_bucket(window),
        saturate=saturate,
    )
    spec.check()
    return spec


def _check_values(src: Tensor, ring_start: Tensor, counts: Tensor, slots: int, length: int, window: int) -> None:
    """Raise if a slot or cursor on the CPU is out of range, or if two requests use one slot."""
    checks.check_slots("initial_state_indices", src, slots)
    used = src[src >= 0].long()
    if len(set(used.tolist())) != used.numel():
        raise ValueError(describe("initial_state_indices", "distinct slots", used.tolist(), "two requests would race"))
    for name, cursor, most in (
        ("ring_start", ring_start, length - 1),
        ("prev_num_accepted_tokens", counts, window),
    ):
        bad = used[(cursor[used] < 0) | (cursor[used] > most)]
        if bad.numel():
            got = f"{int(cursor[bad[0]])} in slot {int(bad[0])}"
            raise ValueError(describe(name, f"values from 0 to {most}", got, "serving.commit keeps it there"))


def _reference(
    given: dict[str, Tensor], scale: float, window: int, use_qk_l2norm: bool, zero_padding: bool, saturate: bool
) -> None:
    """Gather, compute in float32, round, scatter: what the kernel does, by PyTorch."""
    q, k, v, state, src, *rings, ring_start, counts, A_log, a, dt_bias, b, output = (given[name] for name in NAMES)
    real = src >= 0
    if zero_padding:
        output[~real] = 0
    rows = torch.arange(src.numel())[real]
    if not rows.numel():
        return
    slots, tokens, length = src[real].long(), q.shape[1], rings[0].shape[2]
    start, pending = ring_start[slots].long(), counts[slots].long()
    q, k, v = q[rows], k[rows], v[rows]
    g, beta = gates(a[rows], b[rows], A_log, dt_bias)
    g = g.clamp(min=LEAST_G)
    history = (start[:, None] + torch.arange(window)) % length  # (batch, window)
    old = [ring[slots[:, None], :, history].transpose(1, 2) for ring in rings]  # (batch, heads, window, ...)
    new = (k, v, g, beta)
    out, folded = reference(state[slots], old, pending, q, new, scale, use_qk_l2norm)
    output[rows] = out.to(output.dtype)
    flush = (pending + tokens > window) & (pending > 0)
    folded = saturated(folded) if saturate else folded
    state[slots[flush]] = folded[flush].to(state.dtype)
    fresh = (start[:, None] + pending[:, None] + torch.arange(tokens)) % length
    for ring, rows_of_tokens in zip(rings, new):
        ring[slots[:, None], :, fresh] = rows_of_tokens


_eager, _overload, _ = _library.register(
    "gated_delta_rule_replay(Tensor q, Tensor k, Tensor v, Tensor(a!) initial_state, Tensor initial_state_indices, "
    "Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor(d!) g_cache, Tensor(e!) beta_cache, Tensor ring_start, "
    "Tensor prev_num_accepted_tokens, Tensor A_log, Tensor a, Tensor dt_bias, Tensor b, float scale, "
    "Tensor(f!) output, bool use_qk_l2norm, int window, bool zero_padding, bool saturate=False) -> ()",
    _run,
    lambda *_: None,
)
