"""`gated_delta_rule_mtp`: several tokens of a gated delta net's recurrence per request, on a pool of states."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

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
from cute_ssm.ops._gated_delta.reference import gates, recurrence
from cute_ssm.ops._library import transform_level
from cute_ssm.ops._plans import REFUSALS
from cute_ssm.ops.gated_delta_rule_mtp.spec import GatedDeltaRuleSpec
from cute_ssm.reference.rounding import saturated
from cute_ssm.tuning import overridden


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
) -> tuple[Tensor, Tensor]:
    """Run 1 to 16 tokens of the gated delta rule for every request, and return all outputs.

    With the state S [V, K] of a (request, value head) and k^, q^ normalised (if ``use_qk_l2norm``), token by token::

        g = -exp(A_log) softplus(a + dt_bias);   beta = sigmoid(b);   q^ <- scale q^
        S <- e^g S;   u = beta (v - S k^);   S <- S + u k^^T;   out = S q^

    Tensors on a GPU run the compiled kernel; tensors on the CPU run the PyTorch reference, or the same compiled kernel
    inside ``ptxsim.emulate()``.  The kernel computes all tokens at once on tensor cores, with float32 states and
    coefficients in two parts, so that its error is that of float32.

    No value of a token reaches outputs of earlier tokens, or states before it: NaN, infinite values and overflows in q,
    k, v, a or b change no bit of them.  Tokens beyond the accepted ones, padding for instance, may hold anything.

    Parameters
    ----------
    q, k : Tensor, (batch, tokens, heads, K), bfloat16/float16
        Queries and keys; tokens is 1 to 16, K a multiple of 16 up to 256.  Stride 1 in the last dimension.  Any
        alignment will do, as of slices of a fused projection; addresses and other strides of q and k that are multiples
        of 8 bytes, and of v of 16, are fastest.
    v : Tensor, (batch, tokens, value_heads, V), type of q
        Values; V is a multiple of 16 up to 256, or 512, value_heads a multiple of heads, and value head h uses row
        ``h // (value_heads / heads)`` of q and k.  Stride 1 in the last dimension.
    initial_state : Tensor, (slots, value_heads, V, K), float32/bfloat16/float16
        Pool of states, **updated in place** if asked for.  Stride 1 in the last dimension; other strides are free
        multiples of 4 elements, and so is the address: pages may hold other data as well.
    initial_state_indices : Tensor, (batch,), int32/int64
        Slot of each request.  A negative entry is padding: nothing of the request is read or written, and its rows of
        ``output`` stay as they are, or are zero if ``output`` was not given.
    A_log : Tensor, (value_heads,), float32
    a, b : Tensor, (batch, tokens, value_heads), float32/bfloat16/float16
        Logits of the decay and of beta, both of one type; any strides.
    dt_bias : Tensor, (value_heads,), float32/bfloat16/float16
    scale : float, optional
        Of q after its normalisation; None: ``K ** -0.5``.
    output : Tensor, (batch, tokens, value_heads, V), float32/bfloat16/float16, optional
        **Written.**  Stride 1 in the last dimension, others free.  Allocated in the type of q if None.
    intermediate_states_buffer : Tensor, (>= batch, >= tokens, value_heads, V, K), type of initial_state, optional
        **Written**: the state of request i after token t to ``buffer[i, t]``, by position in the batch.  Layout as that
        of initial_state.
    ssm_state_indices : Tensor, (batch, tokens), int32/int64, optional
        The state after token t of request i goes to slot ``ssm_state_indices[i, t]``; negative entries are skipped.
        Then the final state goes nowhere else, and ``output_state_indices`` is ignored.  Needs
        ``disable_state_update=False`` and no buffer.
    disable_state_update : bool, optional
        False: write the final state to its slot.  True: leave the pool as it is.  None: like True, with a FutureWarning
        once per process, because FlashInfer has announced that its own default will become False.
    use_qk_l2norm : bool
        Divide q and k by ``sqrt(sum of squares + 1e-6)``.
    output_state_indices : Tensor, (batch,), int32/int64, optional
        Slots that receive the final states instead of those read; negative entries are not written.  Slots written by
        one call must be distinct, and none may be read by another request.
    accepted_steps : Tensor, (batch,), int32/int64, optional
        Number of leading tokens, 0 to tokens, whose state is the one written to the pool; outputs are those of all
        tokens.  None: all.  Not together with ``ssm_state_indices``.
    saturate : bool
        Of new float16 states, make +-65504 what would round to an infinity, infinite sums included.  NaN stays NaN.
        An error with states of other types.
    gate_logits : bool
        False: a and b are the gates themselves, g of any sign and any beta (up to 2 for negative eigenvalues), and
        nothing depends on ``A_log`` and ``dt_bias``.

    Returns
    -------
    output : Tensor, (batch, tokens, value_heads, V)
    initial_state : Tensor
        The pool that was passed in.

    Raises
    ------
    ValueError, TypeError
        A shape, type, stride, device or index is not as described above.  Nothing has been written.  What tensors on a
        GPU hold is not looked at: there, a request whose ``initial_state_indices`` or ``accepted_steps`` are out of
        range is treated as padding, and a destination out of range is not written.
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

    The signature follows ``flashinfer.gdn_decode.gated_delta_rule_mtp``; the recurrence is that of Yang, Kautz and
    Hatamizadeh, "Gated Delta Networks" (2024), and its form by products that of Yang et al., "Parallelizing Linear
    Transformers with the Delta Rule over Sequence Length" (2024).
    """
    if not (isinstance(q, Tensor) and isinstance(v, Tensor)):
        raise arguments.not_tensors(q=q, v=v)
    if disable_state_update is None:
        _warn_of_default()
        disable_state_update = True
    allocated = output is None
    if output is None:
        output = torch.empty_like(v, dtype=q.dtype, memory_format=torch.contiguous_format)
    if scale is None:
        scale = checks.default_scale(q)
    if type(q) is not Tensor or torch.compiler.is_compiling():
        run = _overload
    else:
        run = _eager if is_grad_enabled() or transform_level() is not None else _run
    run(
        q, k, v, initial_state, initial_state_indices, A_log, a, dt_bias, b, scale, output,
        intermediate_states_buffer, ssm_state_indices, disable_state_update, use_qk_l2norm, output_state_indices,
        accepted_steps, allocated, saturate, gate_logits,
    )  # fmt: skip
    return output, initial_state


_warned = False


def _warn_of_default() -> None:
    global _warned
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(
            "disable_state_update: None leaves the states as they are, like True, but FlashInfer has announced that "
            "its default becomes False; pass True or False",
            FutureWarning,
            stacklevel=3,
        )


# Steady state: everything a kernel is chosen by, but for strides and alignment.  Those, and the equality of sizes and
# types, the kernel's own entry checks before it launches; if it refuses, the arguments are examined one by one.  A
# kernel for fully aligned q, k and v refuses others, and is tried first.  One for narrower accesses would take all, and
# is remembered with the layout it was chosen for.
_path = CallPath()


class Flags(NamedTuple):
    """The arguments of a call that are no tensors, but for the scale."""

    disable_state_update: bool
    use_qk_l2norm: bool
    zero_padding: bool
    saturate: bool
    gate_logits: bool


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
    zero_padding: bool,
    saturate: bool = False,
    gate_logits: bool = True,
) -> None:
    if scatter is not None or disable_state_update:
        dst = None
    key: tuple[object, ...] | None
    try:
        shape = q.shape
        batch = shape[0]
        if scatter is not None and (scatter.shape[0] > batch or scatter.shape[1] > shape[1]):
            scatter = scatter[:batch, : shape[1]]
        if src.shape[0] > batch:
            src = src[:batch]
        if dst is not None and dst.shape[0] > batch:
            dst = dst[:batch]
        if accepted is not None and accepted.shape[0] > batch:
            accepted = accepted[:batch]
        key = (
            shape, v.shape, state.dtype, q.dtype, src.dtype, a.dtype, dt_bias.dtype, output.dtype,
            None if buffer is None else (buffer.dtype, buffer.shape),
            None if scatter is None else scatter.dtype, None if dst is None else dst.dtype,
            None if accepted is None else accepted.dtype, disable_state_update, use_qk_l2norm, zero_padding, saturate,
            gate_logits, q.device, output.data_ptr() % checks.ROW_BYTES, output.stride(),
        )  # fmt: skip
    except (AttributeError, IndexError):  # something is no tensor, or has no axes, which `_check` will name
        key = None
        src, scatter, dst, accepted = arguments.first_of_batch(q, None, src, scatter, dst, accepted)
    tensors = (q, k, v, state, src, A_log, a, dt_bias, b, output, buffer, scatter, dst, accepted)
    operands = tensors
    if accepted is not None and disable_state_update:
        # without a state to write, the kernel has no argument for how many tokens it would pass
        operands = (*tensors[:-1], None)
    plan = _path.plans.get(key)
    if plan is not None and not overridden():
        try:
            plan(*operands, scale)
            return
        except REFUSALS:
            pass  # other strides or alignment than last time, or a bad argument: the checks below tell
    if _path.loose_plans and checks.run_loose(_path.loose_plans, key, (*operands, scale)):
        return
    flags = Flags(disable_state_update, use_qk_l2norm, zero_padding, saturate, gate_logits)
    spec = _check(*tensors, flags)
    units = v.shape[0] * v.shape[2]
    if not q.is_cuda:
        _check_indices(tensors, flags)
        emulator = runtime.emulator()
        if emulator is None:
            runtime.by_reference(spec, tensors)
            _reference(*tensors, scale, flags)
        elif units:
            arch = archs.by_name(emulator.arch)
            config = tuning.choose(spec, arch, units, emulator.sm_count or arch.sm_count)
            runtime.emulated(spec, config, arch)(*operands, scale)
    elif units:
        arch = runtime.target(q.device)
        config = tuning.choose(spec, arch, units, torch.cuda.get_device_properties(q.device).multi_processor_count)
        plan = runtime.get(spec, config, arch)
        checks.remember(_path.plans, _path.loose_plans, key, plan, spec, (q, k, v))
        plan(*operands, scale)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    src: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    output: Tensor,
    buffer: Tensor | None,
    scatter: Tensor | None,
    dst: Tensor | None,
    accepted: Tensor | None,
    flags: Flags,
) -> GatedDeltaRuleSpec:
    """Validate the arguments and return the spec of the call."""
    disabled, l2norm, zero_padding, saturate, gate_logits = flags
    named = {
        "q": q, "k": k, "v": v, "initial_state": state, "initial_state_indices": src, "A_log": A_log, "a": a,
        "dt_bias": dt_bias, "b": b, "output": output, "intermediate_states_buffer": buffer,
        "ssm_state_indices": scatter, "output_state_indices": dst, "accepted_steps": accepted,
    }  # fmt: skip
    indices = ("ssm_state_indices", "output_state_indices", "accepted_steps")
    arguments.check_tensors(named, ("intermediate_states_buffer", *indices))
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    batch, tokens = (*q.shape, 0, 0)[:2]
    per_request = ((batch,), "(batch,)")
    shapes: checks.Shapes = {
        "ssm_state_indices": ((batch, tokens), "(batch, tokens)"),
        "output_state_indices": per_request,
        "accepted_steps": per_request,
    }
    checks.check_shapes(given, shapes)
    _check_buffer(buffer, (batch, tokens, *v.shape[2:], q.shape[3]))
    checks.check_types(given)
    arguments.check_saturate(saturate, "initial_state", state.dtype)
    if buffer is not None:
        arguments.check_dtype("intermediate_states_buffer", buffer, (state.dtype,), "the type of initial_state")
    for name in indices:
        if name in given:
            arguments.check_dtype(name, given[name], checks.INTEGERS)
    if scatter is not None:
        if buffer is not None:
            fix = "a call stores states by slot or by position, not both"
            raise ValueError(describe("ssm_state_indices", "None beside intermediate_states_buffer", "both", fix))
        if disabled:
            fix = "slots of the pool are written: pass disable_state_update=False"
            raise ValueError(describe("ssm_state_indices", "None if the state update is disabled", "a tensor", fix))
        if accepted is not None:
            fix = "with ssm_state_indices no final state is written"
            raise ValueError(describe("accepted_steps", "None beside ssm_state_indices", "both", fix))
    checks.check_rows(given, {"intermediate_states_buffer": checks.QUAD * state.element_size()})

    def name_of(tensor: Tensor | None) -> str | None:
        return None if tensor is None else arguments.DTYPE_NAMES[tensor.dtype]

    spec = GatedDeltaRuleSpec(
        **checks.spec_fields(given, l2norm, zero_padding),
        dst_dtype=name_of(dst),
        scatter_dtype=name_of(scatter),
        accepted_dtype=None if disabled else name_of(accepted),
        write_final=not disabled and scatter is None,
        write_buffer=buffer is not None,
        saturate=saturate,
        gate_logits=gate_logits,
    )
    spec.check()
    return spec


def _check_buffer(buffer: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise unless there is room for the states of a call, in a buffer if there is one."""
    if buffer is None:
        return
    got = tuple(buffer.shape)
    if len(got) != 5 or got[0] < shape[0] or got[1] < shape[1] or got[2:] != shape[2:]:
        expected = f"shape (>= batch, >= tokens, value_heads, V, K) with {shape}"
        raise ValueError(describe("intermediate_states_buffer", expected, got, "its first axis is the batch"))


