"""`UnalignedRows`: rows of x, z, B, C and out that bulk copies cannot take, such as views of a fused projection.

A warp copies them between global and shared memory, by accesses of the spec's ``input_bytes``.  Rows of the history
are aligned and are copied in bulk.
"""

from typing import NamedTuple, Union

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32

from cute_ssm.arch import WARP
from cute_ssm.device import memory
from cute_ssm.ops.checkpointing_ssu.config import ROW_PAD, UnitLayout
from cute_ssm.ops.checkpointing_ssu.spec import CheckpointingSSUSpec
from cute_ssm.ops.checkpointing_ssu.units import InputTensors, TokenRows, Unit

IN_FLIGHT = 2  # accesses of a lane to each tensor


class _Source(NamedTuple):
    """Rows of a tensor in global memory."""

    address: Int64
    stride: Int64  # in bytes


class _Access(NamedTuple):
    """A row of a unit, and bytes into it."""

    row: Int32
    offset: Int32


class UnalignedRows:
    """Copies of rows that are not multiples of 16 bytes apart."""

    def __init__(self, spec: CheckpointingSSUSpec, layout: UnitLayout, token_rows: TokenRows):
        self.spec, self.layout, self.token_rows = spec, layout, token_rows
        self.access_bytes = spec.input_bytes
        self.word = (1, 16) if spec.input_bytes == 2 else (spec.input_bytes // 4, 32)  # count, bits

    @cute.jit
    def stage(self, unit: Unit, inputs: InputTensors, buffer: cute.Pointer, bar: cute.Pointer, lane: Int32) -> None:
        """Copy a unit's new rows to its buffer, and arrive at `bar` on behalf of the producer."""
        layout, group = self.layout, unit.head // self.spec.heads_per_group
        sources = [
            self._source(tensor, unit, unit.head, unit.column) for tensor in (inputs.x, inputs.z) if tensor is not None
        ]
        targets = [layout.x + unit.pending * layout.x_pitch, Int32(layout.z)]
        self._gather(unit.num_tokens, sources, targets, layout.width, buffer, lane)
        sources = [self._source(tensor, unit, group, 0) for tensor in (inputs.B, inputs.C)]
        targets = [layout.b + unit.pending * layout.column_pitch, Int32(layout.c)]
        self._gather(unit.num_tokens, sources, targets, self.spec.dstate * 2, buffer, lane)
        # bulk copies to the history read these rows
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        if lane == 0:
            cute.arch.mbarrier_arrive(bar)

    def _source(self, tensor: cute.Tensor, unit: Unit, *coordinate: Union[Int32, int]) -> _Source:
        """Return where a unit's rows of a tensor are."""
        return _Source(self.token_rows.address(tensor, unit, 0, *coordinate).toint(), tensor.stride[1] * 2)

    @cute.jit
    def _gather(
        self,
        num_rows: Int32,
        sources: list[_Source],
        targets: list[Int32],
        width: cutlass.Constexpr,
        buffer: cute.Pointer,
        lane: Int32,
    ) -> None:
        """Copy rows of `width` bytes of several tensors to their offsets in shared memory."""
        per_row = width // self.access_bytes
        total = num_rows * per_row
        pitch = width + ROW_PAD
        for base in cutlass.range(0, total, WARP * IN_FLIGHT, unroll=1):
            pieces = []
            for u in cutlass.range_constexpr(IN_FLIGHT):
                at = self._nth_access(base + u * WARP + lane, total, per_row)
                for source, target in zip(sources, targets):
                    address = source.address + Int64(at.row) * source.stride + Int64(at.offset)
                    pointer = memory.global_bytes(address, self.access_bytes)
                    pieces.append((target + at.row * pitch + at.offset, memory.load_words(pointer, *self.word)))
            for u in cutlass.range_constexpr(IN_FLIGHT):
                if base + u * WARP + lane < total:
                    for to, words in pieces[u * len(sources) : (u + 1) * len(sources)]:
                        memory.store_words(buffer + to, words)

    @cute.jit
    def store(
        self,
        to: Int64,
        stride: Int64,
        num_rows: Int32,
        source: cute.Pointer,
        width: cutlass.Constexpr,
        lane: Int32,
    ) -> None:
        """Copy rows of `width` bytes from shared memory to global memory, `stride` bytes apart."""
        per_row = width // self.access_bytes
        lane = memory.pinned(lane)
        for i in cutlass.range(lane, num_rows * per_row, WARP, unroll=1):
            row = Int32(Uint32(i) // per_row)
            offset = (i - row * per_row) * self.access_bytes
            words = memory.load_words(source + (row * self.layout.x_pitch + offset), *self.word)
            memory.store_words(memory.global_bytes(to + Int64(row) * stride + Int64(offset), self.access_bytes), words)

    def _nth_access(self, i: Int32, total: Int32, per_row: int) -> _Access:
        """Return the i-th access, or the last."""
        i = Uint32(cutlass.min(i, total - 1))
        row = i // per_row
        return _Access(Int32(row), Int32(i - row * per_row) * self.access_bytes)
