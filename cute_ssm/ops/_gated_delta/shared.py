"""`SharedLayout`: a CTA's shared memory, with keys, values, and the tables of each chunk of tokens."""

from typing import NamedTuple, Optional

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.memory import SmemAllocator

from cute_ssm.ops._gated_delta.layout import KEY_PAD, PART_BYTES, PENDING_CHUNK, VALUE_PAD, part_bytes, table_bytes
from cute_ssm.ops._gated_delta.spec import Sizes


class Tables(NamedTuple):
    """Tables of float32 that `TokenChunk.prepare` fills; all but `vectors` have rows of ``tokens + 4`` floats.

    The notation is that of `TokenChunk`.

    Attributes
    ----------
    weights : Pointer
        Row t + 1: D_t kappa of each token in the state after token t, and in column ``tokens`` gamma_t.
    solve : Pointer
        L, below the diagonal.
    mix : Pointer or None
        A.  None: the chunk has no queries.
    solution : Pointer
        (1 + L)^-1 diag(beta).  With 4 tokens, A times it follows.
    vectors : Pointer
        gamma kappa of all tokens, then gamma rho.
    """

    weights: cute.Pointer
    solve: cute.Pointer
    mix: Optional[cute.Pointer]
    solution: cute.Pointer
    vectors: cute.Pointer


class ChunkMemory(NamedTuple):
    """Shared memory of one chunk: keys (queries follow) as float32, values as they came, and tables."""

    keys: cute.Pointer
    values: cute.Pointer
    tables: Tables


class SharedMemory(NamedTuple):
    """A CTA's shared memory.

    Attributes
    ----------
    keys, values : Pointer
        Rows of pending tokens, then of new ones.
    pending : Pointer or None
        Tables of the chunks of pending tokens.
    tables : Tables
        Those of the new tokens.
    """

    keys: cute.Pointer
    values: cute.Pointer
    pending: Optional[cute.Pointer]
    tables: Tables


class SharedLayout:
    """The shared memory of a CTA that works on `rows` rows of a state."""

    def __init__(self, sizes: Sizes, rows: int) -> None:
        self.sizes, self.rows = sizes, rows
        self.key_pitch = sizes.K + KEY_PAD
        self.value_pitch = rows + VALUE_PAD

    def allocate(self) -> SharedMemory:
        """Allocate all parts."""
        smem = SmemAllocator()
        parts = {
            name: smem.allocate(n_bytes, PART_BYTES) for name, n_bytes in part_bytes(self.sizes, self.rows).items()
        }
        floats = {name: cute.recast_ptr(p, dtype=Float32) for name, p in parts.items() if name != "values"}
        tables = Tables(**{name: floats[name] for name in Tables._fields})
        return SharedMemory(floats["keys"], parts["values"], floats.get("pending"), tables)

    def new_chunk(self, shared: SharedMemory) -> ChunkMemory:
        """Return the memory of the new tokens."""
        pending = self.sizes.pending_tokens
        keys = shared.keys + pending * self.key_pitch
        return ChunkMemory(keys, shared.values + pending * self.value_pitch * 2, shared.tables)

    def pending_chunk(self, shared: SharedMemory, index: Int32) -> ChunkMemory:
        """Return the memory of chunk `index` of the pending tokens."""
        sizes = table_bytes(PENDING_CHUNK, queries=False)
        keys = shared.keys + index * (PENDING_CHUNK * self.key_pitch)
        values = shared.values + index * (PENDING_CHUNK * self.value_pitch * 2)
        offset = index * (sum(sizes.values()) // 4)
        tables: dict[str, cute.Pointer] = {}
        for name, n_bytes in sizes.items():
            tables[name] = shared.pending + offset
            offset += n_bytes // 4
        return ChunkMemory(keys, values, Tables(mix=None, **tables))
