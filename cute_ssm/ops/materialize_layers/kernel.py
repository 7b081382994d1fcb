"""`MaterializeLayers`: fold pending tokens into states, in all layers, whose memory is given by tables of addresses.

The work of a warp is that of `MaterializeState`, on tensors that are made of the addresses of its layer; the second
dimension of the grid is the layer.  Nothing is written for a request with a negative slot, or with a row or a number
of tokens out of range.
"""

from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Numeric, const_expr
from cutlass.cute.runtime import make_fake_stream

from cute_ssm.arch import WARP, Arch
from cute_ssm.device.bounds import in_range
from cute_ssm.device.fakes import of_table
from cute_ssm.device.types import Maybe
from cute_ssm.ops.materialize.config import MaterializeConfig, choose_materialize
from cute_ssm.ops.materialize.kernel import ROWS, MaterializeState, Pending, Unit
from cute_ssm.ops.materialize.kernel import Tensors as LayerMemory
from cute_ssm.ops.materialize_layers.arguments import ACCESS_BYTES, TABLE
from cute_ssm.ops.materialize_layers.spec import MaterializeLayersSpec

MANY = 2**31 - 1  # slots: their number is not known


class Tables(NamedTuple):
    """The tensors of a call."""

    state_ptrs: cute.Tensor
    state_slot_strides: cute.Tensor
    x_cache_ptrs: cute.Tensor
    x_cache_slot_strides: cute.Tensor
    B_cache_ptrs: cute.Tensor
    B_cache_slot_strides: cute.Tensor
    dt_cache_ptrs: cute.Tensor
    dt_cache_slot_strides: cute.Tensor
    A_ptrs: cute.Tensor
    state_scale_ptrs: cute.Tensor
    state_scale_slot_strides: cute.Tensor
    src_slots: cute.Tensor
    dst_slots: cute.Tensor
    ring_start: cute.Tensor
    replay_prefix_len: cute.Tensor
    active_request_indices: cute.Tensor
    rand_seed: Maybe[cute.Tensor]


class Sizes(NamedTuple):
    """Numbers of a call; `most_tokens` is that of a request."""

    num_heads: Int32
    groups: Int32
    most_tokens: Int32
    ring_rows: Int32
    pad_slot_id: Int64


