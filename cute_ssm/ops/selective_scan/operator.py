"""`selective_scan` and `selective_scan_fn`: the recurrence of Mamba-1 over all tokens of a batch of sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled

from cute_ssm import arch as archs
from cute_ssm import runtime
from cute_ssm.arch import Arch
from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops import _library
from cute_ssm.ops._calls import CallPath
from cute_ssm.ops._library import transform_level
from cute_ssm.ops._plans import REFUSALS
from cute_ssm.ops.selective_scan import config as tuning
from cute_ssm.ops.selective_scan.arguments import check
from cute_ssm.ops.selective_scan.plan import (
    ACCESS_BYTES,
    Metadata,
    aligned,
    layout,
    of_batch,
    plan_on_cpu,
    unit_strides,
)
from cute_ssm.ops.selective_scan.plan import Tensors as _Tensors
from cute_ssm.ops.selective_scan.reference import selective_scan as reference
from cute_ssm.ops.selective_scan.spec import SelectiveScanSpec
from cute_ssm.reference.rounding import saturated
from cute_ssm.tuning import overridden


def selective_scan(
    u: Tensor,
    ssm_states: Tensor | None,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    query_start_loc: Tensor | None = None,
    cache_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_block_id: int = 0,
    block_size: int = 1024,
    block_idx_first_scheduled_token: Tensor | None = None,
    block_idx_last_scheduled_token: Tensor | None = None,
    initial_state_idx: Tensor | None = None,
    cu_chunk_seqlen: Tensor | None = None,
    last_chunk_indices: Tensor | None = None,
    out: Tensor | None = None,
    *,
    saturate: bool = False,
) -> Tensor:
    """Run the selective state-space recurrence over every sequence and return the outputs.

    With the states h [dstate] of a (sequence, channel), in float32, for every token::

        delta' = softplus(delta + delta_bias);  h <- exp(A delta') h + (delta' u) B;  out = (h . C + D u) silu(z)

    An output, and a state that prefix caching saves, depend on no value of a later token: not a bit of them changes
    where u, delta, B, C or z of a later one hold NaN or infinities.

    Sequences are equally long (*dense*), or packed one after another (*varlen*, with ``query_start_loc``).  Tensors on
    a GPU run the compiled kernel; tensors on the CPU run the PyTorch reference, or the same compiled kernel inside
    ``ptxsim.emulate()``.

    Parameters
    ----------
    u : Tensor, (batch, dim, length) or varlen (dim, total), float32/bfloat16/float16
        Input.  Stride 1 in the last dimension is fast, like for delta, B, C, z and out; others work through a copy.
    ssm_states : Tensor, (slots, dim, dstate), type of u or float32, or None
        Pool of states, **updated in place**: a sequence's slot receives its final state.  Stride 1 in the last
        dimension, other strides free.  None: scans start from zero and final states are not kept.
    delta : Tensor, like u
        Step size before bias and softplus.
    A : Tensor, (dim, dstate), float32
        Decay rates, stride 1 in the last dimension; dstate is 1 to 256.
    B, C : Tensor, (batch, ngroups, dstate, length) or varlen (ngroups, dstate, total), type of u
        Input and output projections of each token; dim is a multiple of ngroups.  The axis of a single group may be
        left out.
    D : Tensor, (dim,), float32, optional
        Skip weights, any stride.
    z : Tensor, like u, optional
        Gate.
    delta_bias : Tensor, (dim,), float32, optional
        Any stride.
    delta_softplus : bool
        Apply softplus to delta + delta_bias (the identity above 20).
    query_start_loc : Tensor, (batch + 1,), int32/int64, optional
        Varlen: sequence b is tokens ``query_start_loc[b]`` to ``query_start_loc[b + 1]``; the first entry is 0.
    cache_indices : Tensor, (batch,) or (batch, n), int32/int64, optional
        Slot of each sequence; of a matrix, column 0, or with prefix caching a table of n blocks per sequence.  None:
        sequence b uses slot b, and none is null.
    has_initial_state : Tensor, (batch,), bool, optional
        Sequences that start from the state in their slot; the others, or all if None, start from zero.
    null_block_id : int
        A sequence whose (initial) slot is this one is skipped: its tokens of ``out`` stay as they are, or are zero if
        ``out`` was not given.  With prefix caching, a state whose destination is this slot is not saved.
    block_size : int
        Prefix caching: tokens of a block, any positive number.
    block_idx_first_scheduled_token, block_idx_last_scheduled_token, initial_state_idx : Tensor, (batch,), optional
        Prefix caching, all three or none, type of cache_indices: columns of ``cache_indices`` of the block of the first
        token and of the last one, and of the initial state.
    cu_chunk_seqlen : Tensor, (chunks + 1,), type of cache_indices, optional
        Prefix caching: offsets of the chunks of all sequences; states are saved at the ends of chunks.  None: sequences
        are cut every ``block_size`` tokens.
    last_chunk_indices : Tensor, (batch,), type of cache_indices, optional
        With ``cu_chunk_seqlen``: number of each sequence's last chunk.
    out : Tensor, like u, optional
        **Written.**  It may be u, delta or z itself.  Allocated if None; zero then where no sequence has a token.
    saturate : bool
        Of new float16 states, make +-65504 what would round to an infinity, infinite sums included.  NaN stays NaN.
        An error with states of other types.

    Returns
    -------
    Tensor
        ``out``.

    Raises
    ------
    ValueError, TypeError
        A shape, type, stride, device, size or index is not as described above.  Nothing has been written.  What tensors
        on a GPU hold is not looked at: there, a sequence whose offsets, slot, columns or chunks are out of range is
        skipped like one whose slot is null, and a state whose own destination is out of range is not saved.
    UnsupportedArchError
        The tensors are on a GPU that the kernels are not compiled for.
    GradientError
        Grad mode is on, and an argument requires grad.  Weights that do are taken as constants, with one warning.

    Notes
    -----
    Index tensors may have more rows than the batch, as buffers of CUDA graphs do: the first ones count.

    Prefix caching saves the state after every block or chunk in the slot named by the block's column of
    ``cache_indices``: the last one in column ``block_idx_last_scheduled_token``, another in the column of the block
    that its last token is in.  Positions count from ``block_idx_first_scheduled_token`` blocks; if the first of several
    chunks is shorter than a block, it is taken to complete one.

    On a GPU the kernel is launched as a programmatic dependent: it may start while the kernel before it on the stream
    still runs, waits for its end before it reads or writes anything, and lets the next kernel start at once.  A next
    kernel that is launched so has to wait likewise (``griddepcontrol.wait``) before it uses what this one reads or
    writes.

    The recurrence is that of Gu and Dao, "Mamba" (2023); the conventions of slots and blocks are those of vLLM.
    Where channels do not fill the GPU, long sequences are scanned in parts at once, by two launches, with scratch of
    about 4 (dstate + 4) bytes per part and channel.  The number of parts is chosen by batch, dim, dstate, tokens and
    GPU; ``cute_ssm.tuning.override(splits=1)`` keeps sequences whole.  For a number of parts, a sequence's result does
    not depend on the other sequences of the call, bit for bit, and is the same in every run; whole, one call gives the
    bits of several that carry a float32 state.
    """
    tensors = _Tensors(
        u, ssm_states, delta, A, B, C, D, z, delta_bias, query_start_loc, cache_indices, has_initial_state,
        block_idx_first_scheduled_token, block_idx_last_scheduled_token, initial_state_idx, cu_chunk_seqlen,
        last_chunk_indices,
    )  # fmt: skip
    if not isinstance(u, Tensor):
        raise TypeError(describe("u", "a torch.Tensor", type(u).__name__))
    if out is None:
        partial = query_start_loc is not None or cache_indices is not None
        allocate = torch.zeros_like if partial else torch.empty_like
        out = allocate(u, memory_format=torch.contiguous_format)
    if type(u) is not Tensor or torch.compiler.is_compiling():
        run = _overload
    else:
        run = _eager if is_grad_enabled() or transform_level() is not None else _run
    run(*tensors, delta_softplus, null_block_id, block_size, out, saturate)
    return out


def selective_scan_fn(
    u: Tensor,
    ssm_states: Tensor | None,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    query_start_loc: Tensor | None = None,
    cache_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_block_id: int = 0,
    block_size: int = 1024,
    block_idx_first_scheduled_token: Tensor | None = None,
    block_idx_last_scheduled_token: Tensor | None = None,
    initial_state_idx: Tensor | None = None,
    cu_chunk_seqlen: Tensor | None = None,
    last_chunk_indices: Tensor | None = None,
    *,
    saturate: bool = False,
) -> Tensor:
    """Run `selective_scan` in place, by vLLM's convention: the outputs replace ``delta``, and ``z`` if given.

    As there, an output, and a state that prefix caching saves, depend on no value of a later token.

    Parameters
    ----------
    u, ssm_states, A, B, C, D, delta_bias, delta_softplus, query_start_loc, cache_indices, has_initial_state, \
    null_block_id, block_size, block_idx_first_scheduled_token, block_idx_last_scheduled_token, initial_state_idx, \
    cu_chunk_seqlen, last_chunk_indices, saturate
        As for `selective_scan`; ``ssm_states`` is **updated in place**.
    delta : Tensor, (batch, dim, length) or varlen (dim, total), type of u
        Step size.  **Overwritten** by the outputs before the gate.
    z : Tensor, like delta, optional
        Gate.  **Overwritten** by the gated outputs.

    Returns
    -------
    Tensor
        ``z`` if given, else ``delta``: the tensor with the results.

    Raises
    ------
    ValueError, TypeError, UnsupportedArchError
        As for `selective_scan`.  Nothing has been written.

    Notes
    -----
    The caller's tensors receive the results whatever their strides.  Tokens of skipped sequences, and of none, stay as
    they are.  The signature follows ``selective_scan_fn`` of vLLM.
    """
    tensors = _Tensors(
        u, ssm_states, delta, A, B, C, D, z, delta_bias, query_start_loc, cache_indices, has_initial_state,
        block_idx_first_scheduled_token, block_idx_last_scheduled_token, initial_state_idx, cu_chunk_seqlen,
        last_chunk_indices,
    )  # fmt: skip
    if type(u) is not Tensor or torch.compiler.is_compiling():
        run = _overload_in_place
    else:
        run = _eager_in_place if is_grad_enabled() or transform_level() is not None else _run_in_place
    if not isinstance(u, Tensor):
        raise TypeError(describe("u", "a torch.Tensor", type(u).__name__))
    run(*tensors, delta_softplus, null_block_id, block_size, saturate)
    return delta if z is None else z


class _Flags(NamedTuple):
    delta_softplus: bool
    saturate: bool = False


# Steady state: everything a kernel is chosen by, but for strides and alignment.  Those, and the equality of sizes and
# types, the kernel's own entry checks before it launches; if it refuses, the arguments are examined one by one.  One
# for aligned arguments is tried first; one for any would take all, slowly, and is remembered with its call's layout.
class _Plan(NamedTuple):
    """A kernel, the most CTAs of its grid, and the shape of what it needs to hand states on from part to part."""

    kernel: Callable[..., None]
    max_ctas: int
    carried: tuple[int, ...] | None = None

    def run(self, args: tuple[Any, ...], null_block_id: int, block_size: int, sequences: int) -> None:
        """Launch on canonical arguments."""
        carried = None
        if self.carried is not None:
            carried = torch.empty(self.carried, dtype=torch.float32, device=args[0].device)
        self.kernel(*args, carried, null_block_id, block_size, sequences, self.max_ctas)


_path = CallPath()
_COUNT = len(_Tensors._fields)


def _run(*args: Any) -> None:
    """Run on the arguments of the operator ``cute_ssm::selective_scan``."""
    tensors, (softplus, null_block_id, block_size, out, *saturate) = _Tensors._make(args[:_COUNT]), args[_COUNT:]
    _scan(tensors, _Flags(softplus, *saturate), null_block_id, block_size, out, None)


def _run_in_place(*args: Any) -> None:
    """Run on the arguments of the operator ``cute_ssm::selective_scan_fn``."""
    tensors, (softplus, null_block_id, block_size, *saturate) = _Tensors._make(args[:_COUNT]), args[_COUNT:]
    flags = _Flags(softplus, *saturate)
    if tensors.z is None:
        _scan(tensors, flags, null_block_id, block_size, tensors.delta, None, "delta")
    else:
        _scan(tensors, flags, null_block_id, block_size, tensors.z, tensors.delta, "z", "delta")


def _scan(
    tensors: _Tensors,
    flags: _Flags,
    null_block_id: int,
    block_size: int,
    out: Tensor,
    ungated: Tensor | None,
    out_name: str = "out",
    ungated_name: str = "ungated",
) -> None:
    """Scan into `out`, and into `ungated` what the gate has not seen; the names are those of errors."""
    tensors = of_batch(tensors)
    key = _key(tensors, flags, block_size, out, ungated)
    for plans in (_path.plans, _path.loose_plans):
        plan = plans.get((key, layout(tensors, out, ungated)) if plans and plans is _path.loose_plans else key)
        if plan is not None and not overridden():
            try:
                plan.run(_canonical(tensors, out, ungated), null_block_id, block_size, _sequences(tensors))
                return
            except REFUSALS:
                pass  # other strides or alignment than last time, or a bad argument: the checks below tell
    outputs = {out_name: out, ungated_name: ungated}
    check(tensors._asdict(), outputs, null_block_id, block_size, flags.saturate)
    copies = unit_strides({**tensors._asdict(), "out": out, "ungated": ungated})
    if copies:
        given = _Tensors._make(copies.get(id(t), t) for t in tensors)
        new_out, new_ungated = copies.get(id(out), out), None if ungated is None else copies.get(id(ungated), ungated)
        _scan(given, flags, null_block_id, block_size, new_out, new_ungated, out_name, ungated_name)
        for target, source in ((out, new_out), (ungated, new_ungated)):
            if target is not None and source is not None and target is not source:
                target.copy_(source)
        return
    args = _canonical(tensors, out, ungated)
    spec = _spec(args, flags)
    sequences, u = _sequences(tensors), args[0]
    if not u.is_cuda:
        _run_on_cpu(spec, args, null_block_id, block_size, sequences)
    elif u.numel() and sequences:
        sm_count = torch.cuda.get_device_properties(u.device).multi_processor_count
        plan = _plan(spec, args, sequences, runtime.target(u.device), sm_count, runtime.get)
        if spec.aligned and (spec.aligned_states or spec.dstate % tuning.QUAD):
            _path.plans.remember(key, plan)
        else:
            _path.loose_plans.remember(key and (key, layout(tensors, out, ungated)), plan)
        plan.run(args, null_block_id, block_size, sequences)


def _plan(
    spec: SelectiveScanSpec, args: tuple[Any, ...], sequences: int, arch: Arch, sm_count: int, get: Callable[..., Any]
) -> _Plan:
    """How to run canonical arguments; `get` finds kernels."""
    u, B = args[0], args[4]
    dim, tokens = u.shape[1], u.shape[0] * u.shape[2]
    config = tuning.choose(spec, arch, sequences * dim, dim // B.shape[1], tokens // sequences, sm_count)
    carried = (sequences, config.splits, dim, tuning.carried_columns(spec)) if config.splits > 1 else None
    return _Plan(get(spec, config, arch), sm_count * config.ctas_per_sm, carried)


def _key(
    tensors: _Tensors, flags: _Flags, block_size: int, out: Tensor, ungated: Tensor | None
) -> tuple[object, ...] | None:
    u, states, starts = tensors.u, tensors.ssm_states, tensors.query_start_loc
    try:
        sequences = u.shape[0] if starts is None else starts.shape[0] - 1
        enough = tensors.cache_indices is not None or states is None or states.shape[0] >= sequences
    except (AttributeError, IndexError):  # something is no tensor, or has no axes, which the checks will name
        return None
    return (
        enough, block_size > 0,
        u.shape, u.dtype, u.device, flags, getattr(out, "dtype", None), ungated is None,
        *[getattr(t, "dtype", None) for t in tensors[1:]],
        *[getattr(t, "shape", None) for t in (tensors.B, starts, tensors.cache_indices, tensors.has_initial_state)],
    )  # fmt: skip


def _sequences(tensors: _Tensors) -> int:
    starts = tensors.query_start_loc
    return tensors.u.shape[0] if starts is None else starts.shape[0] - 1


def _canonical(tensors: _Tensors, out: Tensor, ungated: Tensor | None) -> tuple[Any, ...]:
    """The arguments of the kernel: packed tensors with an axis of 1 in front, projections with one of groups."""
    varlen = tensors.query_start_loc is not None

    def channels(tensor: Tensor | None) -> Tensor | None:
        return tensor.unsqueeze(0) if varlen and tensor is not None else tensor

    def columns(tensor: Tensor) -> Tensor:
        if tensor.dim() == (2 if varlen else 3):
            tensor = tensor.unsqueeze(-3)
        return tensor.unsqueeze(0) if varlen else tensor

    cache, initial = tensors.cache_indices, tensors.has_initial_state
    if cache is not None and cache.dim() == 2 and tensors.block_idx_first_scheduled_token is None:
        cache = cache[:, 0]
    return (
        channels(tensors.u), tensors.ssm_states, channels(tensors.delta), tensors.A, columns(tensors.B),
        columns(tensors.C), tensors.D, channels(tensors.z), tensors.delta_bias, tensors.query_start_loc, cache,
        None if initial is None else initial.view(torch.uint8), *tensors[12:],
        channels(out), channels(ungated),
    )  # fmt: skip


def _spec(args: tuple[Any, ...], flags: _Flags) -> SelectiveScanSpec:
    """The spec of canonical arguments."""
    u, states, delta, A, B, C, D, z, bias, starts, cache, initial, first, _, _, ends, _, out, ungated = args

    def name_of(tensor: Tensor | None) -> str | None:
        return None if tensor is None else arguments.DTYPE_NAMES[tensor.dtype]

    dstate = A.shape[1]
    quad = all(aligned(t, tuning.QUAD * t.element_size()) for t in (A, states) if t is not None)
    return SelectiveScanSpec(
        input_dtype=arguments.DTYPE_NAMES[u.dtype],
        state_dtype=name_of(states),
        dstate=dstate,
        has_D=D is not None,
        has_z=z is not None,
        has_bias=bias is not None,
        delta_softplus=bool(flags.delta_softplus),
        query_dtype=name_of(starts),
        cache_dtype=name_of(cache),
        has_initial=initial is not None,
        blocks=first is not None,
        chunks=ends is not None,
        ungated=ungated is not None,
        aligned=all(aligned(t, ACCESS_BYTES) for t in (u, delta, B, C, z, out, ungated)),
        aligned_states=quad and dstate % tuning.QUAD == 0,
        saturate=flags.saturate,
    )


def _run_on_cpu(
    spec: SelectiveScanSpec, args: tuple[Any, ...], null_block_id: int, block_size: int, sequences: int
) -> None:
    """Run the compiled kernel if an emulator is open, else the reference."""
    u, states = args[:2]
    slots = None if states is None else states.shape[0]
    segments = plan_on_cpu(Metadata(*args[9:17]), sequences, u.shape[2], slots, null_block_id, block_size)
    emulator = runtime.emulator()
    if emulator is None:
        runtime.by_reference(spec, args)
        _reference(args, spec, segments)
    elif u.numel() and sequences:
        arch = archs.by_name(emulator.arch)
        plan = _plan(spec, args, sequences, arch, emulator.sm_count or arch.sm_count, runtime.emulated)
        plan.run(args, null_block_id, block_size, sequences)


def _reference(args: tuple[Any, ...], spec: SelectiveScanSpec, segments: list[Any]) -> None:
    """Scan the sequences one by one: what the kernel does, by PyTorch."""
    u, states, delta, A, B, C, D, z, bias = args[:9]
    out, ungated = args[17:]
    softplus = spec.delta_softplus
    for sequence in segments:
        state = None if sequence.source is None else states[sequence.source][None]
        begin, row = sequence.begin, slice(sequence.row, sequence.row + 1)
        for stop, target in sequence.ends:
            part = (row, ..., slice(begin, stop))
            y, gated, state = reference(
                u[part], delta[part], A, B[part], C[part], D, None if z is None else z[part], bias, softplus, state
            )
            if ungated is not None:
                ungated[part] = y.to(ungated.dtype)
            out[part] = gated.to(out.dtype)
            if target is not None:
                states[target] = (saturated(state[0]) if spec.saturate else state[0]).to(states.dtype)
            begin = stop


_INPUTS = (
    "Tensor A, Tensor B, Tensor C, Tensor? D, Tensor{z}? z, Tensor? delta_bias, Tensor? query_start_loc, "
    "Tensor? cache_indices, Tensor? has_initial_state, Tensor? block_idx_first_scheduled_token, "
    "Tensor? block_idx_last_scheduled_token, Tensor? initial_state_idx, Tensor? cu_chunk_seqlen, "
    "Tensor? last_chunk_indices, bool delta_softplus, int null_block_id, int block_size"
)
_eager, _overload, _ = _library.register(
    f"selective_scan(Tensor u, Tensor(a!)? ssm_states, Tensor delta, {_INPUTS.format(z='')}, Tensor(b!) out, "
    "bool saturate=False) -> ()",
    _run,
    lambda *_: None,
)
_eager_in_place, _overload_in_place, _ = _library.register(
    f"selective_scan_fn(Tensor u, Tensor(a!)? ssm_states, Tensor(b!) delta, {_INPUTS.format(z='(c!)')}, "
    "bool saturate=False) -> ()",
    _run_in_place,
    lambda *_: None,
)
