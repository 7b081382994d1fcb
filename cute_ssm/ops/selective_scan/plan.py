"""The sequences of a call: views of its tensors, and on the CPU their tokens and slots from the index tensors."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops._arguments import first_rows

if TYPE_CHECKING:
    from cute_ssm.ops.selective_scan.arguments import Arguments


class Metadata(NamedTuple):
    """The index tensors of a scan."""

    query_start_loc: Tensor | None
    cache_indices: Tensor | None
    has_initial_state: Tensor | None
    block_idx_first_scheduled_token: Tensor | None
    block_idx_last_scheduled_token: Tensor | None
    initial_state_idx: Tensor | None
    cu_chunk_seqlen: Tensor | None
    last_chunk_indices: Tensor | None


class Sequence(NamedTuple):
    """A sequence that is not skipped: its first token, and where each segment ends and saves its state."""

    row: int
    begin: int
    source: int | None
    ends: list[tuple[int, int | None]]


PER_SEQUENCE = (
    "cache_indices", "has_initial_state", "block_idx_first_scheduled_token", "block_idx_last_scheduled_token",
    "initial_state_idx", "last_chunk_indices",
)  # fmt: skip


def unit_strides(call: Arguments, ungated: Tensor | None) -> dict[int, Tensor]:
    """Return contiguous copies, by identity, of the tensors with tokens whose last stride is not 1."""
    copies: dict[int, Tensor] = {}
    for tensor in (call.u, call.delta, call.B, call.C, call.z, call.out, ungated):
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            copies.setdefault(id(tensor), tensor.contiguous())
    return copies


def of_batch(call: Arguments) -> Arguments:
    """Return the same call with the first rows of tensors that have more rows than there are sequences."""
    counted = call.u if call.query_start_loc is None else call.query_start_loc
    if not isinstance(counted, Tensor) or not counted.dim():
        return call
    batch = counted.shape[0] - (counted is call.query_start_loc)
    for tensor in (
        call.cache_indices, call.has_initial_state, call.block_idx_first_scheduled_token,
        call.block_idx_last_scheduled_token, call.initial_state_idx, call.last_chunk_indices,
    ):  # fmt: skip
        if isinstance(tensor, Tensor) and (shape := tensor.shape) and shape[0] > batch:
            named = ((name, getattr(call, name)) for name in PER_SEQUENCE)
            return call._replace(**{name: first_rows(batch, tensor)[0] for name, tensor in named})
    return call


def num_sequences(call: Arguments) -> int:
    """Return the number of sequences."""
    return call.u.shape[0] if call.query_start_loc is None else call.query_start_loc.shape[0] - 1


def channel_rows(call: Arguments, tensor: Tensor) -> Tensor:
    """Return a tensor of channels as (batch, dim, length), or (1, dim, total) if it is packed."""
    return tensor if call.query_start_loc is None else tensor.unsqueeze(0)


def column_rows(call: Arguments, tensor: Tensor) -> Tensor:
    """Return B or C as (batch, ngroups, dstate, length), or (1, ngroups, dstate, total) if it is packed."""
    varlen = call.query_start_loc is not None
    if tensor.dim() == (2 if varlen else 3):
        tensor = tensor.unsqueeze(-3)
    return tensor.unsqueeze(0) if varlen else tensor


def slots_or_blocks(call: Arguments) -> Tensor | None:
    """Return ``cache_indices`` as the kernel reads it: without prefix caching, column 0 of a matrix."""
    cache = call.cache_indices
    matrix = cache is not None and cache.dim() == 2 and call.block_idx_first_scheduled_token is None
    return cache[:, 0] if cache is not None and matrix else cache


def metadata_of(call: Arguments) -> Metadata:
    """Return the index tensors of a call."""
    return Metadata(
        call.query_start_loc, slots_or_blocks(call), call.has_initial_state, call.block_idx_first_scheduled_token,
        call.block_idx_last_scheduled_token, call.initial_state_idx, call.cu_chunk_seqlen, call.last_chunk_indices,
    )  # fmt: skip


def plan_on_cpu(
    metadata: Metadata, sequences: int, length: int, slots: int | None, null_block_id: int, block_size: int
) -> list[Sequence]:
    """Return the sequences to scan; raise if an index is out of range, before anything is written.

    Parameters
    ----------
    metadata : Metadata
        With ``cache_indices`` as the kernel reads it.
    sequences, length : int
        Number of sequences; tokens of a row.
    slots : int or None
        Slots of the pool.  None: there are no states.
    """
    lists = Metadata(*(None if t is None else t.tolist() for t in metadata))  # type: ignore[arg-type]
    starts: list[int] = lists.query_start_loc  # type: ignore[assignment]
    if starts is not None:
        ordered = all(a <= b for a, b in pairwise(starts))
        if starts[0] != 0 or starts[-1] > length or not ordered:
            expected = f"ascending offsets from 0 to at most total = {length}"
            raise ValueError(describe("query_start_loc", expected, starts))
    plan = []
    for b in range(sequences):
        row, begin, end = (b, 0, length) if starts is None else (0, starts[b], starts[b + 1])
        slot = b
        if lists.cache_indices is not None:
            column: int = 0 if lists.initial_state_idx is None else lists.initial_state_idx[b]  # type: ignore
            slot = _slot(lists, b, column, "initial_state_idx", slots, null_block_id)
            if slot == null_block_id:
                continue
        source = slot if lists.has_initial_state is not None and lists.has_initial_state[b] else None
        if lists.block_idx_first_scheduled_token is None:
            ends = [(end, slot if slots is not None else None)] if end > begin else []
        else:
            ends = _ends(lists, b, begin, end, slots, null_block_id, block_size)
        plan.append(Sequence(row, begin, source, ends))
    return plan


def _slot(lists: Metadata, b: int, column: int, name: str, slots: int | None, null_block_id: int) -> int:
    """Return the slot in a column of a sequence's blocks, or its only slot; `name` is the argument with the column."""
    entry = lists.cache_indices[b]  # type: ignore[index]
    if isinstance(entry, list):
        if not 0 <= column < len(entry):
            expected = f"columns in [0, {len(entry)}) of cache_indices"
            raise ValueError(describe(name, expected, f"{column} at position {b}"))
        entry = entry[column]
    slot: int = entry  # type: ignore[assignment]
    if slots is not None and not 0 <= slot < slots and slot != null_block_id:
        expected = f"slots in [0, {slots}) or null_block_id = {null_block_id}"
        raise ValueError(describe("cache_indices", expected, f"{slot} at position {b}"))
    return slot


