"""`SelectiveScan`: the selective state update over all tokens of every sequence.

The equations are those of `cute_ssm.ops.selective_scan.reference`.  `lanes` lanes share a channel and hold its states h
[dstate], and the decay rates, in registers for the whole sequence, so nothing is scanned across lanes or tokens: the
arithmetic is five instructions per (token, channel, state).

A CTA owns a tile of channels of one group, persistently one (sequence, part, tile) after another.  The kernel is
composed of objects by role: `Extents` finds the tokens and slots of a sequence, `SegmentScan` scans tokens,
`ChannelStates` loads and stores states, `Parts` splits long sequences of few channels into parts that two launches scan
at once, and `PrefixBlocks` saves states for prefix caching.

Every lane reads its tokens of a row before it writes them, so outputs may be the rows of u, delta or z.

PDL: everything is read and written after `griddepcontrol.wait`; dependents are released at once and wait likewise.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, const_expr
from cutlass.cute.runtime import make_fake_stream
from cutlass.memory import SmemAllocator

from cute_ssm.arch import WARP, Arch
from cute_ssm.device import convert, launch, math, memory
from cute_ssm.device.fakes import Layout, fake, of_table
from cute_ssm.device.scan import TokenRange
from cute_ssm.device.types import Maybe
from cute_ssm.ops.selective_scan.arguments import TABLE
from cute_ssm.ops.selective_scan.config import QUAD, SelectiveScanConfig, carried_columns, choose
from cute_ssm.ops.selective_scan.extents import Extents
from cute_ssm.ops.selective_scan.operands import Channel, Rows, Sequence, Tensors, Unit
from cute_ssm.ops.selective_scan.parts import Parts
from cute_ssm.ops.selective_scan.prefix_blocks import PrefixBlocks
from cute_ssm.ops.selective_scan.segment import SegmentScan
from cute_ssm.ops.selective_scan.spec import SelectiveScanSpec
from cute_ssm.ops.selective_scan.states import ChannelStates


class SelectiveScan:
    """The kernel of a `SelectiveScanSpec`; batch, channels, groups, tokens, slots and strides are dynamic.

    With `carry` it is the carry pass of a kernel that splits sequences; see `Parts`.
    """

    def __init__(self, spec: SelectiveScanSpec, config: SelectiveScanConfig, arch: Arch, carry: bool = False) -> None:
        config.check(spec, arch)
        self.spec, self.carry, self.splits = spec, carry, config.splits
        self.lanes, self.threads = config.lanes, WARP * config.warps
        self.carry_pass: Maybe[SelectiveScan] = None  # type: ignore[assignment]
        if config.splits > 1 and not carry:
            self.carry_pass = SelectiveScan(spec, config, arch, carry=True)
        self.extents = Extents(spec)
        self.states = ChannelStates(spec, config)
        self.segment = SegmentScan(spec, config, self.states, carry)
        self.parts = Parts(spec, config, self.states, self.segment)
        self.prefix_blocks = PrefixBlocks(spec, self.extents, self.states, self.segment)

    @staticmethod
    def default_config(spec: SelectiveScanSpec, arch: Arch, units: int | None = None) -> SelectiveScanConfig:
        """Return the config for `units` (sequence, channel) pairs, by default more than the GPU can hold at once."""
        return choose(spec, arch, units if units is not None else 1 << 20, 1 << 20, 1, arch.sm_count)

    # ------------------------------------------------------------------------------------------------------------ host
    def fakes(self) -> tuple[Any, ...]:
        """Return the arguments of `__call__` that the kernel is compiled for."""
        spec = self.spec
        dtype, state_dtype = convert.DTYPES[spec.input_dtype], convert.DTYPES.get(spec.state_dtype)
        block = spec.cache_dtype if spec.blocks else None
        chunk = spec.cache_dtype if spec.chunks else None
        dtypes = {
            "u": dtype,
            "ssm_states": state_dtype,
            "D": Float32 if spec.has_D else None,
            "z": dtype if spec.has_z else None,
            "delta_bias": Float32 if spec.has_bias else None,
            "query_start_loc": spec.query_dtype,
            "cache_indices": spec.cache_dtype,
            "has_initial_state": Uint8 if spec.has_initial else None,
            "block_idx_first_scheduled_token": block,
            "block_idx_last_scheduled_token": block,
            "initial_state_idx": block,
            "cu_chunk_seqlen": chunk,
            "last_chunk_indices": chunk,
        }
        sizes: dict[str, int | str] = {"dstate": spec.dstate}
        if spec.query_dtype is None:
            sizes["rows"] = "batch"  # packed tensors have one row
        axes = {
            "channels": ("rows", "dim", "length"),
            "columns": ("rows", "ngroups", "dstate", "length"),
            "cache": ("batch", "n") if spec.blocks else ("batch",),
        }
        wide = Layout((1,), 16 * 8 // dtype.width if spec.aligned else 1)
        quads = Layout((1,), QUAD if spec.aligned_states else 1)
        layouts = dict.fromkeys(("u", "delta", "B", "C", "z", "out"), wide) | {"ssm_states": quads, "A": quads}
        if spec.blocks:
            layouts["cache_indices"] = Layout((1,))
        tensors = of_table(TABLE, dtypes, sizes, axes, layouts)
        u: Any = tensors[0]
        ungated = fake(dtype, u.shape, *wide) if spec.ungated else None
        carried = None
        if self.splits > 1:
            shape = (cute.sym_int32(), self.splits, u.shape[1], carried_columns(spec))
            carried = fake(Float32, shape, (1,), QUAD)
        scalars = (Int64(0), Int32(0), Int32(0), Int32(0))
        return *tensors, ungated, carried, *scalars, make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(
        self,
        u: cute.Tensor,
        ssm_states: Maybe[cute.Tensor],
        delta: cute.Tensor,
        A: cute.Tensor,
        B: cute.Tensor,
        C: cute.Tensor,
        D: Maybe[cute.Tensor],
        z: Maybe[cute.Tensor],
        delta_bias: Maybe[cute.Tensor],
        query_start_loc: Maybe[cute.Tensor],
        cache_indices: Maybe[cute.Tensor],
        has_initial_state: Maybe[cute.Tensor],
        block_idx_first_scheduled_token: Maybe[cute.Tensor],
        block_idx_last_scheduled_token: Maybe[cute.Tensor],
        initial_state_idx: Maybe[cute.Tensor],
        cu_chunk_seqlen: Maybe[cute.Tensor],
        last_chunk_indices: Maybe[cute.Tensor],
        out: cute.Tensor,
        ungated: Maybe[cute.Tensor],
        carried: Maybe[cute.Tensor],
        null_block_id: Int64,
        block_size: Int32,
        sequences: Int32,
        max_ctas: Int32,
        stream: Any,
    ) -> None:
        """Shapes as in `cute_ssm.selective_scan`, packed ones with a 1 in front; `max_ctas` bounds the grid."""
        tensors = Tensors(
            u, ssm_states, delta, A, B, C, D, z, delta_bias, query_start_loc, cache_indices, has_initial_state,
            block_idx_first_scheduled_token, block_idx_last_scheduled_token, initial_state_idx, cu_chunk_seqlen,
            last_chunk_indices, out, ungated, carried,
        )  # fmt: skip
        groups = B.shape[1]
        channels = self.threads // self.lanes
        per_group = u.shape[1] // groups
        tiles = (per_group + channels - 1) // channels
        if const_expr(self.carry_pass is not None):
            units = sequences * groups * tiles * (self.splits - 1)
            self.carry_pass.launch_pass(tensors, null_block_id, block_size, units, tiles, per_group, max_ctas, stream)
        units = sequences * groups * tiles * self.splits
        self.launch_pass(tensors, null_block_id, block_size, units, tiles, per_group, max_ctas, stream)

    @cute.jit
    def launch_pass(
        self,
        tensors: Tensors,
        null_block_id: Int64,
        block_size: Int32,
        units: Int32,
        tiles: Int32,
        per_group: Int32,
        max_ctas: Int32,
        stream: Any,
    ) -> None:
        """Launch one pass over `units` units; `tiles` tiles of channels cover the `per_group` channels of a group."""
        self.kernel(tensors, null_block_id, block_size, units, tiles, per_group).launch(
            grid=[cutlass.min(units, max_ctas), 1, 1],
            block=[self.threads, 1, 1],
            min_blocks_per_mp=1,  # otherwise ptxas spills a few registers to fit more CTAs
            use_pdl=True,
            stream=stream,
        )
        launch.prefer_shared()

    # ---------------------------------------------------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        tensors: Tensors,
        null_block_id: Int64,
        block_size: Int32,
        units: Int32,
        tiles: Int32,
        per_group: Int32,
    ) -> None:
        """Process units persistently."""
        thread = cute.arch.thread_idx()[0]
        shared = SmemAllocator().allocate_array(Float32, self.segment.shared_floats)
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        all_tiles = tiles * (tensors.u.shape[1] // per_group)
        per_sequence = all_tiles * (self.splits - self.carry)
        index, stride = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
        while index < units:
            b = index // per_sequence
            part, tile = Int32(0), index - b * per_sequence
            if const_expr(self.splits > 1):
                part = tile // all_tiles
                tile = tile - part * all_tiles
            group = tile // tiles
            offset = (tile - group * tiles) * (self.threads // self.lanes) + thread // self.lanes
            channel, active = group * per_group + offset, offset < per_group
            sequence = self.extents.load(tensors, b, null_block_id)
            tokens, has_work = sequence.tokens, sequence.active
            if const_expr(self.splits > 1):
                tokens = self.parts.tokens(sequence.tokens, part)
                has_work = has_work and tokens.begin < tokens.end
                if const_expr(self.carry):
                    # the last part carries nothing, but it stores initial states if it is also the first
                    has_work = has_work and (tokens.end < sequence.tokens.end or part == 0)
            if has_work:
                channel = channel if active else group * per_group
                unit = Unit(b, part, group, channel, active)
                self.run(tensors, unit, sequence, tokens, shared, thread, null_block_id, block_size)
            index += stride

    @cute.jit
    def run(
        self,
        tensors: Tensors,
        unit: Unit,
        sequence: Sequence,
        tokens: TokenRange,
        shared: cute.Pointer,
        thread: Int32,
        null_block_id: Int64,
        block_size: Int32,
    ) -> None:
        """Scan the tokens of a unit."""
        lane, ssm_states = thread % self.lanes, tensors.ssm_states
        channel = self.channel(tensors, unit, shared, thread)
        if const_expr(self.carry):
            self.parts.carry(tensors, unit, sequence, tokens, channel)
        else:
            h = self.states.zeros()
            if const_expr(self.splits > 1):
                if unit.active:
                    h = self.parts.fold(tensors.carried, unit, channel, sequence.has_initial)
            elif const_expr(ssm_states is not None):
                if sequence.has_initial and unit.active:
                    h = self.states.load(memory.address(ssm_states, sequence.slot, unit.channel, 0), lane)
            if const_expr(self.spec.blocks):
                self.prefix_blocks.scan(tensors, unit, sequence, tokens, channel, h, null_block_id, block_size)
            elif tokens.begin < tokens.end:
                h = self.segment.scan(channel, h, tokens)
                if const_expr(ssm_states is not None):
                    if unit.active and tokens.end == sequence.tokens.end:
                        self.states.store(memory.address(ssm_states, sequence.slot, unit.channel, 0), h, lane)

    @cute.jit
    def channel(self, tensors: Tensors, unit: Unit, shared: cute.Pointer, thread: Int32) -> Channel:
        """Return what this lane needs to scan its channel."""
        row = unit.sequence if const_expr(tensors.query_start_loc is None) else Int32(0)
        rates = self.states.load(memory.address(tensors.A, unit.channel, 0), thread % self.lanes)
        rates = [rate * math.LOG2E for rate in rates]
        D, delta_bias = (
            None if const_expr(t is None) else Float32(t[unit.channel]) for t in (tensors.D, tensors.delta_bias)
        )
        rows = [
            None if const_expr(t is None) else memory.address(t, row, unit.channel, 0)
            for t in (tensors.u, tensors.delta, tensors.z, tensors.out, tensors.ungated)
        ]
        columns = self.segment.column_blocks(tensors.B, tensors.C, row, unit.group, thread)
        return Channel(Rows(*rows), columns, D, delta_bias, rates, shared, thread, unit.active)
