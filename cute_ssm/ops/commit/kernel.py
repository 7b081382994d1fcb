"""`CommitCursors`: the cursors of all layers, advanced after a model step by the numbers of accepted tokens.

The rule is that of `cute_ssm.reference.serving.commit`; a thread per row of the batch.  The kernel is launched in plain
stream order and releases no dependents early: operators may read cursors before they wait for the kernel before them.
"""

from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, const_expr
from cutlass.cute.runtime import make_fake_stream

from cute_ssm.arch import WARP, Arch
from cute_ssm.device.fakes import fake
from cute_ssm.ops._cursors.config import CursorConfig
from cute_ssm.ops._cursors.rows import CursorRows
from cute_ssm.ops.commit.config import choose_commit
from cute_ssm.ops.commit.spec import CommitSpec


class CommitCursors:
    """The kernel of a `CommitSpec`; everything but types is dynamic."""

    def __init__(self, spec: CommitSpec, config: CursorConfig, arch: Arch):
        config.check(spec, arch)
        self.spec = spec
        self.threads = WARP * config.warps
        self.rows = CursorRows(spec)

    @staticmethod
    def default_config(spec: CommitSpec, arch: Arch, units: int | None = None) -> CursorConfig:
        """The one config there is."""
        return choose_commit()

    def fakes(self):
        """Arguments of `__call__` as the compiler sees them."""
        batch, slots, layers = (cute.sym_int32() for _ in range(3))
        pnat, cursor, src, cu = self.rows.fakes(batch, slots)
        accepted = fake(self.spec.accepted_dtype, (batch,))
        seeds = None
        if self.spec.seeds:
            seeds = fake(Int64, (layers, slots), (1,))
        closed = fake(Uint8, (slots,)) if self.spec.unallocated else None
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return pnat, cursor, accepted, src, cu, seeds, closed, Int64(0), Int32(0), Int32(0), Int32(0), stream

    @cute.jit
    def __call__(
        self,
        pnat: cute.Tensor,
        cursor: cute.Tensor,
        accepted: cute.Tensor,
        src: Optional[cute.Tensor],
        cu: Optional[cute.Tensor],
        seeds: Optional[cute.Tensor],
        unallocated: Optional[cute.Tensor],
        pad_slot: Int64,
        tokens: Int32,
        window: Int32,
        places: Int32,
        stream,
    ):
        """Shapes and types as in `cute_ssm.serving.commit`; `places` counts the values of the cursor."""
        self.kernel(pnat, cursor, accepted, src, cu, seeds, unallocated, pad_slot, tokens, window, places).launch(
            grid=[cute.ceil_div(accepted.shape[0], self.threads), 1, 1], block=[self.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        pnat: cute.Tensor,
        cursor: cute.Tensor,
        accepted: cute.Tensor,
        src: Optional[cute.Tensor],
        cu: Optional[cute.Tensor],
        seeds: Optional[cute.Tensor],
        unallocated: Optional[cute.Tensor],
        pad_slot: Int64,
        tokens: Int32,
        window: Int32,
        places: Int32,
    ):
        b = cute.arch.block_idx()[0] * self.threads + cute.arch.thread_idx()[0]
        if b < accepted.shape[0]:
            sizes = (pad_slot, tokens, window, places)
            slot, count, kept, place, live = self.rows.load((pnat, cursor, src, cu), b, sizes)
            if const_expr(unallocated is not None):
                if live:
                    live = unallocated[slot] == 0
            taken = Int64(accepted[b])
            if live and taken >= 0 and taken <= cutlass.min(count, window):
                if self.rows.writes(kept, count, window):
                    if const_expr(self.spec.ring):
                        behind = places - place  # place + kept may not fit 32 bits
                        place = kept - behind if kept >= behind else place + kept
                    else:
                        place = 1 - place
                    cursor[slot] = place
                    kept = Int32(0)
                pnat[slot] = kept + Int32(taken)
                if const_expr(seeds is not None):
                    for layer in cutlass.range(seeds.shape[0], unroll=4):
                        seeds[layer, slot] = seeds[layer, slot] + 1