class MaterializeLayers:
    """The kernel of a `MaterializeLayersSpec`; layers, batch, heads, groups, rows of the rings are dynamic."""

    def __init__(self, spec: MaterializeLayersSpec, config: MaterializeConfig, arch: Arch) -> None:
        self.spec, self.warps = spec, config.warps
        self.layer = MaterializeState(spec.of_layer, config, arch)

    @staticmethod
    def default_config(spec: MaterializeLayersSpec, arch: Arch, units: int | None = None) -> MaterializeConfig:
        """Return the only config."""
        return choose_materialize()

    def fakes(self) -> tuple[Any, ...]:
        """Return the arguments of `__call__` that the kernel is compiled for."""
        tensors = of_table(TABLE, {"rand_seed": "int64" if self.spec.philox_rounds else None}, {})
        return *tensors, *(Int32(0),) * 4, Int64(0), make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(
        self,
        state_ptrs: cute.Tensor,
        state_slot_strides: cute.Tensor,
        x_cache_ptrs: cute.Tensor,
        x_cache_slot_strides: cute.Tensor,
        B_cache_ptrs: cute.Tensor,
        B_cache_slot_strides: cute.Tensor,
        dt_cache_ptrs: cute.Tensor,
        dt_cache_slot_strides: cute.Tensor,
        A_ptrs: cute.Tensor,
        state_scale_ptrs: cute.Tensor,
        state_scale_slot_strides: cute.Tensor,
        src_slots: cute.Tensor,
        dst_slots: cute.Tensor,
        ring_start: cute.Tensor,
        replay_prefix_len: cute.Tensor,
        active_request_indices: cute.Tensor,
        rand_seed: Maybe[cute.Tensor],
        num_heads: Int32,
        heads_per_group: Int32,
        most_tokens: Int32,
        ring_rows: Int32,
        pad_slot_id: Int64,
        stream: Any,
    ) -> None:
        """Shapes and types as in `cute_ssm.serving.materialize_layers`."""
        tables = Tables(
            state_ptrs, state_slot_strides, x_cache_ptrs, x_cache_slot_strides, B_cache_ptrs, B_cache_slot_strides,
            dt_cache_ptrs, dt_cache_slot_strides, A_ptrs, state_scale_ptrs, state_scale_slot_strides, src_slots,
            dst_slots, ring_start, replay_prefix_len, active_request_indices, rand_seed,
        )  # fmt: skip
        layers, batch = src_slots.shape
        sizes = Sizes(num_heads, num_heads // heads_per_group, most_tokens, ring_rows, pad_slot_id)
        units = batch * num_heads * self.layer.chunks
        heads, per_group = cute.FastDivmodDivisorV2(num_heads), cute.FastDivmodDivisorV2(heads_per_group)
        self.kernel(tables, sizes, units, heads, per_group).launch(
            grid=[cute.ceil_div(units, self.warps), layers, 1], block=[WARP * self.warps, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        tables: Tables,
        sizes: Sizes,
        units: Int32,
        heads: cute.FastDivmodDivisorV2,
        per_group: cute.FastDivmodDivisorV2,
    ) -> None:
        """Check the unit of this warp, and copy or fold it."""
        lane, warp = cute.arch.lane_idx(), cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // WARP)
        index, layer = cute.arch.block_idx()[0] * self.warps + warp, cute.arch.block_idx()[1]
        if index < units:
            pair = index // self.layer.chunks
            place, head = divmod(pair, heads)
            b = tables.active_request_indices[place]
            if in_range(b, tables.src_slots.shape[1]):
                src_slot, dst_slot = Int64(tables.src_slots[layer, b]), Int64(tables.dst_slots[layer, b])
                start, count = tables.ring_start[b], tables.replay_prefix_len[b]
                active = src_slot != sizes.pad_slot_id and src_slot >= 0
                active = active and dst_slot != sizes.pad_slot_id and dst_slot >= 0
                if active and in_range(start, sizes.ring_rows) and count >= 0 and count <= sizes.most_tokens:
                    row = (index - pair * self.layer.chunks) * self.layer.unit_rows + lane // self.layer.lanes * ROWS
                    unit = Unit(src_slot, dst_slot, head, row, lane % self.layer.lanes)
                    group, _ = divmod(head, per_group)
                    tensors = self.tensors(tables, sizes, layer)
                    if count == 0:
                        self.layer.copy(tensors, unit)
                    else:
                        self.layer.fold(tensors, unit, Pending(count, start, group, sizes.ring_rows), lane)

    # ----------------------------------------------------------------------------------------------------------- parts
    def tensors(self, tables: Tables, sizes: Sizes, layer: Int32) -> LayerMemory:
        """Return the tensors of a layer, as `MaterializeState` takes them."""
        dim, dstate, heads, rows = self.spec.dim, self.spec.dstate, sizes.num_heads, sizes.ring_rows
        state_dtype, input_dtype = self.layer.state_dtype, self.layer.input_dtype
        state = view(tables.state_ptrs, tables.state_slot_strides, layer, state_dtype, (heads, dim, dstate))
        scale, seed = None, None
        if const_expr(self.layer.scaled):
            scale = view(
                tables.state_scale_ptrs, tables.state_scale_slot_strides, layer, Float32, (heads, dim), align=4
            )
        if const_expr(tables.rand_seed is not None):
            seed = cute.make_tensor(tables.rand_seed.iterator + layer, cute.make_layout(1))
        A_dtype = self.layer.A_dtype
        A = cute.make_ptr(A_dtype, tables.A_ptrs[layer], cute.AddressSpace.gmem, assumed_align=A_dtype.width // 8)
        return LayerMemory(
            state,
            scale,
            view(tables.x_cache_ptrs, tables.x_cache_slot_strides, layer, input_dtype, (heads, rows, dim)),
            view(tables.B_cache_ptrs, tables.B_cache_slot_strides, layer, input_dtype, (sizes.groups, rows, dstate)),
            view(tables.dt_cache_ptrs, tables.dt_cache_slot_strides, layer, Float32, (heads, rows), align=4),
            tables.ring_start,
            tables.replay_prefix_len,
            cute.make_tensor(A, cute.make_layout((heads, dim, dstate), stride=(1, 0, 0))),
            state,
            scale,
            tables.src_slots,
            tables.dst_slots,
            tables.replay_prefix_len,
            seed,
        )


def view(
    pointers: cute.Tensor,
    slot_strides: cute.Tensor,
    layer: Int32,
    dtype: type[Numeric],
    shape: tuple[Int32 | int, ...],
    align: int = ACCESS_BYTES,
) -> cute.Tensor:
    """Return a layer's memory, whose slots have a shape and are contiguous, as a tensor."""
    strides: list[Int32 | int] = [1]
    for extent in reversed(shape[1:]):
        strides.insert(0, strides[0] * extent)
    pointer = cute.make_ptr(dtype, pointers[layer], cute.AddressSpace.gmem, assumed_align=align)
    return cute.make_tensor(pointer, cute.make_layout((MANY, *shape), stride=(slot_strides[layer], *strides)))