def _check_indices(tensors: tuple[Any, ...], flags: Flags) -> None:
    """Raise if an index on the CPU leads outside, or if two requests would use one slot against the contract."""
    q, state, src, scatter, dst, accepted = (tensors[i] for i in (0, 3, 4, 11, 12, 13))
    slots, tokens, disabled = state.shape[0], q.shape[1], flags[0]
    named = {"initial_state_indices": src, "ssm_state_indices": scatter, "output_state_indices": dst}
    checks.check_slots("initial_state_indices", src, slots)
    real = src >= 0  # nothing is asked of the other indices of padding
    for name, indices in named.items():
        if indices is not None:
            checks.check_slots(name, indices[real], slots)
    if accepted is not None and bool((real & ((accepted < 0) | (accepted > tokens))).any()):
        raise ValueError(describe("accepted_steps", f"counts from 0 to {tokens} = tokens", accepted[real].tolist()))
    if disabled or not src.numel():
        return
    written = (dst if dst is not None else src) if scatter is None else scatter
    name = next(name for name, indices in named.items() if indices is written)
    per_token = written.dim() == 2
    requests = _positions(src)
    owner = requests[:, None].expand(written.shape) if per_token else requests
    kept = (written >= 0) & (real[:, None] if per_token else real)
    targets, owners = written[kept].long(), owner[kept]
    if targets.unique().numel() != targets.numel():
        raise ValueError(describe(name, "distinct slots to write", targets.tolist(), "two requests would race"))
    foreign = (targets[:, None] == src[real].long()[None]) & (owners[:, None] != requests[real][None])
    if bool(foreign.any()):
        raise ValueError(describe(name, "no slot that another request reads", targets.tolist(), "they would race"))


