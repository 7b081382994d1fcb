"""What the metadata of a scan say, read on the CPU: which tokens, from which slot, to which slots."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops._arguments import first_rows


class Metadata(NamedTuple):
    """The index tensors of a scan, in the order of the kernel's arguments."""

    query_start_loc: Tensor | None
    cache_indices: Tensor | None
    has_initial_state: Tensor | None
    block_idx_first_scheduled_token: Tensor | None
    block_idx_last_scheduled_token: Tensor | None
    initial_state_idx: Tensor | None
    cu_chunk_seqlen: Tensor | None
    last_chunk_indices: Tensor | None


class Tensors(NamedTuple):
    """The tensors of a call but its outputs, in the order of the signatures."""

    u: Tensor
    ssm_states: Tensor | None
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    query_start_loc: Tensor | None
    cache_indices: Tensor | None
    has_initial_state: Tensor | None
    block_idx_first_scheduled_token: Tensor | None
    block_idx_last_scheduled_token: Tensor | None
    initial_state_idx: Tensor | None
    cu_chunk_seqlen: Tensor | None
    last_chunk_indices: Tensor | None


class Sequence(NamedTuple):
    """One sequence that is not null: tokens from ``begin``, and where each segment ends and saves its state."""

    row: int
    begin: int
    source: int | None
    ends: list[tuple[int, int | None]]


QUERY_START_LOC = 9  # its place among the arguments of a scan, of which Metadata are the last
ACCESS_BYTES = 16  # widest access to a row
PER_SEQUENCE = (
    "cache_indices", "has_initial_state", "block_idx_first_scheduled_token", "block_idx_last_scheduled_token",
    "initial_state_idx", "last_chunk_indices",
)  # fmt: skip


def aligned(tensor: Tensor | None, n_bytes: int) -> bool:
    """Whether the address and the strides that matter, but for the last, are multiples of `n_bytes`."""
    if tensor is None:
        return True
    outer = zip(tensor.shape[:-1], tensor.stride()[:-1])
    size = tensor.element_size()
    return tensor.data_ptr() % n_bytes == 0 and all(n == 1 or s * size % n_bytes == 0 for n, s in outer)


def layout(tensors: Tensors, out: Any, ungated: Any) -> tuple[object, ...]:
    """What alignment depends on: a kernel for rows at any address would take aligned ones too, slowly."""
    named = (getattr(tensors, name) for name in ("u", "delta", "B", "C", "z", "A", "ssm_states"))
    given = [tensor for tensor in (*named, out, ungated) if isinstance(tensor, Tensor)]
    return tuple((tensor.stride(), tensor.data_ptr() % ACCESS_BYTES) for tensor in given)


def unit_strides(named: dict[str, Tensor | None]) -> dict[int, Tensor]:
    """Contiguous copies, by identity, of the tensors with tokens whose last stride is not 1."""
    copies: dict[int, Tensor] = {}
    for name in ("u", "delta", "B", "C", "z", "out", "ungated"):
        tensor = named[name]
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            copies.setdefault(id(tensor), tensor.contiguous())
    return copies


def of_batch(tensors: Tensors) -> Tensors:
    """The same named tuple of tensors, of those with a row for each sequence the first rows."""
    counted = tensors.u if tensors.query_start_loc is None else tensors.query_start_loc
    if not isinstance(counted, Tensor) or not counted.dim():
        return tensors
    batch = counted.shape[0] - (counted is tensors.query_start_loc)
    _, cache, initial, first, last, column, _, chunk = tensors[QUERY_START_LOC:]
    for tensor in (cache, initial, first, last, column, chunk):
        if isinstance(tensor, Tensor) and (shape := tensor.shape) and shape[0] > batch:
            named = ((name, getattr(tensors, name)) for name in PER_SEQUENCE)
            return tensors._replace(**{name: first_rows(batch, tensor)[0] for name, tensor in named})
    return tensors


def plan_on_cpu(
    metadata: Metadata, sequences: int, length: int, slots: int | None, null_block_id: int, block_size: int
) -> list[Sequence]:
    """Return the sequences to scan; raise if an index leads outside, before anything is written.

    Parameters
    ----------
    metadata : Metadata
        As the kernel gets them.
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
    """The slot in a column of a sequence's blocks, or its only one; `name` is the argument that names the column."""
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
    """Ends of a sequence's blocks or chunks, each with the slot that its state goes to, or None."""
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
