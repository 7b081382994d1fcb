"""`CheckpointingSSU`: several tokens from a state with up to a window of pending ones, in one launch.

Per (sequence, head), with k pending tokens since the state S0 was stored, n new ones, and c_j the running sum of A dt'
over both, the equations of `cute_ssm.ops.checkpointing_ssu.reference`:

    y_t = e^{c_{k+t}} S0 C_t + sum_{j <= k+t} e^{c_{k+t} - c_j} dt'_j (C_t . B_j) x_j + D x_t;   out = y silu(z)
    if k + n > W:   S0 <- e^{c_{k-1}} S0 + sum_{j < k} e^{c_{k-1} - c_j} dt'_j x_j B_j^T

The formula of outputs does not depend on whether the step writes the state.  A state is divided into *tiles* of rows.
A *unit* is some tiles of one sequence and group of heads (`Scheduler`).  Warps of a CTA work on its units in three
roles, which synchronise by mbarriers:

- the *producer* requests tiles of the state and rows of inputs and history (`Producer`);
- the *prep* warp computes dt' and its sums, and appends new tokens to the history (`Prep`).  Where every unit has a
  CTA, the producer does this after its requests;
- each *consumer* takes its share of the tiles through a pipeline of its own, so that consumers never wait for each
  other (`Consumer`, with `TileOutputs` and `StateFold`).

Programmatic dependent launch.  With `spec.pdl` "wait_first", all reads and writes follow ``griddepcontrol.wait``.  With
"early_reads", `READS_BEFORE_WAIT` are read before it.  Their last writers must then be complete when the upstream
kernel starts, so every kernel upstream that is itself launched as a dependent must wait before it releases its own
dependents.  x, dt, B, C and z, which the upstream kernel may write, the history, and all writes follow the wait.
Dependents are released after the wait, when everything is requested; they must wait before they read outputs.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Numeric, const_expr
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import make_fake_stream
from cutlass.memory import SmemAllocator

from cute_ssm.arch import WARP, Arch
from cute_ssm.device import convert, launch, memory
from cute_ssm.device.fakes import Layout, of_table
from cute_ssm.device.history import History, HistoryView
from cute_ssm.device.tile import StateTile
from cute_ssm.device.types import Maybe
from cute_ssm.ops.checkpointing_ssu.arguments import (
    B_HISTORY,
    DT_HISTORY,
    ROW_BYTES,
    TABLE,
    TOKENS,
    X_HISTORY,
)
from cute_ssm.ops.checkpointing_ssu.config import FUSED, CheckpointingSSUConfig, LaunchConfig, Role, choose
from cute_ssm.ops.checkpointing_ssu.consumer import Consumer
from cute_ssm.ops.checkpointing_ssu.prep import Prep
from cute_ssm.ops.checkpointing_ssu.producer import Producer
from cute_ssm.ops.checkpointing_ssu.spec import EARLY_READS, WAIT_FIRST, CheckpointingSSUSpec
from cute_ssm.ops.checkpointing_ssu.units import Barriers, InputTensors, OutputTensors, Scheduler, SequenceTensors, Work

# Arguments that are read before the wait with "early_reads".
READS_BEFORE_WAIT = (
    "state", "cursor", "prev_num_accepted_tokens", "state_batch_indices", "cu_seqlens", "work_items", "num_writes",
)  # fmt: skip


class CheckpointingSSU:
    """The kernels of a `CheckpointingSSUSpec`; batch, slots, rows of caches and outer strides are dynamic."""

    def __init__(self, spec: CheckpointingSSUSpec, config: CheckpointingSSUConfig, arch: Arch):
        config.check(spec, arch)
        self.spec, self.config = spec, config
        self.input_dtype = convert.DTYPES[spec.input_dtype]
        self.history_view = HistoryView(spec.history)
        state_dtype = convert.DTYPES[spec.state_dtype]
        tile_rows = spec.dim // config.d_split
        self.tile = StateTile(
            state_dtype, self.input_dtype, tile_rows, spec.dstate, arch, spec.philox_rounds, spec.saturate
        )
        self.reads_before_wait = READS_BEFORE_WAIT if spec.pdl == EARLY_READS else ()
        self.kernels = [
            StepKernel(spec, launch_config, self.history_view, self.tile, self.input_dtype)
            for launch_config in config.launch_configs
        ]

    @staticmethod
    def default_config(spec: CheckpointingSSUSpec, arch: Arch, units: int | None = None) -> CheckpointingSSUConfig:
        """Return the config for `units` (sequence, head) pairs; None: for more than the GPU can hold at once."""
        batch = 1 << 16 if units is None else -(-units // spec.heads)
        return choose(spec, arch, batch, arch.sm_count)

    @staticmethod
    def roles(_: CheckpointingSSUSpec, config: CheckpointingSSUConfig) -> tuple[str, ...]:
        """Return the names of the warps of a CTA; the last is that of all further ones."""
        roles = (Role.PRODUCER, Role.CONSUMER) if config.form == FUSED else tuple(Role)
        return tuple(role.name.lower() for role in roles)

    # ------------------------------------------------------------------------------------------------------------ host
    def fakes(self) -> tuple[Any, ...]:
        """Return the arguments of `__call__` as the compiler sees them: what is static, and which sizes are equal."""
        spec, kind = self.spec, self.spec.history
        column, head = Layout((spec.dstate, 1), spec.input_bytes // 2), Layout((0,))
        row = Layout((spec.dim, 1), spec.input_bytes // 2)
        caches = {}
        if not self.history_view.ring:  # tokens are rows of all heads, or groups
            align = ROW_BYTES // 2
            caches = {"x_history": Layout((spec.dim, 1), align), "B_history": Layout((spec.dstate, 1), align)}
        tensors = of_table(
            TABLE,
            dtypes={
                "state": spec.state_dtype,
                "x": spec.input_dtype,
                "dt": spec.dt_dtype,
                "A": spec.A_dtype,
                "D": spec.D_dtype,
                "z": spec.input_dtype if spec.has_z else None,
                "dt_bias": spec.dt_bias_dtype,
                "cum_history": None if self.history_view.ring else "float32",
                "state_scale": "float32" if spec.scaled else None,
                "state_batch_indices": spec.src_dtype,
                "cu_seqlens": spec.cu_dtype,
                "rand_seed": "int64" if spec.philox_rounds else None,
                "work_items": "int32" if spec.work_items else None,
                "num_writes": "int32" if spec.work_items else None,
            },
            sizes={
                "nheads": spec.heads,
                "ngroups": spec.groups,
                "dim": spec.dim,
                "dstate": spec.dstate,
                "T": spec.tokens,
                "seeds": "slots" if spec.seed_per_slot else 1,
            },
            axes={
                "tokens": TOKENS[spec.cu_dtype is not None],
                "x_history": X_HISTORY[kind],
                "B_history": B_HISTORY[self.history_view.ring],
                "dt_history": DT_HISTORY[self.history_view.ring],
            },
            layouts={
                **{name: row for name in ("x", "z", "out")},
                **{name: column for name in ("B", "C")},
                **{name: head for name in ("dt", "D", "dt_bias")},
                "A": Layout((0, 0)),
                "work_items": Layout((4, 1), 4),
                **caches,
            },
        )
        return (*tensors, Int64(0), Int32(0), make_fake_stream(use_tvm_ffi_env_stream=True))

    @cute.jit
    def __call__(
        self,
        state: cute.Tensor,
        x_history: cute.Tensor,
        B_history: cute.Tensor,
        dt_history: cute.Tensor,
        cum_history: Maybe[cute.Tensor],
        cursor: cute.Tensor,
        prev_num_accepted_tokens: cute.Tensor,
        x: cute.Tensor,
        dt: cute.Tensor,
        A: cute.Tensor,
        B: cute.Tensor,
        C: cute.Tensor,
        D: Maybe[cute.Tensor],
        z: Maybe[cute.Tensor],
        dt_bias: Maybe[cute.Tensor],
        out: cute.Tensor,
        state_scale: Maybe[cute.Tensor],
        state_batch_indices: Maybe[cute.Tensor],
        cu_seqlens: Maybe[cute.Tensor],
        rand_seed: Maybe[cute.Tensor],
        work_items: Maybe[cute.Tensor],
        num_writes: Maybe[cute.Tensor],
        pad_slot_id: Int64,
        sm_count: Int32,
        stream: Any,
    ) -> None:
        """Shapes and types as in `cute_ssm.checkpointing_ssu` and `cute_ssm.checkpointing_ssu_ring`."""
        spec, tile = self.spec, self.tile
        batch = cu_seqlens.shape[0] - 1 if const_expr(spec.cu_dtype is not None) else x.shape[0]
        view, box = tile.global_view(state), tile.tensor_box()
        one = tile.shared_layout()
        load = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), view, one, box)
        store = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), view, one, box)
        history = History(x_history, B_history, dt_history, cum_history)
        sequences = SequenceTensors(
            cursor, prev_num_accepted_tokens, state_batch_indices, cu_seqlens, work_items, num_writes
        )
        inputs = InputTensors(x, dt, A, B, C, D, z, dt_bias)
        outputs = OutputTensors(out, state_scale, rand_seed)
        for step_kernel in self.kernels:
            launch_config = step_kernel.launch
            units = batch * step_kernel.scheduler.units_per_sequence
            ctas = units
            if const_expr(self.config.form != FUSED):
                ctas = cutlass.min(units, sm_count * launch_config.ctas_per_sm)
            step_kernel.kernel(*load, *store, state, history, sequences, inputs, outputs, batch, pad_slot_id).launch(
                grid=[ctas, 1, 1],
                block=[launch_config.threads, 1, 1],
                use_pdl=spec.pdl is not None,
                # else the compiler assumes more CTAs than shared memory holds, and spills
                min_blocks_per_mp=launch_config.ctas_per_sm,
                preferred_smem_carveout=100,  # else the compiler asks a driver for its size
                stream=stream,
            )
            launch.prefer_shared()


class StepKernel:
    """One kernel: for all units, or for those whose states are written, or are only read."""

    def __init__(
        self,
        spec: CheckpointingSSUSpec,
        launch_config: LaunchConfig,
        history_view: HistoryView,
        tile: StateTile,
        input_dtype: type[Numeric],
    ):
        self.spec, self.launch, self.tile = spec, launch_config, tile
        self.layout = launch_config.layout(spec)
        self.zero_offset = launch_config.zero_offset(spec)
        self.scheduler = Scheduler(spec, launch_config, self.layout, history_view)
        self.prep = Prep(spec, launch_config, self.layout, history_view, self.scheduler)
        self.producer = Producer(spec, launch_config, self.layout, history_view, self.scheduler, self.prep)
        self.consumer = Consumer(spec, launch_config, self.layout, tile, input_dtype)

    @cute.kernel
    def kernel(
        self,
        load: cute.CopyAtom,
        load_view: cute.Tensor,
        store: cute.CopyAtom,
        store_view: cute.Tensor,
        state: cute.Tensor,
        history: History,
        sequences: SequenceTensors,
        inputs: InputTensors,
        outputs: OutputTensors,
        batch: Int32,
        pad_slot: Int64,
    ) -> None:
        layout, stages, unit_stages = self.layout, self.launch.tile_stages, self.launch.unit_stages
        tid = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(tid // WARP)
        smem = SmemAllocator()
        tile_memory = smem.allocate(stages * layout.tile_bytes, 1024)
        units = smem.allocate(self.zero_offset + layout.zero_bytes, 128)
        bars = smem.allocate_array(Int64, 2 * stages + 2 * unit_stages)
        barriers = Barriers(bars, bars + stages, bars + 2 * stages, bars + (2 * stages + unit_stages))
        if tid == 0:
            self.init_barriers(barriers)
        for i in range(tid, layout.zero_bytes // 16, self.launch.threads):
            memory.store_words(cute.recast_ptr(units + (self.zero_offset + i * 16), dtype=Int32), [Int32(0)] * 4)
        cute.arch.sync_threads()
        if const_expr(self.spec.pdl == WAIT_FIRST):
            cute.arch.griddepcontrol_wait()

        shared_layout = self.tile.shared_layout(stages)
        tiles = cute.make_tensor(
            cute.recast_ptr(tile_memory, shared_layout.inner, dtype=self.tile.dtype), shared_layout.outer
        )
        unit_range = self.scheduler.units_of_cta(sequences.num_writes, batch)
        work = Work(state, history.dt, sequences, batch, inputs.x.shape[1], pad_slot)
        if warp == Role.PRODUCER:
            cpasync.prefetch_descriptor(load)
            load_tiles = self.tile.partition(load, load_view, tiles)
            self.producer.run(unit_range, work, history, inputs, outputs, load_tiles, units, barriers)
        elif warp >= self.launch.first_consumer:
            store_tiles = self.tile.partition(store, store_view, tiles)
            consumer = warp - self.launch.first_consumer
            self.consumer.run(consumer, unit_range, outputs, store_tiles, tile_memory, units, barriers)
        else:
            self.prep.run(unit_range, work, history, inputs, units, barriers)

    @cute.jit
    def init_barriers(self, barriers: Barriers) -> None:
        """Initialise the mbarriers of all stages."""
        for s in cutlass.range_constexpr(self.launch.tile_stages):
            cute.arch.mbarrier_init(barriers.full + s, 1)
            cute.arch.mbarrier_init(barriers.empty + s, 1)
        for s in cutlass.range_constexpr(self.launch.unit_stages):
            cute.arch.mbarrier_init(barriers.unit_full + s, 2)  # producer (bytes) and prep
            cute.arch.mbarrier_init(barriers.unit_empty + s, 1 + self.launch.consumers)  # prep and consumers
        cute.arch.mbarrier_init_fence()
