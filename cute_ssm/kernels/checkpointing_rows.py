"""`UnalignedRows`: rows of x, z, B, C and out that no bulk copy can take, such as those of views of a fused projection.

A warp copies them between global and shared memory, by accesses of the spec's ``input_bytes``.  The history's rows are
aligned, and are copied in bulk as ever.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, const_expr

from cute_ssm.device import memory
from cute_ssm.tuning.checkpointing_ssu import WARP

IN_FLIGHT = 4  # accesses of a lane


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
        layout, width, columns = self.layout, self.layout.width, self.spec.dstate * 2
        group = head // self.owner.per_group
        rows = [
            (B, group, 0, columns, layout.b + k * layout.column_pitch, layout.column_pitch),
            (C, group, 0, columns, Int32(layout.c), layout.column_pitch),
            (x, head, column, width, layout.x + k * layout.x_pitch, layout.x_pitch),
        ]
        if const_expr(z is not None):
            rows.append((z, head, column, width, Int32(layout.z), layout.x_pitch))
        sources = [
            (self.owner.token(tensor, b, start, 0, i, j).toint(), tensor.stride[1] * 2) for tensor, i, j, *_ in rows
        ]
        self.gather(n, sources, [row[3:] for row in rows], at, lane)
        # the history's new rows leave by bulk copies, which must see what this warp has written
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        if lane == 0:
            cute.arch.mbarrier_arrive(bar)

    @cute.jit
    def gather(self, n, sources, rows, at, lane):
        """Copy n rows of each kind: from (address, distance), of (bytes, offset in shared memory, distance)."""
        total = n * (sum(row[0] for row in rows) // self.access)
        for base in cutlass.range(0, total, WARP * IN_FLIGHT, unroll=1):
            pieces = []
            for u in cutlass.range_constexpr(IN_FLIGHT):
                source, to = self.piece(cutlass.min(base + (u * WARP + lane), total - 1), sources, rows)
                pieces.append((to, memory.load_words(memory.global_bytes(source, self.access), *self.word)))
            for u in cutlass.range_constexpr(IN_FLIGHT):
                if base + (u * WARP + lane) < total:
                    memory.store_words(at + pieces[u][0], pieces[u][1])

    def piece(self, i, sources, rows):
        """(address, offset in shared memory) of the i-th access: those of all kinds for a token, then the next."""
        per_token = sum(row[0] for row in rows) // self.access
        t = Int32(Uint32(i) // per_token)
        r = (i - t * per_token) * self.access
        begin, found = 0, None
        for (first, stride), (size, offset, pitch) in zip(sources, rows):
            here = first + Int64(t) * stride + Int64(r - begin), offset + t * pitch + (r - begin)
            after = r >= begin
            found = here if found is None else [cutlass.select_(after, new, old) for new, old in zip(here, found)]
            begin += size
        return found

    @cute.jit
    def store(self, to, stride, n, source, width: cutlass.Constexpr, lane):
        """Copy n rows of `width` bytes from shared memory to global ones, `stride` bytes apart."""
        per_token = width // self.access
        total = n * per_token
        for base in cutlass.range(0, total, WARP * IN_FLIGHT, unroll=1):
            pieces = []
            for u in cutlass.range_constexpr(IN_FLIGHT):
                i = cutlass.min(base + (u * WARP + lane), total - 1)
                t = Int32(Uint32(i) // per_token)
                r = (i - t * per_token) * self.access
                words = memory.load_words(source + (t * self.layout.x_pitch + r), *self.word)
                pieces.append((to + Int64(t) * stride + Int64(r), words))
            for u in cutlass.range_constexpr(IN_FLIGHT):
                if base + (u * WARP + lane) < total:
                    memory.store_words(memory.global_bytes(pieces[u][0], self.access), pieces[u][1])