def _positions(per_request: Tensor) -> Tensor:
    return torch.arange(per_request.numel(), device=per_request.device)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    src: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    output: Tensor,
    buffer: Tensor | None,
    scatter: Tensor | None,
    dst: Tensor | None,
    accepted: Tensor | None,
    scale: float,
    flags: Flags,
) -> None:
    """Gather, compute in float32, round, scatter: what the kernel does, by PyTorch."""
    disabled, l2norm, zero_padding, saturate, gate_logits = flags
    real = src >= 0
    if zero_padding:
        output[~real] = 0
    rows, source = _positions(src)[real], src[real].long()
    if not rows.numel():
        return
    first = state[source]
    g, beta = gates(a, b, A_log, dt_bias) if gate_logits else (a, b)
    out, states = recurrence(first, q[rows], k[rows], v[rows], g[rows], beta[rows], scale, l2norm)
    output[rows] = out.to(output.dtype)
    states = (saturated(states) if saturate else states).to(state.dtype)
    if buffer is not None:
        buffer[rows, : q.shape[1]] = states
    if disabled:
        return
    if scatter is not None:
        targets = scatter[rows].long()
        kept = targets >= 0
        state[targets[kept]] = states[kept]
        return
    targets = source if dst is None else dst[rows].long()
    kept = targets >= 0
    count = torch.full_like(source, q.shape[1]) if accepted is None else accepted[rows].long()
    everything = torch.cat([first[:, None], states], 1)
    state[targets[kept]] = everything[_positions(count), count][kept]


_eager, _overload, _ = _library.register(
    "gated_delta_rule_mtp(Tensor q, Tensor k, Tensor v, Tensor(a!) initial_state, Tensor initial_state_indices, "
    "Tensor A_log, Tensor a, Tensor dt_bias, Tensor b, float scale, Tensor(b!) output, "
    "Tensor(c!)? intermediate_states_buffer, Tensor? ssm_state_indices, bool disable_state_update, bool use_qk_l2norm, "
    "Tensor? output_state_indices, Tensor? accepted_steps, bool zero_padding, bool saturate=False, "
    "bool gate_logits=True) -> ()",
    _run,
    lambda *_: None,
)