def _ends(
    lists: Metadata, b: int, begin: int, end: int, slots: int | None, null_block_id: int, block_size: int
) -> list[tuple[int, int | None]]:
    """Return the ends of a sequence's blocks or chunks, each with the slot that its state is saved in, or None."""
    first_block: int = lists.block_idx_first_scheduled_token[b]  # type: ignore
    last_block: int = lists.block_idx_last_scheduled_token[b]  # type: ignore
    if lists.cu_chunk_seqlen is None:
        sizes = [min(block_size, end - at) for at in range(begin, end, block_size)]
    else:
        offsets: list[int] = lists.cu_chunk_seqlen  # type: ignore[assignment]
        lasts: list[int] = lists.last_chunk_indices  # type: ignore[assignment]
        first = lasts[b - 1] + 1 if b else 0
        if not 0 <= first <= lasts[b] + 1 <= len(offsets) - 1:
            expected = f"ascending chunks in [0, {len(offsets) - 1})"
            raise ValueError(describe("last_chunk_indices", expected, f"{lasts[b]} at position {b}"))
        sizes = [offsets[i + 1] - offsets[i] for i in range(first, lasts[b] + 1)]
        if sum(sizes) != end - begin or min(sizes, default=1) < 1:
            expected = f"chunks of {end - begin} tokens for sequence {b}, none empty"
            raise ValueError(describe("cu_chunk_seqlen", expected, f"chunks of {sizes}"))
    if sizes:
        _slot(lists, b, first_block, "block_idx_first_scheduled_token", None, null_block_id)
    position = first_block * block_size
    if len(sizes) > 1 and sizes[0] < block_size:
        position += block_size - sizes[0]
    found: list[tuple[int, int | None]] = []
    for i, size in enumerate(sizes):
        begin += size
        position += size
        last = i + 1 == len(sizes)
        column, name = (last_block, "block_idx_last_scheduled_token") if last else (
            (position - 1) // block_size, "block_idx_first_scheduled_token"
        )  # fmt: skip
        slot = _slot(lists, b, column, name, slots, null_block_id)
        found.append((begin, None if slot == null_block_id else slot))
    return found
