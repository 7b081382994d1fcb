"""`Prep`: what is computed once for a unit of `CheckpointingSSU`: dt', its running sums, and the appended history.

Half a warp works on 16 positions of one head, pending tokens first and then new ones; two heads at once.
"""

from typing import Any, NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr

from cute_ssm.arch import WARP
from cute_ssm.device import convert, math, memory
from cute_ssm.device.history import History, HistoryView
from cute_ssm.device.math import LOG2E, fast_softplus, power_of_two
from cute_ssm.device.types import Maybe
from cute_ssm.ops.checkpointing_ssu.config import READ_UNITS, STEP, LaunchConfig, UnitLayout
from cute_ssm.ops.checkpointing_ssu.spec import EARLY_READS, CheckpointingSSUSpec
from cute_ssm.ops.checkpointing_ssu.units import (
    INACTIVE,
    Barriers,
    InputTensors,
    Pipelines,
    Scheduler,
    TokenRows,
    Unit,
    UnitRange,
    Work,
)

Words = list[Int32]  # one for each pair of heads, of the lane's head


class DecayWords(NamedTuple):
    """What the decays at 16 positions are computed from, as loaded."""

    pending_dt: Words  # dt' of pending tokens, float32
    dt: Words
    A: Words
    dt_bias: Maybe[Words]
    D: Maybe[Words]


class _Sums(NamedTuple):
    """Sums of A dt' before 16 positions, for each pair of heads."""

    total: list[Float32]  # over all positions
    new: list[Float32]  # over new tokens


class _Position(NamedTuple):
    """The position of a lane among 16, and the token there."""

    index: Int32
    side: Int32  # which half of the warp the lane is in, and which head of a pair it works on
    is_pending: Boolean
    is_new: Boolean
    token: Int32  # the new token, or the nearest one


