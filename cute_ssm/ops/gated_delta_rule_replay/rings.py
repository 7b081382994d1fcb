"""`RingWriter`: appends new tokens to the rings.

New keys, values and gates follow the pending tokens, in rows that no CTA of the launch reads: a ring has room for the
window and for them.  Values are appended by the CTA of their rows, gates by the CTA with the first rows of a value
head, keys by that of the first value head that uses them.
"""

from collections.abc import Callable
from typing import Any

import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from cute_ssm.device import memory
from cute_ssm.ops._gated_delta.pending import Pending, Rings, ring_row
from cute_ssm.ops._gated_delta.units import Unit

Address = Callable[[Any, Any], cute.Pointer]  # of (token, column)


class RingWriter:
    """Stores of up to `tokens` new tokens, with keys of `K` and parts of values of `rows` elements, by a CTA."""

    def __init__(self, tokens: int, K: int, rows: int, threads: int, input_bytes: int) -> None:
        self.tokens, self.K, self.rows = tokens, K, rows
        self.threads, self.input_bytes = threads, input_bytes

    def append(
        self, k: cute.Tensor, v: cute.Tensor, rings: Rings, unit: Unit, pending: Pending, count: Int32, thread: Int32
    ) -> None:
        """Append the unit's share of `count` keys and values."""
        i, h, key_head, first = unit.request, unit.head, unit.key_head, unit.first_row
        start, accepted, length = pending

        def row(t: Int32) -> Int32:
            return ring_row(ring_row(start + (accepted + t), length), length)

        self._append(
            lambda t, c: memory.address(v, i, t, h, first + c),
            lambda t, c: memory.address(rings.v_cache, unit.slot, h, row(t), first + c),
            self.rows, 8, count, thread,
        )  # fmt: skip
        self._append(
            lambda t, c: memory.address(k, i, t, key_head, c),
            lambda t, c: memory.address(rings.k_cache, unit.slot, key_head, row(t), c),
            self.K, 4, self._if_first(count, unit), thread,
        )  # fmt: skip

    @cute.jit
    def _if_first(self, count: Int32, unit: Unit) -> Int32:
        """Return `count` in the CTA with the first rows of the first value head of a key head, otherwise 0."""
        return count if unit.head_in_group == 0 and unit.first_row == 0 else Int32(0)

    def _append(self, source: Address, target: Address, columns: int, step: int, count: Int32, thread: Int32) -> None:
        """Copy `columns` columns of `count` tokens, `step` elements at a time."""
        per_row = columns // step
        for turn in range(-(-self.tokens * per_row // self.threads)):
            piece = thread + turn * self.threads
            row, column = piece // per_row, piece % per_row * step
            self._copy(source(row, column), target(row, column), step, row < count)

    @cute.jit
    def _copy(self, source: cute.Pointer, target: cute.Pointer, count: int, active: Boolean) -> None:
        """Copy `count` elements."""
        if active:
            memory.store_words(target, memory.load_packed(source, count // 2, self.input_bytes))

    @cute.jit
    def append_gates(self, rings: Rings, unit: Unit, pending: Pending, token: Int32, g: Float32, beta: Float32) -> None:
        """Append the logarithm of the decay and the step of a token, in the CTA with the first rows of the head."""
        if unit.first_row == 0:
            row = ring_row(ring_row(pending.start + pending.count, pending.length) + token, pending.length)
            memory.store_scalar(memory.address(rings.g_cache, unit.slot, unit.head, row), g, Float32)
            memory.store_scalar(memory.address(rings.beta_cache, unit.slot, unit.head, row), beta, Float32)
