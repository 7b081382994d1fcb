"""Sizes of tiles and chunks, and the layout of shared memory in the kernels of the gated delta rule."""

from __future__ import annotations

from cute_ssm.ops._gated_delta.spec import Sizes

TILE = 16  # rows of the state that a warp works on at a time
BLOCK = 16  # columns of a tile of which each lane holds four, in two rows
PENDING_CHUNK = 8  # pending tokens that are folded into the state at once
KEY_PAD = 8  # floats between rows of keys in shared memory: no access to them has bank conflicts
VALUE_PAD = 8  # elements between rows of values
PART_BYTES = 128  # alignment of each part of shared memory


def chunk_tokens(tokens: int) -> int:
    """Return the number of tokens of the chunk for `tokens` new ones: at least four."""
    return max(tokens, 4)


def zeros_offset(tokens: int, K: int) -> int:
    """Return the offset of a row of zeros after keys and queries, in floats: on the banks of row 3.

    Row 3 is absent whenever zeros are read in place of any row.
    """
    return 2 * tokens * (K + KEY_PAD) + 3 * KEY_PAD


def part_bytes(sizes: Sizes, rows: int) -> dict[str, int]:
    """Return the parts of shared memory, in their order, for a CTA that works on `rows` rows of a state.

    Keys and queries, values, the tables of pending chunks, and those of the new tokens.  Pending tokens precede new
    ones; a row of zeros follows the keys if ``sizes.zero_row``.
    """
    tokens, pending = chunk_tokens(sizes.tokens), sizes.pending_tokens
    key_pitch = sizes.K + KEY_PAD
    tables = sum(table_bytes(PENDING_CHUNK, queries=False).values())
    zeros = zeros_offset(tokens, sizes.K) + sizes.K - 2 * tokens * key_pitch if sizes.zero_row else 0
    return {
        "keys": ((pending + 2 * tokens) * key_pitch + zeros) * 4,
        "values": (pending + max(tokens, 8)) * (rows + VALUE_PAD) * 2,
        **({"pending": pending // PENDING_CHUNK * tables} if pending else {}),
        **table_bytes(tokens),
    }


def table_bytes(tokens: int, queries: bool = True) -> dict[str, int]:
    """Return the sizes of a chunk's tables, in their order."""
    table = tokens * (tokens + 4) * 4
    return {
        "weights": table + (tokens + 4) * 4,  # of tokens in the state after each token, and before the first
        "solve": table,
        **({"mix": table} if queries else {}),
        "solution": 2 * table if tokens == 4 else table,  # with 4 tokens, the coefficients of outputs follow
        "vectors": 2 * tokens * 4,
    }
