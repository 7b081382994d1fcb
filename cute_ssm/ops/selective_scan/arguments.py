"""The arguments of `selective_scan` and `selective_scan_fn`: their tables, checks, and the spec of a call."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops._table import FLOAT32, INDICES, Arg, Given, Table
from cute_ssm.ops.selective_scan.config import QUAD
from cute_ssm.ops.selective_scan.spec import SelectiveScanSpec
from cute_ssm.spec import FLOATS

ACCESS_BYTES = 16  # widest access to a row
_BLOCKS = ("block_idx_first_scheduled_token", "block_idx_last_scheduled_token", "initial_state_idx")
_CHUNKS = ("cu_chunk_seqlen", "last_chunk_indices")

Channels = Arg("*channels", like="u")
Columns = Arg("*columns", like="u")
Block = Arg("batch", like="cache_indices")


def _weight(name: str, shape: str) -> Arg:
    return Arg(shape, FLOAT32, why=f"cast it with {name}.to(torch.float32)")


class Arguments(NamedTuple):
    """The arguments of a call in the order of the schema; ``out`` is ``z`` or ``delta`` itself for `selective_scan_fn`.

    The axes `channels` are (batch, dim, length) or (dim, total), those of `columns` have dstate in place of dim, with
    ngroups before it or not.
    """

    u: Annotated[Tensor, Arg("*channels", FLOATS)]
    ssm_states: Annotated[Tensor | None, Arg("slots dim dstate", FLOATS, written=True)]
    delta: Annotated[Tensor, Channels]
    A: Annotated[Tensor, _weight("A", "dim dstate")]
    B: Annotated[Tensor, Columns]
    C: Annotated[Tensor, Columns]
    D: Annotated[Tensor | None, _weight("D", "dim")]
    z: Annotated[Tensor | None, Channels]
    delta_bias: Annotated[Tensor | None, _weight("delta_bias", "dim")]
    query_start_loc: Annotated[Tensor | None, Arg("batch+1", INDICES, contiguous=1)]
    cache_indices: Annotated[Tensor | None, Arg("*cache", INDICES)]
    has_initial_state: Annotated[Tensor | None, Arg("batch", ("bool",))]
    block_idx_first_scheduled_token: Annotated[Tensor | None, Block]
    block_idx_last_scheduled_token: Annotated[Tensor | None, Block]
    initial_state_idx: Annotated[Tensor | None, Block]
    cu_chunk_seqlen: Annotated[Tensor | None, Arg("chunks+1", like="cache_indices", contiguous=1)]
    last_chunk_indices: Annotated[Tensor | None, Block]
    delta_softplus: bool
    null_block_id: int
    block_size: int
    out: Annotated[Tensor, Arg("*channels", like="u", written=True)]
    saturate: bool = False


TABLE = Table(Arguments)
IN_PLACE = Table(Arguments, written=("delta", "z"), without=("out",))  # of selective_scan_fn


def check(table: Table, call: Arguments) -> None:
    """Raise unless the arguments are as documented; the contents of tensors are not read."""
    given = table.given(call)
    arguments.check_integer("null_block_id", call.null_block_id)
    arguments.check_integer("block_size", call.block_size)
    if call.block_size < 1:
        raise ValueError(describe("block_size", "a positive number of tokens", call.block_size))
    _check_presence(given)
    _check_shapes(given)
    states = given.get("ssm_states")
    given.check_dtypes()
    if states is not None:
        allowed = dict.fromkeys((given["u"].dtype, torch.float32))
        arguments.check_dtype("ssm_states", states, allowed, "the type of u or float32", written=True)
    arguments.check_saturate(call.saturate, "ssm_states", None if states is None else states.dtype)
    for name in ("A", "ssm_states"):
        if name in given and given[name].shape[-1] > 1:
            arguments.check_contiguous(name, given[name], 1, ("dstate",), name in table.written)
    given.check_strides()
    for name in ("out", "delta", "z"):
        if name in table.written and name in given:
            tensor = given[name]
            if any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride())):
                expected, fix = "distinct elements, as it is written", arguments.allocation(tensor)
                raise ValueError(describe(name, expected, f"strides {tensor.stride()}", fix))


def aligned(tensor: Tensor | None, n_bytes: int) -> bool:
    """Return whether the address, and all strides that matter except for the last, are multiples of `n_bytes`."""
    if tensor is None:
        return True
    outer = zip(tensor.shape[:-1], tensor.stride()[:-1])
    size = tensor.element_size()
    return tensor.data_ptr() % n_bytes == 0 and all(n == 1 or s * size % n_bytes == 0 for n, s in outer)


def spec_of(call: Arguments, ungated: Tensor | None) -> SelectiveScanSpec:
    """Return the spec of a call, with the outputs before the gate in `ungated`."""

    dstate, states = call.A.shape[1], call.ssm_states
    quads = all(aligned(t, QUAD * t.element_size()) for t in (call.A, states) if t is not None)
    rows = (call.u, call.delta, call.B, call.C, call.z, call.out, ungated)
    return SelectiveScanSpec(
        input_dtype=arguments.name_of(call.u.dtype),
        state_dtype=arguments.type_of(states),
        dstate=dstate,
        has_D=call.D is not None,
        has_z=call.z is not None,
        has_bias=call.delta_bias is not None,
        delta_softplus=bool(call.delta_softplus),
        query_dtype=arguments.type_of(call.query_start_loc),
        cache_dtype=arguments.type_of(call.cache_indices),
        has_initial=call.has_initial_state is not None,
        blocks=call.block_idx_first_scheduled_token is not None,
        chunks=call.cu_chunk_seqlen is not None,
        ungated=ungated is not None,
        aligned=all(aligned(tensor, ACCESS_BYTES) for tensor in rows),
        aligned_states=quads and dstate % QUAD == 0,
        saturate=call.saturate,
    )


def _check_presence(given: Given) -> None:
    """Raise if an argument lacks another that it needs."""
    for names in (_BLOCKS, _CHUNKS):
        present = [name for name in names if name in given]
        if present and len(present) < len(names):
            missing = next(name for name in names if name not in given)
            raise ValueError(describe(missing, f"a tensor, as {present[0]} is given", None, "pass all of them or none"))
    needs = {_CHUNKS[0]: _BLOCKS[0], _BLOCKS[0]: "cache_indices", "cache_indices": "ssm_states"}
    needs["has_initial_state"] = "ssm_states"
    for name, needed in needs.items():
        if name in given and needed not in given:
            # a null slot skips a sequence, so cache_indices have a meaning without states
            if name == "cache_indices" and _BLOCKS[0] not in given:
                continue
            raise ValueError(describe(needed, f"a tensor, as {name} is given", None))
    if _BLOCKS[0] in given and given["cache_indices"].dim() != 2:
        shape = tuple(given["cache_indices"].shape)
        raise ValueError(describe("cache_indices", f"shape (batch, blocks), as {_BLOCKS[0]} is given", shape))


def _check_shapes(given: Given) -> None:
    """Raise unless all shapes agree."""
    u, A, B = given["u"], given["A"], given["B"]
    varlen = "query_start_loc" in given
    channels = ("dim", "total") if varlen else ("batch", "dim", "length")
    if u.dim() != len(channels):
        fix = "without query_start_loc sequences have one length" if varlen else "packed ones need query_start_loc"
        raise ValueError(describe("u", f"shape ({', '.join(channels)})", tuple(u.shape), fix))
    given.check_ranks({}, ("A", "query_start_loc", "cu_chunk_seqlen", "ssm_states"))
    if varlen and not given["query_start_loc"].shape[0]:
        raise ValueError(describe("query_start_loc", "shape (batch + 1,)", tuple(given["query_start_loc"].shape)))
    batch = given["query_start_loc"].shape[0] - 1 if varlen else u.shape[0]
    dim, dstate = u.shape[-2], A.shape[1]
    if not 1 <= dstate <= 256:
        raise ValueError(describe("A", "dstate of 1 to 256", f"dstate = {dstate}"))
    columns: tuple[str, ...] = ("ngroups", "dstate", "total") if varlen else ("batch", "ngroups", "dstate", "length")
    if B.dim() not in (len(columns), len(columns) - 1):
        raise ValueError(describe("B", f"shape ({', '.join(columns)})", tuple(B.shape)))
    ngroups = B.shape[-3] if B.dim() == len(columns) else 1
    if ngroups < 1 or dim % ngroups:
        raise ValueError(describe("B", f"ngroups that divides dim = {dim}", f"ngroups = {ngroups}"))
    if B.dim() < len(columns):
        columns = tuple(name for name in columns if name != "ngroups")
    sizes = dict(zip(channels, u.shape)) | {"ngroups": ngroups, "dstate": dstate}
    cache = given.get("cache_indices")
    if cache is not None:
        if cache.dim() not in (1, 2) or cache.shape[0] != batch or (cache.dim() == 2 and not cache.shape[1]):
            expected = f"shape (batch,) = {(batch,)} or (batch, n)"
            raise ValueError(describe("cache_indices", expected, tuple(cache.shape)))
    states = given.get("ssm_states")
    given.check_shapes({
        "channels": {name: sizes[name] for name in channels},
        "columns": {name: sizes[name] for name in columns},
        "cache": {} if cache is None else dict(zip(("batch", "n"), cache.shape)),
        "batch": batch,
        "dim": dim,
        "dstate": dstate,
    })  # fmt: skip
    if states is not None and cache is None and states.shape[0] < batch:
        fix = "pass cache_indices to say which slot each sequence uses"
        raise ValueError(describe("ssm_states", f"at least batch = {batch} slots", states.shape[0], fix))
