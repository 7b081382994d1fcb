"""`CheckpointingSSU`: several tokens on a state that lags behind by up to a window of accepted ones, in one launch.

Per (sequence, head), with k accepted tokens since the state S0 was stored, n new ones, and c_j the running sum of A dt'
over both, the equations of `cute_ssm.ops.checkpointing_ssu.reference`:

    y_t = e^{c_{k+t}} S0 C_t + sum_{j <= k+t} e^{c_{k+t} - c_j} dt'_j (C_t . B_j) x_j + D x_t;   out = y silu(z)
    if k + n > W:   S0 <- e^{c_{k-1}} S0 + sum_{j < k} e^{c_{k-1} - c_j} dt'_j x_j B_j^T

Outputs come by the same formula whether the step writes the state or not.  A state is cut into *tiles* of rows, and a
*unit* is some tiles of one sequence and group.  CTAs walk their units, by three roles of warps that meet at mbarriers:

- the *producer* asks for tiles of the state (a tensor map, one instruction each) as long as the rings hold more, and
  for rows of x, B, C and z (bulk copies, one lane a row; `checkpointing_rows` where their addresses do not allow that);
  rows of the history from k on are never read;
- the *prep* warp computes dt' and its sums into shared memory, and appends the new tokens to the history; where every
  unit has a CTA, the producer does that too, after its requests;
- each *consumer* takes its share of the tiles, through a ring of its own, so that no two of them ever wait for each
  other: `checkpointing_consumer`.

PDL: with `spec.pdl` "wait_first" everything is read and written after `griddepcontrol.wait`.  With "early_reads",
`READS_BEFORE_WAIT` are read before it: their last writers must be complete when the upstream kernel starts, and every
kernel upstream that is launched so must wait before it releases its dependents.  x, dt, B, C and z, which the upstream
kernel may write, histories, and whatever is written follow the wait.  Dependents are released once everything is
requested, after the wait, and must wait likewise before they read outputs.
"""

from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import make_fake_stream
from cutlass.memory import SmemAllocator

from cute_ssm.arch import WARP, Arch
from cute_ssm.device import convert, launch, memory
from cute_ssm.device.bounds import in_range
from cute_ssm.device.fakes import fake
from cute_ssm.device.history import HistoryView
from cute_ssm.device.tile import StateTile
from cute_ssm.ops.checkpointing_ssu.config import FUSED, CheckpointingSSUConfig, Half, choose
from cute_ssm.ops.checkpointing_ssu.consumer import Consumer
from cute_ssm.ops.checkpointing_ssu.prep import Prep
from cute_ssm.ops.checkpointing_ssu.spec import EARLY_READS, WAIT_FIRST, CheckpointingSSUSpec
from cute_ssm.ops.checkpointing_ssu.unaligned_rows import UnalignedRows

# Arguments that are read before the wait with "early_reads".
READS_BEFORE_WAIT = (
    "state", "cursor", "accepted", "state_batch_indices", "cu_seqlens", "work_items", "num_writes",
)  # fmt: skip


