"""`UnalignedRows`: rows of x, z, B, C and out that no bulk copy can take, such as those of views of a fused projection.

A warp copies them between global and shared memory, by accesses of the spec's ``input_bytes``.  The history's rows are
aligned, and are copied in bulk.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32

from cute_ssm.arch import WARP
from cute_ssm.device import memory
from cute_ssm.ops.checkpointing_ssu.config import ROW_PAD

IN_FLIGHT = 2  # accesses of a lane to each tensor


class UnalignedRows:
    """Copies of a kernel (`checkpointing_ssu.Steps`)."""

    def __init__(self, owner):
        self.owner, self.spec, self.layout = owner, owner.spec, owner.layout
        self.access = owner.spec.input_bytes
        self.word = (1, 16) if self.access == 2 else (self.access // 4, 32)  # count, bits

    @cute.jit
    def stage(self, place, inputs, at, bar, lane):
        """Copy a unit's new rows to its buffer, and arrive at `bar` on behalf of the producer."""
        b, start, n, _, _, k, head, column, _, _ = place
        x, B, C, z, _ = inputs
        layout, group = self.layout, head // self.owner.per_group
        sources = [self.source(tensor, b, start, head, column) for tensor in (x, z) if tensor is not None]
        self.gather(n, sources, [layout.x + k * layout.x_pitch, Int32(layout.z)], layout.width, at, lane)
        sources = [self.source(tensor, b, start, group, 0) for tensor in (B, C)]
        targets = [layout.b + k * layout.column_pitch, Int32(layout.c)]
        self.gather(n, sources, targets, self.spec.dstate * 2, at, lane)
        # the history's new rows leave by bulk copies, which must see what this warp has written
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        if lane == 0:
            cute.arch.mbarrier_arrive(bar)

    def source(self, tensor, *row):
        """(address, distance in bytes) of a unit's rows of a tensor."""
        b, start, *inner = row
        return self.owner.token(tensor, b, start, 0, *inner).toint(), tensor.stride[1] * 2

    @cute.jit
    def gather(self, n, sources, targets, width: cutlass.Constexpr, at, lane):
        """Copy n rows of `width` bytes of several tensors to their places in shared memory."""
        per_row = width // self.access
        total = n * per_row
        pitch = width + ROW_PAD
        for base in cutlass.range(0, total, WARP * IN_FLIGHT, unroll=1):
            pieces = []
            for u in cutlass.range_constexpr(IN_FLIGHT):
                t, r = self.piece(base + u * WARP + lane, total, per_row)
                for (first, stride), target in zip(sources, targets):
                    address = memory.global_bytes(first + Int64(t) * stride + Int64(r), self.access)
                    pieces.append((target + t * pitch + r, memory.load_words(address, *self.word)))
            for u in cutlass.range_constexpr(IN_FLIGHT):
                if base + u * WARP + lane < total:
                    for to, words in pieces[u * len(sources) : (u + 1) * len(sources)]:
                        memory.store_words(at + to, words)

    @cute.jit
    def store(self, to, stride, n, source, width: cutlass.Constexpr, lane):
        """Copy n rows of `width` bytes from shared memory to global ones, `stride` bytes apart."""
        per_row = width // self.access
        lane = memory.pinned(lane)
        for i in cutlass.range(lane, n * per_row, WARP, unroll=1):
            t = Int32(Uint32(i) // per_row)
            r = (i - t * per_row) * self.access
            words = memory.load_words(source + (t * self.layout.x_pitch + r), *self.word)
            memory.store_words(memory.global_bytes(to + Int64(t) * stride + Int64(r), self.access), words)

    def piece(self, i, total, per_row: int):
        """(row, bytes into it) of the i-th access, or of the last."""
        i = Uint32(cutlass.min(i, total - 1))
        t = i // per_row
        return Int32(t), Int32(i - t * per_row) * self.access
