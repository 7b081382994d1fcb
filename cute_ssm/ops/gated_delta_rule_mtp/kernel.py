"""`GatedDeltaRule`: up to 64 tokens of the gated delta rule per request.

A CTA works on `rows` rows of one head's state, and each of its warps on tiles of 16 of them: all tokens at once by
products (`ChunkedTokens`), or one token after the other (`SequentialTokens`), which the rule chooses for single tokens.
More than 16 tokens are processed chunk by chunk (`TokenChunks`).  Packed requests become views of their own tokens.

PDL: everything is read and written after `griddepcontrol.wait`, because the upstream kernel may be the last writer of
the states; dependents are released at once, and must wait likewise before they read.
"""

from typing import Any, Optional, Protocol

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.runtime import make_fake_stream

from cute_ssm.arch import WARP, Arch
from cute_ssm.device import convert, launch
from cute_ssm.device.bounds import in_range
from cute_ssm.device.fakes import of_table
from cute_ssm.device.types import Maybe
from cute_ssm.ops._gated_delta.arguments import ROWS
from cute_ssm.ops._gated_delta.config import GatedDeltaRuleConfig, choose
from cute_ssm.ops._gated_delta.outputs import clear_outputs
from cute_ssm.ops._gated_delta.shared import SharedMemory
from cute_ssm.ops._gated_delta.spec import CHUNK
from cute_ssm.ops._gated_delta.tokens import step_dtypes, step_layouts
from cute_ssm.ops._gated_delta.units import Unit
from cute_ssm.ops.gated_delta_rule_mtp.arguments import TABLE
from cute_ssm.ops.gated_delta_rule_mtp.products import ChunkedTokens, TokenChunks
from cute_ssm.ops.gated_delta_rule_mtp.sequential import SequentialTokens
from cute_ssm.ops.gated_delta_rule_mtp.spec import GatedDeltaRuleSpec
from cute_ssm.ops.gated_delta_rule_mtp.tensors import Tensors


class Path(Protocol):
    """How a CTA processes the tokens of a unit."""

    def allocate(self) -> Optional[SharedMemory]:
        """Allocate the shared memory of a CTA, if the path uses any."""

    def run(self, tensors: Tensors, unit: Unit, shared: Optional[SharedMemory], scale: Float32) -> None:
        """Process all rows of a unit."""


