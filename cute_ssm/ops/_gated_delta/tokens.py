"""`TokenRows`: keys, queries and values of tokens, from global to shared memory and to registers."""

from collections.abc import Callable
from typing import Any, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Numeric

from cute_ssm.device import convert, memory, mma
from cute_ssm.device.fakes import Layout
from cute_ssm.ops._gated_delta.chunk import TokenChunk, row_of
from cute_ssm.ops._gated_delta.shared import ChunkMemory, SharedLayout
from cute_ssm.ops._gated_delta.spec import GatedDeltaSpec
from cute_ssm.ops._gated_delta.units import Unit

KEY_BYTES = 8  # of an access to aligned rows of keys
Source = Callable[[Any, Any], cute.Pointer]  # (row, column) to the address of an element


def step_dtypes(spec: GatedDeltaSpec) -> dict[str, str | None]:
    """Return the types of what all kernels of steps take."""
    return {
        "q": spec.input_dtype,
        "initial_state": spec.state_dtype,
        "initial_state_indices": spec.src_dtype,
        "a": spec.gate_dtype,
        "dt_bias": spec.dt_bias_dtype,
        "output": spec.output_dtype,
    }


def step_layouts(spec: GatedDeltaSpec) -> dict[str, Layout]:
    """Return the layouts of inputs and outputs that a kernel for `spec` requires."""
    keys = Layout((1,), min(KEY_BYTES, spec.input_bytes) // 2)
    values = Layout((1,), spec.input_bytes // 2)
    return {"q": keys, "k": keys, "v": values, "output": Layout((1,), 8 if spec.vector_output else 1)}


class TokenRows:
    """Rows of tokens whose global memory is accessed by up to `input_bytes` at a time."""

    def __init__(self, dtype: type[Numeric], layout: SharedLayout, threads: int, input_bytes: int) -> None:
        self.dtype, self.layout, self.threads = dtype, layout, threads
        self.K = layout.sizes.K
        self.key_bytes = min(KEY_BYTES, input_bytes)
        self.value_bytes = input_bytes

    def stage(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        unit: Unit,
        chunk: TokenChunk,
        target: ChunkMemory,
        thread: Int32,
    ) -> None:
        """Copy a request's keys, queries and values to the memory of their chunk, by the whole CTA."""
        i, h, key_head, first = unit.request, unit.head, unit.key_head, unit.first_row
        rows, count = chunk.tokens, q.shape[1]
        queries = target.keys + rows * self.layout.key_pitch
        self.stage_keys(lambda t, c: memory.address(k, i, t, key_head, c), rows, count, target.keys, thread)
        self.stage_keys(lambda t, c: memory.address(q, i, t, key_head, c), rows, count, queries, thread)
        self.stage_values(lambda t, c: memory.address(v, i, t, h, first + c), rows, count, target.values, thread)

    def stage_keys(
        self, source: Source, rows: int, count: Int32, target: cute.Pointer, thread: Int32, used: Optional[Int32] = None
    ) -> None:
        """Copy `count` of `rows` rows of keys or queries as float32 to shared memory, by the whole CTA.

        Rows from `count` on become zeros; rows from `used` on, if given, are left unchanged.
        """
        per_row = self.K // 4
        pieces = rows * per_row
        for step in range(-(-pieces // self.threads)):
            piece = thread + step * self.threads
            row, column = piece // per_row, piece % per_row * 4
            destination = target + (row * self.layout.key_pitch + column)
            inside = piece < pieces if used is None else row < used
            self._stage_key(source(row, column), destination, inside, row < count)

    @cute.jit
    def _stage_key(self, source: cute.Pointer, target: cute.Pointer, inside: Boolean, active: Boolean) -> None:
        """Copy four elements."""
        if inside:
            values = [Float32(0.0)] * 4
            if active:
                values = memory.load(source, self.dtype, 4, self.key_bytes)
            memory.store(target, values, Float32, 16)

    @cute.jit
    def clear_key(self, target: cute.Pointer, thread: Int32) -> None:
        """Store a row of zeros, as long as a key."""
        for step in cutlass.range_constexpr(-(-self.K // (4 * self.threads))):
            column = (thread + step * self.threads) * 4
            if column < self.K:
                memory.store(target + column, [Float32(0.0)] * 4, Float32, 16)

    def stage_values(
        self, source: Source, rows: int, count: Int32, target: cute.Pointer, thread: Int32, used: Optional[Int32] = None
    ) -> None:
        """Copy this CTA's columns of values to shared memory, without conversion; otherwise like `stage_keys`."""
        per_row = self.layout.rows // 8
        pieces = rows * per_row
        for step in range(-(-pieces // self.threads)):
            piece = thread + step * self.threads
            row, column = piece // per_row, piece % per_row * 8
            destination = target + (row * self.layout.value_pitch + column) * 2
            inside = piece < pieces if used is None else row < used
            self._stage_value(source(row, column), destination, inside, row < count)

    @cute.jit
    def _stage_value(self, source: cute.Pointer, target: cute.Pointer, inside: Boolean, active: Boolean) -> None:
        """Copy eight elements."""
        if inside:
            words = [Int32(0)] * 4
            if active:
                words = memory.load_packed(source, 4, self.value_bytes)
            memory.store_words(target, words)

    def value_row(self, values: cute.Pointer, column: Int32, lane: Int32, group: int, available: int) -> cute.Pointer:
        """Return the address of this lane's row of the transposed matrices: 8 tokens by 16 columns of values."""
        row = row_of(lane & 7) & (available - 1)
        return values + ((8 * group + row) * self.layout.value_pitch + column + (lane >> 3 & 1) * 8) * 2

    def load_values(self, values: cute.Pointer, column: Int32, chunk: TokenChunk, lane: Int32) -> list[list[Float32]]:
        """Return the values of this lane's rows and the tokens of a chunk, in the order of products, 4 per group."""
        result = []
        for group in range(chunk.key_groups):
            words = mma.load_matrices(self.value_row(values, column, lane, group, min(chunk.tokens, 8)), 2)
            result.append(convert.unpack(words, self.dtype))
        return result
