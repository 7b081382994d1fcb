"""`CommitCursors`: advance the cursors of all layers after a model step by the numbers of accepted tokens.

The rule is that of `cute_ssm.ops.commit.reference`; one thread per row of the batch.  The kernel is launched in plain
stream order and does not release dependents early, because operators may read cursors before they wait for the kernel
before them.
"""

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, const_expr
from cutlass.cute.runtime import make_fake_stream

from cute_ssm.arch import WARP, Arch
from cute_ssm.device.fakes import of_table
from cute_ssm.device.types import Maybe
from cute_ssm.ops._cursors.config import CursorConfig
from cute_ssm.ops._cursors.rows import CursorBounds, CursorRows, CursorTensors
from cute_ssm.ops.commit.arguments import TABLE
from cute_ssm.ops.commit.config import choose_commit
from cute_ssm.ops.commit.spec import CommitSpec


class CommitTensors(NamedTuple):
    """The tensors of a call; ``cursor`` is ``cache_buf_idx`` or ``ring_start``."""

    prev_num_accepted_tokens: cute.Tensor
    cursor: cute.Tensor
    num_accepted_tokens: cute.Tensor
    state_batch_indices: Maybe[cute.Tensor]
    cu_seqlens: Maybe[cute.Tensor]
    rand_seed: Maybe[cute.Tensor]
    unallocated: Maybe[cute.Tensor]

    def rows(self) -> CursorTensors:
        """Return those that describe rows."""
        return CursorTensors(self.prev_num_accepted_tokens, self.cursor, self.state_batch_indices, self.cu_seqlens)


class CommitCursors:
    """The kernel of a `CommitSpec`; everything but types is dynamic."""

    def __init__(self, spec: CommitSpec, config: CursorConfig, arch: Arch) -> None:
        config.check(spec, arch)
        self.spec = spec
        self.threads = WARP * config.warps
        self.rows = CursorRows(spec)

    @staticmethod
    def default_config(spec: CommitSpec, arch: Arch, units: int | None = None) -> CursorConfig:
        """Return the only config."""
        return choose_commit()

    def fakes(self) -> tuple[Any, ...]:
        """Return the arguments of `__call__` that the kernel is compiled for."""
        spec = self.spec
        dtypes = {
            "num_accepted_tokens": spec.accepted_dtype,
            "state_batch_indices": spec.src_dtype,
            "cu_seqlens": spec.cu_dtype,
            "rand_seed": "int64" if spec.seeds else None,
            "unallocated": Uint8 if spec.unallocated else None,
        }
        bounds = CursorBounds(Int64(0), Int32(0), Int32(0), Int32(0))
        return *of_table(TABLE, dtypes, {}), *bounds, make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(
        self,
        prev_num_accepted_tokens: cute.Tensor,
        cursor: cute.Tensor,
        num_accepted_tokens: cute.Tensor,
        state_batch_indices: Maybe[cute.Tensor],
        cu_seqlens: Maybe[cute.Tensor],
        rand_seed: Maybe[cute.Tensor],
        unallocated: Maybe[cute.Tensor],
        pad_slot_id: Int64,
        num_tokens: Int32,
        window: Int32,
        num_cursors: Int32,
        stream: Any,
    ) -> None:
        """Shapes and types as in `cute_ssm.serving.commit`; for the scalars see `CursorBounds`."""
        tensors = CommitTensors(
            prev_num_accepted_tokens,
            cursor,
            num_accepted_tokens,
            state_batch_indices,
            cu_seqlens,
            rand_seed,
            unallocated,
        )
        bounds = CursorBounds(pad_slot_id, num_tokens, window, num_cursors)
        self.kernel(tensors, bounds).launch(
            grid=[cute.ceil_div(num_accepted_tokens.shape[0], self.threads), 1, 1],
            block=[self.threads, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, tensors: CommitTensors, bounds: CursorBounds) -> None:
        """Advance the row of this thread."""
        b = cute.arch.block_idx()[0] * self.threads + cute.arch.thread_idx()[0]
        if b < tensors.num_accepted_tokens.shape[0]:
            row = self.rows.load(tensors.rows(), b, bounds)
            active = row.active
            if const_expr(tensors.unallocated is not None):
                if active:
                    active = tensors.unallocated[row.slot] == 0
            num_accepted = Int64(tensors.num_accepted_tokens[b])
            if active and num_accepted >= 0 and num_accepted <= cutlass.min(row.num_tokens, bounds.window):
                pending = row.pending
                if self.rows.writes(row, bounds.window):
                    cursor = row.cursor
                    if const_expr(self.spec.ring):
                        rest = bounds.num_cursors - cursor  # cursor + pending may not fit 32 bits
                        cursor = pending - rest if pending >= rest else cursor + pending
                    else:
                        cursor = 1 - cursor
                    tensors.cursor[row.slot] = cursor
                    pending = Int32(0)
                tensors.prev_num_accepted_tokens[row.slot] = pending + Int32(num_accepted)
                if const_expr(tensors.rand_seed is not None):
                    for layer in cutlass.range(tensors.rand_seed.shape[0], unroll=4):
                        tensors.rand_seed[layer, row.slot] = tensors.rand_seed[layer, row.slot] + 1
