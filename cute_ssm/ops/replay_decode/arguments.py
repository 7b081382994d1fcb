"""The arguments of `selective_state_update_replayssm_output_only`: table, checks, and the spec of a call."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops._table import FLOAT32, INDICES, INT32, Arg, Table
from cute_ssm.ops.replay_decode.config import MOST_TOKENS
from cute_ssm.ops.replay_decode.spec import ReplayDecodeSpec
from cute_ssm.spec import FLOATS

ACCESS_BYTES = 16
FLAGS = ("bool", "int8")

Row = Arg("batch nheads dim", like="x", contiguous=1)
Column = Arg("batch ngroups dstate", like="x", contiguous=1)
Cache = Arg("slots nheads rows dim", like="x", contiguous=1, align=ACCESS_BYTES, written=True)


class Arguments(NamedTuple):
    """The arguments of a call in the order of the schema, which starts with the kernel's tensors.

    All axes are there, and A, dt and dt_bias have one value per head.
    """

    state: Annotated[Tensor, Arg("slots nheads dim dstate", FLOATS, contiguous=2, align=ACCESS_BYTES, written=True)]
    x: Annotated[Tensor, Arg("batch nheads dim", FLOATS, contiguous=1)]
    dt: Annotated[Tensor, Arg("batch nheads", FLOATS)]
    A: Annotated[Tensor, Arg("nheads", FLOATS)]
    B: Annotated[Tensor, Column]
    C: Annotated[Tensor, Column]
    D: Annotated[Tensor | None, Arg("nheads dim", FLOATS)]
    dt_bias: Annotated[Tensor | None, Arg("nheads", FLOATS)]
    z: Annotated[Tensor | None, Row]
    x_cache: Annotated[Tensor, Cache]
    dt_cache: Annotated[Tensor, Arg("slots nheads rows", FLOAT32, written=True)]
    B_cache: Annotated[Tensor, replace(Cache, shape="slots ngroups rows dstate")]
    write_pos: Annotated[Tensor, Arg("batch", INT32)]
    is_flush: Annotated[Tensor, Arg("batch", FLAGS)]
    state_batch_indices: Annotated[Tensor | None, Arg("batch", INDICES)]
    out: Annotated[Tensor, replace(Row, written=True)]
    rand_seed: Annotated[Tensor | None, Arg("1", ("int64",))]
    dt_softplus: bool
    null_block_id: int
    philox_rounds: int
    saturate: bool = False


TABLE = Table(Arguments)


def check(call: Arguments) -> ReplayDecodeSpec:
    """Raise unless the call is as the operator documents it; return its spec."""
    given = TABLE.given(call)
    arguments.check_integer("null_block_id", call.null_block_id)
    given.check_ranks({}, ("state", "x", "B", "x_cache"))
    slots, nheads, dim, dstate = given["state"].shape
    batch, ngroups, rows = given["x"].shape[0], given["B"].shape[1], given["x_cache"].shape[2]
    if not (nheads and dim and dstate):
        raise ValueError(describe("state", "at least one head, row and column", tuple(given["state"].shape)))
    if ngroups < 1 or nheads % ngroups:
        raise ValueError(describe("B", f"ngroups that divides nheads = {nheads}", f"ngroups = {ngroups}"))
    sizes = {"slots": slots, "nheads": nheads, "ngroups": ngroups, "dim": dim, "dstate": dstate, "batch": batch}
    given.check_shapes({**sizes, "rows": rows})
    if slots < batch and call.state_batch_indices is None:
        fix = "pass state_batch_indices to say which slot each sequence uses"
        raise ValueError(describe("state", f"at least batch = {batch} slots", slots, fix))
    given.check_dtypes()
    arguments.check_saturate(call.saturate, "state", call.state.dtype)
    given.check_strides()
    given.check_written()
    spec = _spec(call)
    spec.check()
    return spec


def check_contents(call: Arguments) -> None:
    """Raise on slots and positions out of range; called for tensors on the CPU, whose contents can be read."""
    slots, active = torch.arange(call.x.shape[0]), torch.ones(call.x.shape[0], dtype=torch.bool)
    if call.state_batch_indices is not None:
        slots = call.state_batch_indices.long()
        active = slots != call.null_block_id
        pad = call.null_block_id
        arguments.check_slots("state_batch_indices", slots, active, call.state.shape[0], pad, "null_block_id")
    ordered = slots[active].sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        got = f"{int(repeated[0])} more than once"
        raise ValueError(describe("state_batch_indices", "distinct slots", got, "each holds one state"))
    rows = call.x_cache.shape[2]
    bad = (active & ((call.write_pos < 0) | (call.write_pos >= rows))).nonzero()[:, 0].tolist()
    if bad:
        got = f"{int(call.write_pos[bad[0]])} at position {bad[0]}"
        raise ValueError(describe("write_pos", f"values in [0, {rows})", got, "flush when the caches are full"))


def check_rows(max_cache_len: int, x_cache: object) -> None:
    """Raise unless the length of the caches is the one given, and the kernel has weights for as many tokens."""
    arguments.check_integer("max_cache_len", max_cache_len)
    if not 1 <= max_cache_len <= MOST_TOKENS:
        raise ValueError(describe("max_cache_len", f"1 to {MOST_TOKENS}", max_cache_len))
    if isinstance(x_cache, Tensor) and x_cache.dim() == 4 and x_cache.shape[2] != max_cache_len:
        expected = f"max_cache_len = {max_cache_len} rows in dimension 2"
        raise ValueError(describe("x_cache", expected, tuple(x_cache.shape), "pass the length of the caches"))


def _spec(call: Arguments) -> ReplayDecodeSpec:
    vectors = arguments.common_alignment((call.B, call.C), ACCESS_BYTES) == ACCESS_BYTES
    return ReplayDecodeSpec(
        state_dtype=arguments.name_of(call.state.dtype),
        input_dtype=arguments.name_of(call.x.dtype),
        A_dtype=arguments.name_of(call.A.dtype),
        dt_dtype=arguments.name_of(call.dt.dtype),
        D_dtype=arguments.type_of(call.D),
        dt_bias_dtype=arguments.type_of(call.dt_bias),
        dim=call.state.shape[2],
        dstate=call.state.shape[3],
        has_z=call.z is not None,
        dt_softplus=call.dt_softplus,
        src_dtype=arguments.type_of(call.state_batch_indices),
        vector_inputs=vectors or not call.B.numel(),
        philox_rounds=call.philox_rounds if call.rand_seed is not None else 0,
        saturate=call.saturate,
    )
