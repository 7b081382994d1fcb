"""`selective_scan` and `selective_scan_fn`: the recurrence of Mamba-1 over all tokens of a batch of sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cute_ssm.arch import Arch
from cute_ssm.ops import _library
from cute_ssm.ops._calls import CallPath, Checked, Plan
from cute_ssm.ops._dlpack import NotTensorError, again, not_tensor
from cute_ssm.ops._table import Table
from cute_ssm.ops.selective_scan import arguments, config, reference
from cute_ssm.ops.selective_scan.arguments import IN_PLACE, TABLE, Arguments
from cute_ssm.ops.selective_scan.plan import (
    column_rows,
    metadata_of,
    num_sequences,
    of_batch,
    plan_on_cpu,
    slots_or_blocks,
    unit_strides,
)


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

    For every (sequence, channel), with the states h [dstate] in float32, each token computes::

        delta' = softplus(delta + delta_bias);  h <- exp(A delta') h + (delta' u) B;  out = (h . C + D u) silu(z)

    Sequences have the same length (*dense*), or are packed one after another (*varlen*, with ``query_start_loc``).
    Tensors on a GPU run the compiled kernel; tensors on the CPU run the PyTorch reference, or the same compiled kernel
    inside ``ptxsim.emulate()``.

    An output, and a state that prefix caching saves, do not depend on any value of a later token: they have the same
    bits if u, delta, B, C or z of later tokens hold NaN or infinities.

    Parameters
    ----------
    u : Tensor, (batch, dim, length) or varlen (dim, total), float32/bfloat16/float16
        Input.  If the last dimension of u, delta, B, C, z or out has a stride other than 1, the operator copies it.
    ssm_states : Tensor, (slots, dim, dstate), type of u or float32, or None
        Pool of states, **updated in place**: the final state of a sequence is stored in its slot.  Stride 1 in the last
        dimension, any other strides.  None: scans start from zero, and final states are not stored.
    delta : Tensor, like u
        Step size before bias and softplus.
    A : Tensor, (dim, dstate), float32
        Decay rates, stride 1 in the last dimension; dstate is 1 to 256.
    B, C : Tensor, (batch, ngroups, dstate, length) or varlen (ngroups, dstate, total), type of u
        Input and output projections of each token; dim is a multiple of ngroups.  The axis of a single group is
        optional.
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
        Slot of each sequence: a vector, or column 0 of a matrix.  With prefix caching, a table of n blocks per
        sequence.  None: sequence b uses slot b, and no sequence is skipped.
    has_initial_state : Tensor, (batch,), bool, optional
        Sequences that start from the state in their slot; the others start from zero.  None: all start from zero.
    null_block_id : int
        A sequence whose (initial) slot is this one is skipped: its tokens of ``out`` are not written, or are zero if
        ``out`` is None.  With prefix caching, a state whose destination is this slot is not saved.
    block_size : int
        Prefix caching: number of tokens of a block, any positive number.
    block_idx_first_scheduled_token, block_idx_last_scheduled_token, initial_state_idx : Tensor, (batch,), optional
        Prefix caching: columns of ``cache_indices`` with the block of the first token, the block of the last token, and
        the initial state.  All three or none, type of cache_indices.
    cu_chunk_seqlen : Tensor, (chunks + 1,), type of cache_indices, optional
        Prefix caching: offsets of the chunks of all sequences; states are saved at the ends of chunks.  None: states
        are saved every ``block_size`` tokens.
    last_chunk_indices : Tensor, (batch,), type of cache_indices, optional
        With ``cu_chunk_seqlen``: index of each sequence's last chunk.
    out : Tensor, like u, optional
        **Written.**  It may be u, delta or z itself.  None: it is allocated, and zero where no sequence has a token.
    saturate : bool
        Store new float16 states that would round to infinities, infinite sums included, as +-65504.  NaN stays NaN.
        Must be False with states of other types.

    Returns
    -------
    Tensor
        ``out``.

    Raises
    ------
    ValueError, TypeError
        A shape, type, stride, device, size or index is not as described above.  Nothing has been written.  The host
        never reads the contents of tensors on a GPU: there, a sequence whose offsets, slot, columns or chunks are out
        of range is skipped, and a state whose destination is out of range is not saved.
    UnsupportedArchError
        The tensors are on a GPU without kernels for it.
    GradientError
        Grad mode is on, and an argument requires grad.  Weights that require grad are taken as constants, with one
        warning.

    Notes
    -----
    Index tensors may have more rows than the batch, as static buffers of CUDA graphs do; the extra rows are ignored.

    Prefix caching saves the state after every block or chunk in the slot in the block's column of ``cache_indices``:
    the last state in column ``block_idx_last_scheduled_token``, the others in the column of the block that holds their
    last token.  Positions count from ``block_idx_first_scheduled_token`` blocks; if the first of several chunks is
    shorter than a block, it is assumed to complete one.

    On a GPU the kernel uses programmatic dependent launch: it may start while the previous kernel on the stream still
    runs, waits for that kernel before it reads or writes anything, and lets the next kernel start at once.  If the next
    kernel is launched the same way, it has to wait (``griddepcontrol.wait``) before it uses what this one reads or
    writes.

    The recurrence is that of Gu and Dao, "Mamba" (2023); the conventions of slots and blocks are those of vLLM.
    If channels do not fill the GPU, long sequences are split into parts that are scanned at once, by two launches, with
    scratch memory of about 4 (dstate + 4) bytes per part and channel.  The number of parts depends on batch, dim,
    dstate, tokens and GPU; ``cute_ssm.tuning.override(splits=1)`` disables splitting.  For a given number of parts, the
    result of a sequence has the same bits in every run, whatever the other sequences of the call.  Without splitting,
    one call gives the same bits as several calls that carry a float32 state.
    """
    try:
        if not isinstance(u, Tensor):
            raise not_tensor("u", u)
        result = out
        if result is None:
            partial = query_start_loc is not None or cache_indices is not None
            allocate = torch.zeros_like if partial else torch.empty_like
            result = allocate(u, memory_format=torch.contiguous_format)
        _REGISTERED.route(u)(
            u, ssm_states, delta, A, B, C, D, z, delta_bias, query_start_loc, cache_indices, has_initial_state,
            block_idx_first_scheduled_token, block_idx_last_scheduled_token, initial_state_idx, cu_chunk_seqlen,
            last_chunk_indices, delta_softplus, null_block_id, block_size, result, saturate,
        )  # fmt: skip
        return result
    except NotTensorError:
        return again(selective_scan, locals(), *TABLE.written)


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

    As for `selective_scan`, an output, and a state that prefix caching saves, do not depend on any later token.

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
    The results are written to the tensors of the caller, whatever their strides.  Tokens of skipped sequences, and
    tokens outside of all sequences, are not written.  The signature follows ``selective_scan_fn`` of vLLM.
    """
    try:
        if not isinstance(u, Tensor):
            raise not_tensor("u", u)
        _REGISTERED_IN_PLACE.route(u)(
            u, ssm_states, delta, A, B, C, D, z, delta_bias, query_start_loc, cache_indices, has_initial_state,
            block_idx_first_scheduled_token, block_idx_last_scheduled_token, initial_state_idx, cu_chunk_seqlen,
            last_chunk_indices, delta_softplus, null_block_id, block_size, saturate,
        )  # fmt: skip
        return delta if z is None else z
    except NotTensorError:
        return again(selective_scan_fn, locals(), *IN_PLACE.written)


_rows = TABLE.getter("u", "ssm_states", "delta", "A", "B", "C", "z", "out")


def _layout(operands: tuple[Any, ...]) -> tuple[object, ...]:
    """Return the strides and the alignment that a kernel for rows at any address does not check."""
    tensors = (*_rows(operands), operands[_OUT + 1])  # the last: outputs before the gate
    return tuple([(t.stride(), t.data_ptr() % arguments.ACCESS_BYTES) for t in tensors if t is not None])


_path = CallPath(_layout)
_OUT = len(TABLE.tensors) - 1  # index of `out` in the operands; the tensors before it come first in the schema too


def _run(*args: Any) -> None:
    """Run the operator ``cute_ssm::selective_scan``."""
    _scan(TABLE, Arguments(*args), None)


def _run_in_place(
    u: Tensor,
    ssm_states: Tensor | None,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    query_start_loc: Tensor | None,
    cache_indices: Tensor | None,
    has_initial_state: Tensor | None,
    first_blocks: Tensor | None,
    last_blocks: Tensor | None,
    initial_blocks: Tensor | None,
    cu_chunk_seqlen: Tensor | None,
    last_chunk_indices: Tensor | None,
    delta_softplus: bool,
    null_block_id: int,
    block_size: int,
    saturate: bool = False,
) -> None:
    """Run the operator ``cute_ssm::selective_scan_fn``."""
    call = Arguments(
        u, ssm_states, delta, A, B, C, D, z, delta_bias, query_start_loc, cache_indices, has_initial_state,
        first_blocks, last_blocks, initial_blocks, cu_chunk_seqlen, last_chunk_indices, delta_softplus, null_block_id,
        block_size, delta if z is None else z, saturate,
    )  # fmt: skip
    _scan(IN_PLACE, call, None if z is None else delta)


def _scan(table: Table, call: Arguments, ungated: Tensor | None) -> None:
    """Scan into ``out``, and store the outputs before the gate in `ungated`."""
    call = of_batch(call)
    try:
        key, operands = _key(call, ungated), _operands(call, ungated)
    except (AttributeError, IndexError, TypeError):  # no tensor, or without axes: the checks name the argument
        key, operands = None, ()
    if key is not None and _path.run_plan(key, operands):
        return
    arguments.check(table, call)
    copies = unit_strides(call, ungated)
    if not copies:
        _path.run(key, _checked(call, ungated, operands))
        return
    new = Arguments._make(copies.get(id(value), value) for value in call)
    new_ungated = None if ungated is None else copies.get(id(ungated), ungated)
    _scan(table, new, new_ungated)
    for target, source in ((call.out, new.out), (ungated, new_ungated)):
        if target is not None and source is not None and target is not source:
            target.copy_(source)


def _key(call: Arguments, ungated: Tensor | None) -> tuple[object, ...]:
    """Return all that a kernel and its config are chosen by but strides and alignment."""
    u, states, starts = call.u, call.ssm_states, call.query_start_loc
    cache, initial = call.cache_indices, call.has_initial_state
    sequences = u.shape[0] if starts is None else starts.shape[0] - 1
    tensors: tuple[Any, ...] = call[:_OUT]
    return (
        cache is not None or states is None or states.shape[0] >= sequences, call.block_size > 0,
        u.shape, u.device, call.delta_softplus, call.saturate, call.out.dtype, ungated is None,
        *[None if t is None else t.dtype for t in tensors],
        call.B.shape, starts is None or starts.shape, cache is None or cache.shape, initial is None or initial.shape,
    )  # fmt: skip


def _operands(call: Arguments, ungated: Tensor | None) -> tuple[Any, ...]:
    """Return what the kernel takes, with all axes; scratch for parts of sequences comes with the plan."""
    u, delta, B, C, z, out = call.u, call.delta, call.B, call.C, call.z, call.out
    if call.query_start_loc is not None:
        u, delta, out = u.unsqueeze(0), delta.unsqueeze(0), out.unsqueeze(0)
        z = None if z is None else z.unsqueeze(0)
        ungated = None if ungated is None else ungated.unsqueeze(0)
    initial = call.has_initial_state
    return (
        u, call.ssm_states, delta, call.A, column_rows(call, B), column_rows(call, C), call.D, z, call.delta_bias,
        call.query_start_loc, slots_or_blocks(call), None if initial is None else initial.view(torch.uint8),
        call.block_idx_first_scheduled_token, call.block_idx_last_scheduled_token, call.initial_state_idx,
        call.cu_chunk_seqlen, call.last_chunk_indices, out, ungated, None,
        call.null_block_id, call.block_size, num_sequences(call),
    )  # fmt: skip


def _checked(call: Arguments, ungated: Tensor | None, operands: tuple[Any, ...]) -> Checked:
    """Say how a call runs whose arguments have been checked."""
    spec = arguments.spec_of(call, ungated)
    sequences, (dim, length) = num_sequences(call), call.u.shape[-2:]
    tokens = call.u.numel() // dim if dim else 0
    ngroups = column_rows(call, call.B).shape[1]

    def choose(arch: Arch, sm_count: int) -> config.SelectiveScanConfig:
        return config.choose(spec, arch, sequences * dim, dim // ngroups, tokens // sequences, sm_count)

    def bind(kernel: Callable[..., None], chosen: config.SelectiveScanConfig, sm_count: int) -> Plan:
        launch = kernel
        if chosen.splits > 1:
            launch = _with_scratch(kernel, (sequences, chosen.splits, dim, config.carried_columns(spec)))
        return Plan(launch, (sm_count * chosen.ctas_per_sm,))

    def read() -> list[Any]:
        slots = None if call.ssm_states is None else call.ssm_states.shape[0]
        return plan_on_cpu(metadata_of(call), sequences, length, slots, call.null_block_id, call.block_size)

    def check_contents() -> None:
        read()

    return Checked(
        spec,
        operands,
        units=sequences * dim if tokens else 0,
        choose=choose,
        check_contents=check_contents,
        reference=lambda: reference.scan_sequences(call, ungated, read()),
        bind=bind,
        strict=spec.aligned and (spec.aligned_states or spec.dstate % config.QUAD != 0),
    )


def _with_scratch(kernel: Callable[..., None], shape: tuple[int, ...]) -> Callable[..., None]:
    """Return a kernel that allocates what the parts of sequences carry from one to the next."""
    carried = _OUT + 2

    def launch(*operands: Any) -> None:
        scratch = torch.empty(shape, dtype=torch.float32, device=operands[0].device)
        kernel(*operands[:carried], scratch, *operands[carried + 1 :])

    return launch


_REGISTERED = _library.register(TABLE.schema("selective_scan"), _run)
_REGISTERED_IN_PLACE = _library.register(IN_PLACE.schema("selective_scan_fn"), _run_in_place)