class CheckpointingSSU:
    """The kernels of a `CheckpointingSSUSpec`; batch, slots, rows of caches and outer strides are dynamic."""

    def __init__(self, spec: CheckpointingSSUSpec, config: CheckpointingSSUConfig, arch: Arch):
        config.check(spec, arch)
        self.spec, self.config = spec, config
        self.input_dtype = convert.DTYPES[spec.input_dtype]
        self.history = HistoryView(spec.history)
        state_dtype = convert.DTYPES[spec.state_dtype]
        tile_rows = spec.dim // config.d_split
        rounding = (spec.philox_rounds, spec.saturate)
        self.tile = StateTile(state_dtype, self.input_dtype, tile_rows, spec.dstate, arch, *rounding)
        self.reads_before_wait = READS_BEFORE_WAIT if spec.pdl == EARLY_READS else ()
        self.steps = [Steps(self, half) for half in config.halves]

    @staticmethod
    def default_config(spec: CheckpointingSSUSpec, arch: Arch, units: int | None = None) -> CheckpointingSSUConfig:
        """The config for `units` (sequence, head) pairs, by default for more than the GPU can hold at once."""
        batch = 1 << 16 if units is None else -(-units // spec.heads)
        return choose(spec, arch, batch, arch.sm_count)

    @staticmethod
    def roles(_: CheckpointingSSUSpec, config: CheckpointingSSUConfig) -> tuple[str, ...]:
        """Names of the warps of a CTA; the last is that of all further ones."""
        return ("producer", "consumer") if config.form == FUSED else ("producer", "prep", "consumer")

    # ------------------------------------------------------------------------------------------------------------ host
    def fakes(self):
        """Arguments of `__call__` as the compiler sees them: what is static, and which sizes are equal."""
        spec = self.spec
        batch, total, slots, rows = (cute.sym_int32() for _ in range(4))
        heads, groups, dim, dstate = spec.heads, spec.groups, spec.dim, spec.dstate

        def when(present, *args):
            return fake(*args) if present else None

        def cache(dtype, shape_free, align):
            """A cache of the history; the innermost dimensions, from the first that is not free on, are contiguous."""
            shape, free = shape_free
            inner = [1]
            for size in reversed(shape[free + 1 :]):
                inner.insert(0, inner[0] * size)
            return fake(dtype, shape, tuple(inner), align)

        lead = (batch, spec.tokens) if spec.cu_dtype is None else (1, total)
        align = spec.input_bytes // 2
        row = (self.input_dtype, (*lead, heads, dim), (dim, 1), align)
        column = (self.input_dtype, (*lead, groups, dstate), (dstate, 1), align)
        x_cache, B_cache, dt_cache = self.history.shapes(spec, slots, rows)
        per_head = (heads, dim)
        return (
            fake(self.tile.dtype, (slots, heads, dim, dstate), (dim * dstate, dstate, 1), 128 // self.tile.dtype.width),
            cache(self.input_dtype, x_cache, 8),
            cache(self.input_dtype, B_cache, 8),
            cache(Float32, dt_cache, 1),
            None if self.history.ring else cache(Float32, dt_cache, 1),
            fake("int32", (slots,), (1,)),
            fake("int32", (slots,), (1,)),
            fake(*row),
            fake(spec.dt_dtype, (*lead, heads, dim), (0,)),
            fake(spec.A_dtype, (heads, dim, dstate), (0, 0)),
            fake(*column),
            fake(*column),
            when(spec.D_dtype, spec.D_dtype, per_head, (0,)),
            when(spec.has_z, *row),
            when(spec.dt_bias_dtype, spec.dt_bias_dtype, per_head, (0,)),
            fake(*row),
            when(spec.scaled, "float32", (slots, heads, dim), (dim, 1), 4),
            when(spec.src_dtype, spec.src_dtype, (batch,)),
            when(spec.cu_dtype, spec.cu_dtype, (cute.sym_int32(),)),
            when(spec.philox_rounds, "int64", (slots if spec.seed_per_slot else 1,), (1,)),
            when(spec.work_items, "int32", (batch, 4), (4, 1), 4),
            when(spec.work_items, "int32", (1,), (1,)),
            Int64(0),
            Int32(0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        state: cute.Tensor,
        x_cache: cute.Tensor,
        B_cache: cute.Tensor,
        dt_cache: cute.Tensor,
        sum_cache: Optional[cute.Tensor],
        cursor: cute.Tensor,
        accepted: cute.Tensor,
        x: cute.Tensor,
        dt: cute.Tensor,
        A: cute.Tensor,
        B: cute.Tensor,
        C: cute.Tensor,
        D: Optional[cute.Tensor],
        z: Optional[cute.Tensor],
        dt_bias: Optional[cute.Tensor],
        out: cute.Tensor,
        state_scale: Optional[cute.Tensor],
        state_batch_indices: Optional[cute.Tensor],
        cu_seqlens: Optional[cute.Tensor],
        rand_seed: Optional[cute.Tensor],
        work_items: Optional[cute.Tensor],
        num_writes: Optional[cute.Tensor],
        pad_slot_id: Int64,
        sm_count: Int32,
        stream,
    ):
        """Shapes and types as in `cute_ssm.checkpointing_ssu` and `cute_ssm.checkpointing_ssu_ring`."""
        spec, tile = self.spec, self.tile
        batch = cu_seqlens.shape[0] - 1 if const_expr(spec.cu_dtype is not None) else x.shape[0]
        view, box = tile.global_view(state), tile.tensor_box()
        one = tile.shared_layout()
        load = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), view, one, box)
        store = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), view, one, box)
        history = (x_cache, B_cache, dt_cache, sum_cache)
        where = (cursor, accepted, state_batch_indices, cu_seqlens, work_items, num_writes)
        for steps in self.steps:
            half = steps.half
            units = batch * steps.chunks
            ctas = units
            if const_expr(self.config.form != FUSED):
                ctas = cutlass.min(units, sm_count * half.ctas_per_sm)
            steps.kernel(
                *load, *store, state, *history, *where, x, dt, A, B, C, D, z, dt_bias, out, state_scale, rand_seed,
                batch, pad_slot_id,
            ).launch(
                grid=[ctas, 1, 1],
                block=[half.threads, 1, 1],
                use_pdl=spec.pdl is not None,
                # by itself the compiler aims at more CTAs than shared memory holds, and spills
                min_blocks_per_mp=half.ctas_per_sm,
                preferred_smem_carveout=100,  # without it, the compiler asks a driver how much there is
                stream=stream,
            )  # fmt: skip
            launch.prefer_shared()