class GatedDeltaRule:
    """The kernel of a `GatedDeltaRuleSpec`; batch, tokens, heads, slots, strides and scale are dynamic."""

    def __init__(self, spec: GatedDeltaRuleSpec, config: GatedDeltaRuleConfig, arch: Arch) -> None:
        config.check(spec, arch)
        self.spec, self.config = spec, config
        self.threads = WARP * config.warps
        self.path: Path = self._path()

    def _path(self) -> Path:
        if self.config.sequential:
            return SequentialTokens(self.spec, self.config)
        return (
            TokenChunks(self.spec, self.config) if self.spec.tokens > CHUNK else ChunkedTokens(self.spec, self.config)
        )

    @staticmethod
    def default_config(spec: GatedDeltaRuleSpec, arch: Arch, units: Optional[int] = None) -> GatedDeltaRuleConfig:
        """Return the config for `units` (request, value head) pairs, by default for more than the GPU holds at once."""
        return choose(spec, arch, units if units is not None else 1 << 20, arch.sm_count)

    # ------------------------------------------------------------------------------------------------------------ host
    def fakes(self) -> tuple[Any, ...]:
        """Return stand-ins for the arguments of `__call__`, with what is static and which sizes are equal."""
        spec = self.spec
        dtypes = {
            **step_dtypes(spec),
            "ssm_state_indices": spec.scatter_dtype,
            "output_state_indices": spec.dst_dtype,
            "accepted_steps": spec.accepted_dtype,
            "cu_seqlens": spec.cu_dtype,
            "intermediate_states_buffer": spec.state_dtype if spec.write_buffer else None,
        }
        sizes = {"K": spec.K, "V": spec.V}
        return (
            *of_table(TABLE, dtypes, sizes, {"rows": ROWS[spec.cu_dtype is not None]}, step_layouts(spec)),
            Float32(0),
            None if spec.cu_dtype is None else Int32(0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        initial_state: cute.Tensor,
        initial_state_indices: cute.Tensor,
        A_log: cute.Tensor,
        a: cute.Tensor,
        dt_bias: cute.Tensor,
        b: cute.Tensor,
        output: cute.Tensor,
        intermediate_states_buffer: Maybe[cute.Tensor],
        ssm_state_indices: Maybe[cute.Tensor],
        output_state_indices: Maybe[cute.Tensor],
        accepted_steps: Maybe[cute.Tensor],
        cu_seqlens: Maybe[cute.Tensor],
        scale: Float32,
        max_seqlen: Maybe[Int32],
        stream: Any,
    ) -> None:
        """Launch one CTA for each unit.  Shapes and types as in `cute_ssm.gated_delta_rule_mtp`."""
        batch, value_heads = v.shape[0], v.shape[2]
        if const_expr(cu_seqlens is not None):
            batch = cu_seqlens.shape[0] - 1
        parts = self.spec.V // self.config.rows
        heads = cute.FastDivmodDivisorV2(value_heads)
        group = cute.FastDivmodDivisorV2(value_heads // q.shape[2])
        tensors = Tensors(
            q, k, v, initial_state, initial_state_indices, A_log, a, dt_bias, b, output, intermediate_states_buffer,
            ssm_state_indices, output_state_indices, accepted_steps, cu_seqlens,
        )  # fmt: skip
        self.kernel(tensors, scale, max_seqlen, heads, group).launch(
            grid=[batch * value_heads * parts, 1, 1],
            block=[self.threads, 1, 1],
            min_blocks_per_mp=1,  # otherwise ptxas may bound registers to fit more CTAs, and spill
            use_pdl=True,
            stream=stream,
        )
        if const_expr(not self.config.sequential):  # the sequential path uses no shared memory
            launch.prefer_shared()

    # ---------------------------------------------------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        tensors: Tensors,
        scale: Float32,
        max_seqlen: Maybe[Int32],
        heads: cute.FastDivmodDivisorV2,
        group: cute.FastDivmodDivisorV2,
    ) -> None:
        """Process rows of one head.  `heads` divides by value_heads, `group` by value_heads / heads."""
        shared = self.path.allocate()
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        parts = self.spec.V // self.config.rows
        block = cute.arch.block_idx()[0]
        pair = block // parts
        first_row = (block - pair * parts) * self.config.rows
        i, h = divmod(pair, heads)
        slot = Int64(tensors.initial_state_indices[i])
        active = in_range(slot, tensors.initial_state.shape[0])
        if const_expr(tensors.cu_seqlens is not None):
            offsets = tensors.cu_seqlens
            first, last = Int64(offsets[i]), Int64(offsets[i + 1])
            active = (
                active and first >= 0 and last <= tensors.q.shape[1] and last > first and last - first <= max_seqlen
            )
            tensors = tensors.of_request(Int32(first), Int32(last - first))
        if const_expr(tensors.accepted_steps is not None):
            accepted_steps = tensors.accepted_steps
            active = active and in_range(Int64(accepted_steps[i]), tensors.q.shape[1] + 1)
        if active:
            key_head, head_in_group = divmod(h, group)
            unit = Unit(i, h, key_head, head_in_group, first_row, slot)
            self.path.run(tensors, unit, shared, scale)
        elif const_expr(self.spec.zero_padding):
            dtype = convert.DTYPES[self.spec.output_dtype]
            count = tensors.q.shape[1]
            clear_outputs(tensors.output, dtype, i, h, first_row, self.config.rows, count, self.threads)
