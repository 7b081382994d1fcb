"""`gated_delta_rule_mtp`: several tokens of a gated delta net's recurrence per request, on a pool of states."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cute_ssm import arch as archs
from cute_ssm import runtime
from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops import _library
from cute_ssm.reference.gated_delta_rule import gated_delta_rule as reference
from cute_ssm.spec import GatedDeltaRuleSpec, token_bucket
from cute_ssm.tuning import gated_delta_rule as tuning
from cute_ssm.tuning import overridden

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
QUAD = 4  # elements of the narrowest access to rows of q, k and states
ROW_BYTES = 16  # of the accesses to rows of v and of a 16-bit output


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
) -> tuple[Tensor, Tensor]:
    """Run 1 to 16 tokens of the gated delta rule for every request, and return all outputs.

    With the state S [V, K] of a (request, value head) and k^, q^ normalised (if ``use_qk_l2norm``), token by token::

        g = -exp(A_log) softplus(a + dt_bias);   beta = sigmoid(b);   q^ <- scale q^
        S <- e^g S;   u = beta (v - S k^);   S <- S + u k^^T;   out = S q^

    Tensors on a GPU run the compiled kernel; tensors on the CPU run the PyTorch reference, or the same compiled kernel
    inside ``ptxsim.emulate()``.  The kernel computes all tokens at once on tensor cores, with float32 states and
    coefficients in two parts, so that its error is that of float32.

    Parameters
    ----------
    q, k : Tensor, (batch, tokens, heads, K), bfloat16/float16
        Queries and keys; tokens is 1 to 16, K is 64, 128 or 256.  Stride 1 in the last dimension, address and other
        strides multiples of 8 bytes: slices of a fused projection are fine.
    v : Tensor, (batch, tokens, value_heads, V), type of q
        Values; V is 64, 128 or 256, value_heads a multiple of heads, and value head h uses row
        ``h // (value_heads / heads)`` of q and k.  Stride 1 in the last dimension, address and other strides multiples
        of 16 bytes.
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
        Sizes that no kernel is made for.
    UnsupportedArchError
        The tensors are on a GPU that the kernels are not compiled for.

    Notes
    -----
    The signature follows ``flashinfer.gdn_decode.gated_delta_rule_mtp``; the recurrence is that of Yang, Kautz and
    Hatamizadeh, "Gated Delta Networks" (2024), and its form by products that of Yang et al., "Parallelizing Linear
    Transformers with the Delta Rule over Sequence Length" (2024).
    """
    for name, value in (("q", q), ("v", v)):
        if not isinstance(value, Tensor):
            raise TypeError(describe(name, "a torch.Tensor", type(value).__name__))
    if disable_state_update is None:
        _warn_of_default()
        disable_state_update = True
    allocated = output is None
    if output is None:
        output = torch.empty_like(v, dtype=q.dtype, memory_format=torch.contiguous_format)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    run = _run if type(q) is Tensor and not torch.compiler.is_compiling() else _overload
    run(
        q, k, v, initial_state, initial_state_indices, A_log, a, dt_bias, b, scale, output,
        intermediate_states_buffer, ssm_state_indices, disable_state_update, use_qk_l2norm, output_state_indices,
        accepted_steps, allocated,
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
# types, the kernel's own entry checks before it launches; if it refuses, the arguments are examined one by one.
_plans: dict[tuple[object, ...] | None, Callable[..., None]] = {}


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


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
) -> None:
    if scatter is not None or disable_state_update:
        dst = None
    tensors = (q, k, v, state, src, A_log, a, dt_bias, b, output, buffer, scatter, dst, accepted)
    flags = (disable_state_update, use_qk_l2norm, zero_padding)
    key: tuple[object, ...] | None
    try:
        key = (
            q.shape, v.shape, state.dtype, q.dtype, src.dtype, a.dtype, dt_bias.dtype, output.dtype,
            None if buffer is None else (buffer.dtype, buffer.shape),
            _dtype(scatter), _dtype(dst), _dtype(accepted), flags, q.device, output.data_ptr() % ROW_BYTES,
            output.stride(),
        )  # fmt: skip
    except AttributeError:  # something is no tensor, which `_check` will name
        key = None
    plan = _plans.get(key)
    if plan is not None and not overridden():
        try:
            plan(*tensors, scale)
            return
        except (TypeError, ValueError):
            pass  # other strides or alignment than last time, or a bad argument: the checks below tell
    spec = _check(*tensors, flags)
    units = v.shape[0] * v.shape[2]
    if not q.is_cuda:
        _check_indices(tensors, flags)
        emulator = runtime.emulator()
        if emulator is None:
            _reference(*tensors, scale, flags)
        elif units:
            arch = archs.by_name(emulator.arch)
            config = tuning.choose(spec, arch, units, emulator.sm_count or arch.sm_count)
            runtime.emulated(spec, config, arch)(*tensors, scale)
    elif units:
        arch = runtime.target(q.device)
        config = tuning.choose(spec, arch, units, torch.cuda.get_device_properties(q.device).multi_processor_count)
        plan = runtime.get(spec, config, arch)
        if not overridden():
            _plans[key] = plan
        plan(*tensors, scale)


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
    flags: tuple[bool, bool, bool],
) -> GatedDeltaRuleSpec:
    """Validate the arguments and return the spec of the call."""
    disabled, l2norm, zero_padding = flags
    named = {
        "q": q, "k": k, "v": v, "initial_state": state, "initial_state_indices": src, "A_log": A_log, "a": a,
        "dt_bias": dt_bias, "b": b, "output": output, "intermediate_states_buffer": buffer,
        "ssm_state_indices": scatter, "output_state_indices": dst, "accepted_steps": accepted,
    }  # fmt: skip
    indices = ("ssm_state_indices", "output_state_indices", "accepted_steps")
    arguments.check_tensors(named, ("intermediate_states_buffer", *indices))
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    _check_shapes(given)
    arguments.check_dtype("q", q, HALVES)
    for name in ("k", "v"):
        arguments.check_dtype(name, given[name], (q.dtype,), f"the type of q; cast it with {name}.to(q.dtype)")
    for name in ("initial_state", "a", "dt_bias", "output"):
        arguments.check_dtype(name, given[name], FLOATS)
    arguments.check_dtype("b", b, (a.dtype,), "the type of a; cast it with b.to(a.dtype)")
    arguments.check_dtype("A_log", A_log, (torch.float32,), "cast it once with A_log.float()")
    if buffer is not None:
        arguments.check_dtype("intermediate_states_buffer", buffer, (state.dtype,), "the type of initial_state")
    for name in ("initial_state_indices", *indices):
        if name in given:
            arguments.check_dtype(name, given[name], INTEGERS)
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
    for name in ("q", "k", "v", "initial_state", "output", "intermediate_states_buffer"):
        if name in given:
            arguments.check_last_contiguous(name, given[name])
    quad_bytes = QUAD * q.element_size()
    limits = {"q": quad_bytes, "k": quad_bytes, "v": ROW_BYTES}
    limits |= dict.fromkeys(("initial_state", "intermediate_states_buffer"), QUAD * state.element_size())
    for name, n_bytes in limits.items():
        if name in given and not arguments.aligned(given[name], n_bytes):
            size = given[name].element_size()
            got = f"address {given[name].data_ptr():#x} and strides {given[name].stride()} of {size} bytes"
            expected = f"an address and outer strides that are multiples of {n_bytes} bytes"
            raise ValueError(describe(name, expected, got, "pad its rows, or pass a copy of inputs"))

    def name_of(tensor: Tensor | None) -> str | None:
        return None if tensor is None else arguments.DTYPE_NAMES[tensor.dtype]

    spec = GatedDeltaRuleSpec(
        state_dtype=arguments.DTYPE_NAMES[state.dtype],
        input_dtype=arguments.DTYPE_NAMES[q.dtype],
        output_dtype=arguments.DTYPE_NAMES[output.dtype],
        gate_dtype=arguments.DTYPE_NAMES[a.dtype],
        dt_bias_dtype=arguments.DTYPE_NAMES[dt_bias.dtype],
        K=q.shape[3],
        V=v.shape[3],
        tokens=token_bucket(q.shape[1]),
        l2norm=l2norm,
        src_dtype=arguments.DTYPE_NAMES[src.dtype],
        dst_dtype=name_of(dst),
        scatter_dtype=name_of(scatter),
        accepted_dtype=None if disabled else name_of(accepted),
        write_final=not disabled and scatter is None,
        write_buffer=buffer is not None,
        zero_padding=zero_padding,
        vector_output=output.element_size() == 2 and arguments.aligned(output, ROW_BYTES),
    )
    spec.check()
    return spec


def _check_shapes(given: dict[str, Tensor]) -> None:
    """Raise unless all shapes agree; `given` holds the arguments that are not None."""
    ranks = {
        "q": "(batch, tokens, heads, K)",
        "v": "(batch, tokens, value_heads, V)",
        "initial_state": "(slots, value_heads, V, K)",
    }
    for name, letters in ranks.items():
        if given[name].dim() != 4:
            raise ValueError(describe(name, f"shape {letters}", tuple(given[name].shape)))
    batch, tokens, heads, K = given["q"].shape
    value_heads, V = given["v"].shape[2:]
    slots = given["initial_state"].shape[0]
    if not 1 <= tokens <= 16:
        raise ValueError(describe("q", "1 to 16 tokens", tokens, "split the call"))
    gates, per_head = ((batch, tokens, value_heads), "(batch, tokens, value_heads)"), ((value_heads,), "(value_heads,)")
    shapes = {
        "k": ((batch, tokens, heads, K), "(batch, tokens, heads, K)"),
        "v": ((batch, tokens, value_heads, V), "(batch, tokens, value_heads, V)"),
        "initial_state": ((slots, value_heads, V, K), "(slots, value_heads, V, K)"),
        "initial_state_indices": ((batch,), "(batch,)"),
        "A_log": per_head,
        "a": gates,
        "dt_bias": per_head,
        "b": gates,
        "output": ((batch, tokens, value_heads, V), "(batch, tokens, value_heads, V)"),
        "ssm_state_indices": ((batch, tokens), "(batch, tokens)"),
        "output_state_indices": ((batch,), "(batch,)"),
        "accepted_steps": ((batch,), "(batch,)"),
    }
    for name, (shape, letters) in shapes.items():
        if name in given:
            arguments.check_shape(name, given[name], shape, letters)
    if heads < 1 or value_heads % heads:
        expected = f"value_heads that is a multiple of heads = {heads}"
        raise ValueError(describe("v", expected, f"value_heads = {value_heads}"))
    buffer = given.get("intermediate_states_buffer")
    if buffer is not None:
        shape = tuple(buffer.shape)
        if len(shape) != 5 or shape[0] < batch or shape[1] < tokens or shape[2:] != (value_heads, V, K):
            letters = "(>= batch, >= tokens, value_heads, V, K)"
            expected = f"shape {letters} with {(batch, tokens, value_heads, V, K)}"
            raise ValueError(describe("intermediate_states_buffer", expected, shape, "its first axis is the batch"))


def _check_indices(tensors: tuple[Any, ...], flags: tuple[bool, bool, bool]) -> None:
    """Raise if an index on the CPU leads outside, or if two requests would use one slot against the contract."""
    q, state, src, scatter, dst, accepted = (tensors[i] for i in (0, 3, 4, 11, 12, 13))
    slots, tokens, disabled = state.shape[0], q.shape[1], flags[0]
    named = {"initial_state_indices": src, "ssm_state_indices": scatter, "output_state_indices": dst}
    for name, indices in named.items():
        if indices is not None and bool((indices >= slots).any()):
            worst = int(indices.max())
            raise ValueError(describe(name, f"slots below {slots}, or negative entries for padding", worst))
    if accepted is not None and bool(((accepted < 0) | (accepted > tokens)).any()):
        raise ValueError(describe("accepted_steps", f"counts from 0 to {tokens} = tokens", accepted.tolist()))
    if disabled or not src.numel():
        return
    real = src >= 0
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
    flags: tuple[bool, bool, bool],
) -> None:
    """Gather, compute in float32, round, scatter: what the kernel does, by PyTorch."""
    disabled, l2norm, zero_padding = flags
    real = src >= 0
    if zero_padding:
        output[~real] = 0
    rows, source = _positions(src)[real], src[real].long()
    if not rows.numel():
        return
    first = state[source]
    out, states = reference(first, q[rows], k[rows], v[rows], a[rows], b[rows], A_log, dt_bias, scale, l2norm)
    output[rows] = out.to(output.dtype)
    states = states.to(state.dtype)
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


_overload = _library.register(
    "gated_delta_rule_mtp(Tensor q, Tensor k, Tensor v, Tensor(a!) initial_state, Tensor initial_state_indices, "
    "Tensor A_log, Tensor a, Tensor dt_bias, Tensor b, float scale, Tensor(b!) output, "
    "Tensor(c!)? intermediate_states_buffer, Tensor? ssm_state_indices, bool disable_state_update, bool use_qk_l2norm, "
    "Tensor? output_state_indices, Tensor? accepted_steps, bool zero_padding) -> ()",
    _run,
    lambda *_: None,
)