class Steps:
    """One kernel: for all steps, or for those only that write states, or that keep them."""

    def __init__(self, owner: CheckpointingSSU, half: Half):
        self.spec, self.half, self.tile, self.history = owner.spec, half, owner.tile, owner.history
        self.input_dtype = owner.input_dtype
        self.early = self.spec.pdl == EARLY_READS  # reads before the upstream kernel is waited for
        self.layout = half.layout(self.spec)
        self.chunks = self.spec.heads * half.d_split // half.tiles
        self.own = half.tiles // half.consumers
        self.stages = half.consumers * half.depth
        self.per_group = self.spec.heads // self.spec.groups
        self.zero = half.unit_stages * self.layout.unit_bytes
        self.head_width = min(self.spec.dim, half.tiles * self.layout.tile_rows)  # columns of one head in a unit
        self.prep = Prep(self)
        self.unaligned_rows = None if self.spec.aligned else UnalignedRows(self)
        self.consumer = Consumer(self)

    @cute.kernel
    def kernel(
        self,
        load: cute.CopyAtom,
        load_view: cute.Tensor,
        store: cute.CopyAtom,
        store_view: cute.Tensor,
        state: cute.Tensor,
        x_cache: cute.Tensor,
        B_cache: cute.Tensor,
        dt_cache: cute.Tensor,
        sum_cache: Optional[cute.Tensor],
        cursor: cute.Tensor,
        accepted: cute.Tensor,
        indices: Optional[cute.Tensor],
        cu_seqlens: Optional[cute.Tensor],
        work_items: Optional[cute.Tensor],
        num_writes: Optional[cute.Tensor],
        x: cute.Tensor,
        dt: cute.Tensor,
        A: cute.Tensor,
        B: cute.Tensor,
        C: cute.Tensor,
        D: Optional[cute.Tensor],
        z: Optional[cute.Tensor],
        dt_bias: Optional[cute.Tensor],
        out: cute.Tensor,
        state_scale: Optional[cute.Tensor],
        rand_seed: Optional[cute.Tensor],
        batch: Int32,
        pad_slot: Int64,
    ):
        half, layout, stages = self.half, self.layout, self.stages
        tid = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(tid // WARP)
        smem = SmemAllocator()
        ring = smem.allocate(stages * layout.tile_bytes, 1024)
        units = smem.allocate(self.zero + layout.zero_bytes, 128)
        bars = smem.allocate_array(Int64, 2 * stages + 2 * half.unit_stages)
        barriers = (bars, bars + stages, bars + 2 * stages, bars + (2 * stages + half.unit_stages))
        full, empty, unit_full, unit_empty = barriers
        if tid == 0:
            for s in cutlass.range_constexpr(stages):
                cute.arch.mbarrier_init(full + s, 1)
                cute.arch.mbarrier_init(empty + s, 1)
            for s in cutlass.range_constexpr(half.unit_stages):
                cute.arch.mbarrier_init(unit_full + s, 2)  # producer (bytes) and prep
                cute.arch.mbarrier_init(unit_empty + s, 1 + half.consumers)  # prep and consumers
            cute.arch.mbarrier_init_fence()
        for i in range(tid, layout.zero_bytes // 16, half.threads):
            memory.store_words(cute.recast_ptr(units + (self.zero + i * 16), dtype=Int32), [Int32(0)] * 4)
        cute.arch.sync_threads()
        if const_expr(self.spec.pdl == WAIT_FIRST):
            cute.arch.griddepcontrol_wait()

        shared_layout = self.tile.shared_layout(stages)
        tiles = cute.make_tensor(cute.recast_ptr(ring, shared_layout.inner, dtype=self.tile.dtype), shared_layout.outer)
        first, last = Int32(0), batch
        if const_expr(half.part == "write"):
            last = cutlass.min(cutlass.max(num_writes[0], 0), batch)
        elif const_expr(half.part == "keep"):
            first = cutlass.min(cutlass.max(num_writes[0], 0), batch)
        walk = (first * self.chunks + cute.arch.block_idx()[0], last * self.chunks, cute.arch.grid_dim()[0])
        where = (state, dt_cache, cursor, accepted, indices, cu_seqlens, work_items, batch, x.shape[1], pad_slot)
        history = (x_cache, B_cache, dt_cache, sum_cache)
        if warp == 0:
            cpasync.prefetch_descriptor(load)
            inputs = (x, B, C, z, state_scale)
            self.produce(walk, where, history, inputs, (dt, A, dt_bias, D), load, load_view, tiles, units, barriers)
        elif warp >= half.helpers:
            outputs = (out, state_scale, rand_seed)
            self.consumer.run(warp - half.helpers, walk, outputs, store, store_view, tiles, ring, units, barriers)
        else:
            self.prepare(walk, where, history, (dt, A, dt_bias, D), units, barriers)

    # ----------------------------------------------------------------------------------------------------------- units
    @cute.jit
    def place(self, unit, where):
        """(sequence, its first token, n, slot, cursor, k, head, column, tile of the slot, whether live) of a unit.

        Contents that contradict the contract make a unit one of nothing to do, before anything is addressed by them.
        """
        state, dt_cache, cursors, accepted, indices, cu_seqlens, work_items, batch, total, pad_slot = where
        spec, half = self.spec, self.half
        item = Int32(Uint32(unit) // self.chunks)
        tile = Uint32(unit - item * self.chunks) * half.tiles
        head, column = Int32(tile // half.d_split), Int32(tile % half.d_split) * self.layout.tile_rows
        b, slot = item, Int64(item)
        k, cursor = Int32(0), Int32(0)
        if const_expr(spec.work_items):
            pointer = memory.address(work_items, item, 0)
            b, found, k, cursor = memory.load_words(pointer, 4)
            slot = Int64(found)
        elif const_expr(indices is not None):
            slot = Int64(indices[item])
        live = slot != pad_slot and in_range(slot, state.shape[0])
        if const_expr(spec.work_items):
            live = live and in_range(b, batch)
            b = b if live else Int32(0)
        slot = slot if live else Int64(0)
        if const_expr(not spec.work_items):
            k, cursor = accepted[slot], cursors[slot]
        start, n = Int32(0), Int32(spec.tokens)
        if const_expr(cu_seqlens is not None):
            first, last = Int64(cu_seqlens[b]), Int64(cu_seqlens[b + 1])
            live = live and first >= 0 and last <= total and last > first and last - first <= spec.tokens
            start, n = Int32(first), Int32(last - first)
        bound = self.history.cursors(dt_cache)
        live = live and in_range(k, spec.window + 1) and in_range(cursor, bound)
        if const_expr(half.part == "write"):
            live = live and k + n > spec.window
        elif const_expr(half.part == "keep"):
            live = live and k + n <= spec.window
        return b, start, n, slot, cursor, k, head, column, Int32(tile), live

    def token(self, tensor, b, start, t, *coord):
        """Address of an element of token t of sequence b."""
        if self.spec.cu_dtype is None:
            return memory.address(tensor, b, t, *coord)
        return memory.address(tensor, 0, start + t, *coord)

    def tile_copies(self, atom, view, tiles):
        """Shared and global sides of copies of tiles: (box, stage) and (box, tile of the pool's slot, slot)."""
        row, rows, pieces, _ = self.tile.tensor_box()
        tiled = cute.local_tile(view, (row, rows, pieces, 1), (0, None, 0, None))
        return cpasync.tma_partition(
            atom, 0, cute.make_layout(1), cute.group_modes(tiles, 0, 4), cute.group_modes(tiled, 0, 4)
        )

    # -------------------------------------------------------------------------------------------------------- producer
    @cute.jit
    def produce(self, walk, where, history, inputs, rates, load, load_view, tiles, units, barriers):
        first, total, stride = walk
        copies = (load, *self.tile_copies(load, load_view, tiles))
        if const_expr(self.half.single):
            self.produce_single(first, (where, history, inputs, rates), copies, units, barriers)
        else:
            it, rounds = Int32(0), Int32(0)
            for unit in cutlass.range(first, total, stride):
                live = self.produce_unit(unit, it, rounds, (where, history, inputs), copies, units, barriers)
                rounds += self.own if live else 0
                it += 1
            if const_expr(self.spec.pdl is not None):
                if const_expr(self.early):
                    cute.arch.griddepcontrol_wait()  # nothing has, if there was no unit
                cute.arch.griddepcontrol_launch_dependents()

    @cute.jit
    def produce_single(self, unit, sources, copies, units, barriers):
        """Request and prepare the only unit of a CTA.

        One round of tiles comes before the rows, which all work waits for, and the others that the rings hold behind
        them; before an upstream kernel is waited for, all of these.
        """
        where, history, inputs, rates = sources
        full, empty, unit_full, _ = barriers
        ring = min(self.half.depth, self.own)
        before_wait = ring if self.early else 0
        before_rows = max(before_wait, 1)
        lane = cute.arch.lane_idx()
        place = self.place(unit, where)
        slot, tile, live = place[3], place[8], place[9]
        requests = (*copies, full, empty, tile, slot)
        if live:
            for i in cutlass.range_constexpr(before_wait):
                self.request_fresh(requests, i, lane)
        if const_expr(self.early):
            cute.arch.griddepcontrol_wait()
        if live:
            for i in cutlass.range_constexpr(before_wait, before_rows):
                self.request_fresh(requests, i, lane)
            words = self.prep.fetch(place, history, rates, 0, lane)  # on their way while requests are made
            self.request_rows(place, history, inputs, units, unit_full, lane)
            for i in cutlass.range_constexpr(before_rows, ring):
                self.request_fresh(requests, i, lane)
            if const_expr(not self.spec.aligned):
                self.unaligned_rows.stage(place, inputs, units, unit_full, lane)
            self.prep.decays(place, history, rates, words, units, lane)
        elif lane == 0:
            cute.arch.mbarrier_arrive(unit_full)
        self.prep.announce(place, units, unit_full, lane)
        if live:
            for i in cutlass.range(ring, self.own, unroll=1):
                self.request(requests, Int32(0), i, lane)
        if const_expr(self.spec.pdl is not None):
            cute.arch.griddepcontrol_launch_dependents()
        self.prep.append_tokens(place, history, units, unit_full, Int32(0), lane)
        cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def produce_unit(self, unit, it, rounds, sources, copies, units, barriers):
        """Request a CTA's it-th unit; whether there is anything to do.

        Rows come first, which all work waits for; but if they must wait for the buffer of the unit before, all tiles
        that the rings hold.  Of a CTA's first unit one round of tiles comes before them, or, where an upstream kernel
        must be waited for, all.
        """
        half, layout = self.half, self.layout
        where, history, inputs = sources
        full, empty, unit_full, unit_empty = barriers
        ring = min(half.depth, self.own)
        at_first, later = ring if self.early else 1, ring if half.unit_stages == 1 else 0
        lane = cute.arch.lane_idx()
        place = self.place(unit, where)
        slot, tile, live = place[3], place[8], place[9]
        stage, phase = self.stage(it)
        bar = unit_full + stage
        requests = (*copies, full, empty, tile, slot)
        before_rows = at_first if it == 0 else later
        if live:
            for i in cutlass.range(before_rows, unroll=1):
                self.request(requests, rounds, i, lane)
        cute.arch.mbarrier_wait(unit_empty + stage, phase ^ 1)
        if const_expr(self.early):
            if it == 0:  # also where there is nothing to do: the next unit does not wait
                cute.arch.griddepcontrol_wait()
        if live:
            self.request_rows(place, history, inputs, units + stage * layout.unit_bytes, bar, lane)
            if const_expr(not self.spec.aligned):
                self.unaligned_rows.stage(place, inputs, units + stage * layout.unit_bytes, bar, lane)
            for i in cutlass.range(before_rows, self.own, unroll=1):
                self.request(requests, rounds, i, lane)
        elif lane == 0:
            cute.arch.mbarrier_arrive(bar)
        return live

    def stage(self, it):
        """(buffer, phase) of a CTA's it-th unit."""
        if self.half.unit_stages == 1:
            return Int32(0), it & 1
        return it & 1, it >> 1 & 1

    @cute.jit
    def request_fresh(self, requests, i: cutlass.Constexpr, lane):
        """Ask for the i-th tile of every consumer, into stages that nothing has used."""
        full = requests[3]
        first, _ = self.ring_stage(i)
        if lane < self.half.consumers:  # a stage each
            cute.arch.mbarrier_arrive_and_expect_tx(full + (first + lane), self.layout.tile_bytes)
        cute.arch.sync_warp()
        for w in cutlass.range_constexpr(self.half.consumers):
            self.copy_tile(requests, first + w, w * self.own + i)

    @cute.jit
    def request(self, requests, rounds, i, lane):
        """Ask for the i-th tile of every consumer, each as soon as its stage is free."""
        full, empty = requests[3:5]
        first, phase = self.ring_stage(rounds + i)
        for w in cutlass.range_constexpr(self.half.consumers):
            cute.arch.mbarrier_wait(empty + (first + w), phase ^ 1)
            if lane == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(full + (first + w), self.layout.tile_bytes)
            self.copy_tile(requests, first + w, w * self.own + i)

    def copy_tile(self, requests, stage, i):
        """Copy a tile of the unit to a stage; consumers have contiguous shares of a unit's tiles."""
        load, ts, tg, full, _, first_tile, slot = requests
        cute.copy(load, tg[(None, first_tile + i, Int32(slot))], ts[(None, stage)], tma_bar_ptr=full + stage)

    def ring_stage(self, r):
        """(first consumer's stage, phase) of all consumers' r-th tiles."""
        depth = self.half.depth
        return (r & (depth - 1)) * self.half.consumers, r >> (depth.bit_length() - 1) & 1

    @cute.jit
    def request_rows(self, place, history, inputs, at, bar, lane):
        """Ask for what a unit needs besides tiles: positions of x and B in order, rows of C and z, scales.

        Rows of new tokens that are not aligned are left to `UnalignedRows.stage`, which also arrives.
        """
        b, start, n, slot, cursor, k, head, column, _, _ = place
        x_cache, B_cache, dt_cache, _ = history
        x, B, C, z, state_scale = inputs
        spec, layout = self.spec, self.layout
        width, columns = layout.width, spec.dstate * 2
        scale_bytes = layout.width * 2 if const_expr(spec.scaled) else 0
        group = head // self.per_group
        rows = self.history.capacity(dt_cache)
        positions = k + n if const_expr(spec.aligned) else k
        if lane == 0:
            if const_expr(spec.aligned):
                per_token = width * 2 + columns * 2 if const_expr(spec.has_z) else width + columns * 2
                cute.arch.mbarrier_arrive_and_expect_tx(bar, k * (width + columns) + n * per_token + scale_bytes)
            else:
                cute.arch.mbarrier_expect_tx(bar, k * (width + columns) + scale_bytes)
            if const_expr(spec.scaled):
                source = memory.address(state_scale, slot, head, column).toint()
                memory.bulk_load(at + layout.scales, memory.global_bytes(source), scale_bytes, bar)
        for base in cutlass.range_constexpr(0, layout.rows, WARP):
            j = base + lane
            if j < positions:
                t, old = cutlass.max(j - k, 0), self.history.old(cursor, cutlass.min(j, k), rows)
                from_B = self.token(B, b, start, t, group, 0).toint()
                if j < k:
                    from_B = self.history.B(B_cache, slot, old, group).toint()
                to = at + (layout.b + j * layout.column_pitch)
                memory.bulk_load(to, memory.global_bytes(from_B), columns, bar)
                to = at + (layout.x + j * layout.x_pitch)
                from_x = self.token(x, b, start, t, head, column).toint()
                if const_expr(not self.history.ring):
                    if j < k:
                        from_x = self.history.x(x_cache, slot, old, head, column).toint()
                    memory.bulk_load(to, memory.global_bytes(from_x), width, bar)
                elif j >= k:
                    memory.bulk_load(to, memory.global_bytes(from_x), width, bar)
                else:
                    piece = self.head_width * 2
                    for h in cutlass.range_constexpr(layout.heads):
                        source = self.history.x(x_cache, slot, old, head + h, column).toint()
                        memory.bulk_load(to + h * piece, memory.global_bytes(source), piece, bar)
        by_bulk = spec.tokens if const_expr(spec.aligned) else 0
        for base in cutlass.range_constexpr(0, by_bulk, WARP // 2):  # half a warp for z, the other for C
            t = base + lane % 16
            if t < n:
                if lane >= 16:
                    source = self.token(C, b, start, t, group, 0).toint()
                    memory.bulk_load(
                        at + (layout.c + t * layout.column_pitch), memory.global_bytes(source), columns, bar
                    )
                elif const_expr(spec.has_z):
                    source = self.token(z, b, start, t, head, column).toint()
                    memory.bulk_load(at + (layout.z + t * layout.x_pitch), memory.global_bytes(source), width, bar)
        cute.arch.sync_warp()

    # ------------------------------------------------------------------------------------------------------------ prep
    @cute.jit
    def prepare(self, walk, where, history, rates, units, barriers):
        layout = self.layout
        first, total, stride = walk
        _, _, unit_full, unit_empty = barriers
        lane = cute.arch.lane_idx()
        it = Int32(0)
        if const_expr(self.early):
            cute.arch.griddepcontrol_wait()
        for unit in cutlass.range(first, total, stride):
            place = self.place(unit, where)
            stage, phase = self.stage(it)
            at, bar = units + stage * layout.unit_bytes, unit_full + stage
            cute.arch.mbarrier_wait(unit_empty + stage, phase ^ 1)
            if place[9]:
                words = self.prep.fetch(place, history, rates, 0, lane)
                self.prep.decays(place, history, rates, words, at, lane)
            self.prep.announce(place, at, bar, lane)
            self.prep.append_tokens(place, history, at, bar, phase, lane)
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            cute.arch.sync_warp()
            if lane == 0:
                cute.arch.mbarrier_arrive(unit_empty + stage)
            it += 1
        cute.arch.cp_async_bulk_wait_group(0)