class Prep:
    """The prep warp of a kernel, or that part of its producer."""

    def __init__(
        self,
        spec: CheckpointingSSUSpec,
        launch: LaunchConfig,
        layout: UnitLayout,
        history_view: HistoryView,
        scheduler: Scheduler,
    ):
        self.spec, self.launch, self.layout = spec, launch, layout
        self.history_view, self.scheduler = history_view, scheduler
        self.early_reads = spec.pdl == EARLY_READS
        self.pipelines = Pipelines(launch)
        self.token_rows = TokenRows(spec.cu_dtype is not None)
        self.pairs = -(-layout.heads // 2)
        self.appended = history_view.appended(spec.tokens, spec.window)

    @cute.jit
    def run(
        self,
        unit_range: UnitRange,
        work: Work,
        history: History,
        inputs: InputTensors,
        units: cute.Pointer,
        barriers: Barriers,
    ) -> None:
        """Prepare all units of a CTA."""
        layout = self.layout
        lane = cute.arch.lane_idx()
        count = Int32(0)
        if const_expr(self.early_reads):
            cute.arch.griddepcontrol_wait()
        for index in cutlass.range(unit_range.first, unit_range.end, unit_range.stride):
            unit = self.scheduler.unit(index, work)
            stage, phase = self.pipelines.unit_stage(count)
            buffer, bar = units + stage * layout.unit_bytes, barriers.unit_full + stage
            cute.arch.mbarrier_wait(barriers.unit_empty + stage, phase ^ 1)
            if unit.active:
                words = self.load(unit, history, inputs, 0, lane)
                self.store_decays(unit, history, inputs, words, buffer, lane)
            self.store_header(unit, buffer, bar, lane)
            self.append(unit, history, buffer, bar, phase, lane)
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            cute.arch.sync_warp()
            if lane == 0:
                cute.arch.mbarrier_arrive(barriers.unit_empty + stage)
            count += 1
        cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def store_header(self, unit: Unit, buffer: cute.Pointer, bar: cute.Pointer, lane: Int32) -> None:
        """Store the `UnitHeader` and arrive at `bar`: the unit's decays are complete."""
        if lane == 0:
            header = cute.recast_ptr(buffer + self.layout.header, dtype=Int32)
            pending = unit.pending if unit.active else Int32(INACTIVE)
            memory.store_words(header, [pending, unit.num_tokens, unit.sequence, unit.first_token])
            memory.store_words(header + 4, [Int32(unit.slot), unit.head, unit.column, unit.tile])
        cute.arch.sync_warp()
        if lane == 0:
            cute.arch.mbarrier_arrive(bar)

    # ---------------------------------------------------------------------------------------------------------- decays
    @cute.jit
    def load(
        self, unit: Unit, history: History, inputs: InputTensors, base: cutlass.Constexpr, lane: Int32
    ) -> DecayWords:
        """Load what the decays at 16 positions from `base` on are computed from; nothing waits for the loads here."""
        spec = self.spec
        dt, A, D, dt_bias = inputs.dt, inputs.A, inputs.D, inputs.dt_bias
        at = self._position(unit, base, lane)
        first = unit.head + (at.side if const_expr(self.layout.heads > 1) else 0)
        row = self.history_view.pending_row(unit.cursor, at.index, self.history_view.rows(history.dt))
        cached = self.history_view.dt(history.dt, unit.slot, row, first)
        pending_dt = [Int32(0)] * self.pairs
        if at.is_pending:  # other rows may be written by another CTA
            pending_dt = self._load_pairs(cached, history.dt.stride[self.history_view.dt_heads], "float32", at.side)
        pointer = self.token_rows.address(dt, unit, at.token, first, 0)
        new_dt = self._load_pairs(pointer, dt.stride[2], spec.dt_dtype, at.side)
        rates = self._load_pairs(memory.address(A, first, 0, 0), A.stride[0], spec.A_dtype, at.side)
        biases: Any = None
        skips: Any = None
        if const_expr(dt_bias is not None):
            pointer = memory.address(dt_bias, first, 0)
            biases = self._load_pairs(pointer, dt_bias.stride[0], spec.dt_bias_dtype, at.side)
        if const_expr(D is not None and base == 0):
            skips = self._load_pairs(memory.address(D, first, 0), D.stride[0], spec.D_dtype, at.side)
        return DecayWords(pending_dt, new_dt, rates, biases, skips)

    @cute.jit
    def store_decays(
        self,
        unit: Unit,
        history: History,
        inputs: InputTensors,
        words: DecayWords,
        buffer: cute.Pointer,
        lane: Int32,
    ) -> None:
        """Store the records of all heads of a unit: two heads at once, half a warp each, 16 positions at a time.

        `words` is the result of `load` for the first 16 positions.  dt' of new tokens goes to the history too.
        """
        sums = _Sums([Float32(0.0)] * self.pairs, [Float32(0.0)] * self.pairs)
        for base in cutlass.range_constexpr(0, self.layout.rows, STEP):
            if const_expr(base == 0):
                sums = self._decay_block(unit, history, words, buffer, lane, base, sums)
            elif unit.pending + unit.num_tokens > base:
                more = self.load(unit, history, inputs, base, lane)
                sums = self._decay_block(unit, history, more, buffer, lane, base, sums)
        if const_expr(self.launch.works_on != READ_UNITS):
            if unit.pending > 0 and unit.pending + unit.num_tokens > self.spec.window:
                self._store_weights(unit.pending, words.A, buffer, lane)

    @cute.jit
    def _decay_block(
        self,
        unit: Unit,
        history: History,
        words: DecayWords,
        buffer: cute.Pointer,
        lane: Int32,
        base: cutlass.Constexpr,
        before: _Sums,
    ) -> _Sums:
        """Store the records of 16 positions, given the sums before them; return the sums after them."""
        spec, layout = self.spec, self.layout
        at = self._position(unit, base, lane)
        writes = unit.pending + unit.num_tokens > spec.window
        row = self.history_view.new_row(unit.cursor, unit.pending, at.token, writes, self.history_view.rows(history.dt))
        # the unit with a head's first columns appends
        appends = at.is_new and at.token < self.appended and unit.column == 0
        heads = [2 * i + at.side if 2 * i + 1 < layout.heads else Int32(2 * i) for i in range(self.pairs)]
        pending_dt, new_dt = self._floats(words.pending_dt, "float32"), self._floats(words.dt, spec.dt_dtype)
        rates = self._floats(words.A, spec.A_dtype)
        if const_expr(words.dt_bias is not None):
            new_dt = [v + bias for v, bias in zip(new_dt, self._floats(words.dt_bias, spec.dt_bias_dtype))]
        total, new = list(before.total), list(before.new)
        steps, sums = [], []
        for i in cutlass.range_constexpr(self.pairs):
            step = fast_softplus(new_dt[i]) if const_expr(spec.dt_softplus) else new_dt[i]
            step = step if at.is_new else Float32(0.0)
            step = pending_dt[i] if at.is_pending else step
            steps.append(step)
            sums.append(total[i] + math.running_sum(rates[i] * step))
            total[i] = cute.arch.shuffle_sync(sums[i], lane | 15)
        stored = list(sums)
        if const_expr(not self.history_view.ring and self.launch.works_on != READ_UNITS):
            if writes:  # new tokens start a buffer, and its sums start from zero
                for i in cutlass.range_constexpr(self.pairs):
                    step = steps[i] if at.is_new else Float32(0.0)
                    stored[i] = new[i] + math.running_sum(rates[i] * step)
                    new[i] = cute.arch.shuffle_sync(stored[i], lane | 15)
        for i in cutlass.range_constexpr(self.pairs):
            if at.side == 0 or const_expr(2 * i + 1 < layout.heads):
                offset = layout.records + heads[i] * layout.record + at.index * 8
                record = cute.recast_ptr(buffer + offset, dtype=Float32)
                memory.store(record, [sums[i] * LOG2E, steps[i]], Float32, 8)
                if const_expr(words.D is not None):
                    if at.index == 0:
                        skip = self._floats([words.D[i]], spec.D_dtype)[0]
                        memory.store_scalar(record + layout.skip // 4, skip, Float32)
                if appends:
                    head = unit.head + heads[i]
                    memory.store_scalar(self.history_view.dt(history.dt, unit.slot, row, head), steps[i], Float32)
                    if const_expr(not self.history_view.ring):
                        memory.store_scalar(
                            self.history_view.dt(history.sums, unit.slot, row, head), stored[i], Float32
                        )
        return _Sums(total, new)

    @cute.jit
    def _store_weights(self, pending: Int32, A: Words, buffer: cute.Pointer, lane: Int32) -> None:
        """Store the weights of pending tokens in a new state, and the exponent of the old state's decay.

        Exponents are summed from the last pending token on: differences of long running sums lose digits where strong
        decays came first.  The records of positions do not change, so outputs have the bits of a step without a write.
        """
        layout = self.layout
        cute.arch.sync_warp()  # other lanes stored dt' of the next positions
        rates = self._floats(A, self.spec.A_dtype)
        j, side = lane % 16, lane // 16
        records, carry = [], []
        for i in cutlass.range_constexpr(self.pairs):
            h = 2 * i + side if const_expr(2 * i + 1 < layout.heads) else Int32(2 * i)
            records.append(cute.recast_ptr(buffer + (layout.records + h * layout.record), dtype=Float32))
            carry.append(Float32(0.0))
        for block in cutlass.range_constexpr(-(-self.spec.window // STEP)):
            base = (-(-self.spec.window // STEP) - 1 - block) * STEP
            if pending > base:
                for i in cutlass.range_constexpr(self.pairs):
                    later = base + j + 1
                    step = memory.load_scalar(records[i] + (2 * cutlass.min(later, pending - 1) + 1), Float32)
                    sums = carry[i] + math.remaining_sum(rates[i] * step if later < pending else Float32(0.0))
                    carry[i] = cute.arch.shuffle_sync(sums, lane & 16)
                    token_step = memory.load_scalar(records[i] + (2 * cutlass.min(base + j, pending - 1) + 1), Float32)
                    weight = power_of_two(sums * LOG2E) * token_step if later <= pending else Float32(0.0)
                    if side == 0 or const_expr(2 * i + 1 < layout.heads):
                        memory.store_scalar(records[i] + (layout.weights // 4 + base + j), weight, Float32)
        for i in cutlass.range_constexpr(self.pairs):
            step = memory.load_scalar(records[i] + 1, Float32)
            if j == 0 and (side == 0 or const_expr(2 * i + 1 < layout.heads)):
                memory.store_scalar(records[i] + layout.base // 4, (carry[i] + rates[i] * step) * LOG2E, Float32)

    @cute.jit
    def _position(self, unit: Unit, base: cutlass.Constexpr, lane: Int32) -> _Position:
        """Return this lane's position among 16 from `base` on."""
        num_tokens, pending = unit.num_tokens, unit.pending
        j = base + lane % 16
        return _Position(
            index=j,
            side=lane // 16,
            is_pending=j < pending,
            is_new=j >= pending and j < pending + num_tokens,
            token=cutlass.max(cutlass.min(j - pending, num_tokens - 1), 0),
        )

    def _load_pairs(self, first: cute.Pointer, stride: Int64, kind: Optional[str], side: Int32) -> Words:
        """Load elements of all pairs of heads, which are `stride` elements apart, from the address of the first."""
        heads, pointers = self.layout.heads, [first]
        for _ in range(1, self.pairs):
            pointers.append(pointers[-1] + 2 * stride)
        if heads > 1 and heads % 2:
            pointers[-1] = pointers[-1] - side * stride  # the last head has no other one in its pair
        return [memory.load_words(pointer, 1, convert.DTYPES[kind].width)[0] for pointer in pointers]

    @staticmethod
    def _floats(words: Words, kind: Optional[str]) -> list[Float32]:
        return [convert.widen(word, convert.DTYPES[kind]) for word in words]

    # --------------------------------------------------------------------------------------------------------- history
    @cute.jit
    def append(
        self, unit: Unit, history: History, buffer: cute.Pointer, bar: cute.Pointer, phase: Int32, lane: Int32
    ) -> None:
        """Append a unit's tokens to the history, once the barrier says that their rows have been loaded."""
        if unit.active:
            cute.arch.mbarrier_wait(bar, phase)
            self._store_history(unit, history, buffer, lane)

    @cute.jit
    def _store_history(self, unit: Unit, history: History, buffer: cute.Pointer, lane: Int32) -> None:
        """Copy new rows of x, and of B once per group, to the history: half a warp each."""
        spec, layout = self.spec, self.layout
        rows = self.history_view.rows(history.dt)
        writes = unit.pending + unit.num_tokens > spec.window
        leads_group = unit.head % spec.heads_per_group == 0 and unit.column == 0
        for base in cutlass.range_constexpr(0, self.appended, WARP // 2):
            t = base + lane % 16
            row = self.history_view.new_row(unit.cursor, unit.pending, t, writes, rows)
            if t < unit.num_tokens and t < self.appended:
                if lane < 16:
                    source = buffer + (layout.x + (unit.pending + t) * layout.x_pitch)
                    if const_expr(self.history_view.ring):
                        piece = layout.head_bytes
                        for h in cutlass.range_constexpr(layout.heads):
                            to = self.history_view.x(history.x, unit.slot, row, unit.head + h, unit.column).toint()
                            memory.bulk_store(memory.global_bytes(to), source + h * piece, piece)
                    else:
                        to = self.history_view.x(history.x, unit.slot, row, unit.head, unit.column).toint()
                        memory.bulk_store(memory.global_bytes(to), source, layout.width)
                elif leads_group:
                    source = buffer + (layout.b + (unit.pending + t) * layout.column_pitch)
                    to = self.history_view.B(history.B, unit.slot, row, unit.head // spec.heads_per_group).toint()
                    memory.bulk_store(memory.global_bytes(to), source, spec.dstate * 2)
        cute.arch.cp_async_bulk_commit_group()
