"""The arguments of `selective_state_update`: their table, the checks of this operator, and the spec of a call."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import replace
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops._table import FLOAT32, INDICES, Arg, Given, Table
from cute_ssm.ops.selective_state_update.config import input_vector
from cute_ssm.ops.selective_state_update.spec import SelectiveStateUpdateSpec
from cute_ssm.spec import FLOATS, QUANTISED

STATES = (*FLOATS, *QUANTISED)
TOKENS = {"one": ("batch",), "batched": ("batch", "T"), "packed": ("total",)}  # axes of each layout of tokens
X_SHAPES = {
    "packed": "(total, nheads, dim) with cu_seqlens",
    "dense": "(batch, nheads, dim) or (batch, T, nheads, dim) without cu_seqlens",
}
BULK_BYTES = 16  # bulk copies: addresses and sizes are multiples of it
UNLIMITED = 2**31 - 1

Row = Arg("*tokens nheads dim", like="x", contiguous=1)  # one per head and token
Column = Arg("*tokens ngroups dstate", like="x", contiguous=1)
Pool = Arg("slots nheads dim dstate", STATES, contiguous=2, align=BULK_BYTES, written=True)


class Arguments(NamedTuple):
    """The arguments of a call in the order of the schema, which starts with the kernel's tensors.

    All axes are there: the operator has inserted those that the caller left out.
    """

    state: Annotated[Tensor, Pool]
    x: Annotated[Tensor, Arg("*tokens nheads dim", FLOATS, contiguous=1)]
    dt: Annotated[Tensor, Arg("*tokens nheads dim", FLOATS)]
    A: Annotated[Tensor, Arg("nheads dim dstate", FLOATS)]
    B: Annotated[Tensor, Column]
    C: Annotated[Tensor, Column]
    D: Annotated[Tensor | None, Arg("nheads dim", FLOATS)]
    z: Annotated[Tensor | None, Row]
    dt_bias: Annotated[Tensor | None, Arg("nheads dim", FLOATS)]
    out: Annotated[Tensor, replace(Row, written=True)]
    state_scale: Annotated[Tensor | None, Arg("slots nheads dim", FLOAT32, contiguous=1, written=True)]
    state_batch_indices: Annotated[Tensor | None, Arg("*src", INDICES)]
    dst_state_batch_indices: Annotated[Tensor | None, Arg("*dst", INDICES)]
    num_accepted_tokens: Annotated[Tensor | None, Arg("batch", INDICES)]
    cu_seqlens: Annotated[Tensor | None, Arg("batch+1", INDICES)]
    intermediate_states_buffer: Annotated[
        Tensor | None, replace(Pool, shape="rows steps nheads dim dstate", dtypes=(), like="state")
    ]
    intermediate_state_indices: Annotated[Tensor | None, Arg("batch", INDICES)]
    intermediate_state_scales: Annotated[
        Tensor | None, Arg("rows steps nheads dim", FLOAT32, contiguous=1, written=True)
    ]
    rand_seed: Annotated[Tensor | None, Arg("seeds", ("int64",))]
    dt_softplus: bool
    disable_state_update: bool
    zero_padding: bool
    philox_rounds: int
    cache_steps: int
    pad_slot_id: int
    saturate: bool = False


TABLE = Table(Arguments)


def check(call: Arguments) -> SelectiveStateUpdateSpec:
    """Raise unless the call is as the operator documents it; return its spec."""
    given = TABLE.given(call)
    for setting in ("pad_slot_id", "cache_steps", "philox_rounds"):
        arguments.check_integer(setting, getattr(call, setting))
    _check_combinations(given, call)
    tokens = _check_shapes(given)
    given.check_dtypes()
    given.check_strides()
    if call.rand_seed is not None and call.rand_seed.shape[0] > 1:
        arguments.check_last_contiguous("rand_seed", call.rand_seed)
    given.check_written()
    A = call.A
    if not _tied(A) and A.stride(-1) != 1:
        expected = "strides 0 in the last two dimensions (one value per head) or stride 1 in the last"
        raise ValueError(describe("A", expected, f"strides {A.stride()}", "pass A.contiguous()"))
    spec = _spec(call, tokens)
    spec.check()
    vectors = (call.B, call.C) if spec.A_tied else (A, call.B, call.C)
    if all(arguments.aligned(t, input_vector(spec, t.element_size()) * t.element_size()) for t in vectors):
        spec = dataclasses.replace(spec, vector_inputs=True)
    return spec


_warned: set[tuple[object, ...]] = set()


def warn_of_dense_A(spec: SelectiveStateUpdateSpec, A: Tensor) -> None:
    """Warn once if ``A`` is dense while there is one step size per head, as in Mamba-2.

    On the CPU, warn only if ``A`` holds one value per head.  The contents of tensors on a GPU are never read, so there
    the layout alone decides.
    """
    key = (A.shape, A.stride(), A.dtype, A.device.type)
    if spec.A_tied or not spec.dt_tied or key in _warned or not A.numel():
        return
    if not A.is_cuda and not bool((A == A[..., :1, :1]).all()):
        return
    _warned.add(key)
    warnings.warn(
        f"A: strides {A.stride()}, with one step size per head.  If A also holds one value per head, as in Mamba-2, "
        "pass A[..., :1, :1].expand(A.shape): the kernel for a dense A runs about twice the instructions",
        stacklevel=6,
    )


def limit(call: Arguments) -> int:
    """Return the largest number of tokens that a sequence may have."""
    if call.cu_seqlens is None:
        return call.x.shape[1] if call.x.dim() == 4 else 1
    bounds = [min(call.cache_steps or UNLIMITED, UNLIMITED)]
    dst, buffer = call.dst_state_batch_indices, call.intermediate_states_buffer
    if dst is not None and dst.dim() == 2:
        bounds.append(dst.shape[1])
    if buffer is not None:
        bounds.append(buffer.shape[1])
    return min(bounds)


def check_contents(call: Arguments) -> None:
    """Raise on indices and lengths that do not fit; called for tensors on the CPU, whose contents can be read.

    Indices of sequences that are padding or have no tokens, and columns that no token uses, are never read.
    """
    slots, pad = call.state.shape[0], call.pad_slot_id
    lengths = _lengths(call)
    src_slots, active = torch.arange(len(lengths)), lengths > 0
    if call.state_batch_indices is not None:
        used = active
        src_slots = call.state_batch_indices
        if call.num_accepted_tokens is not None:
            used = torch.zeros_like(src_slots, dtype=torch.bool)
            columns = _columns(call.num_accepted_tokens, src_slots, active, pad)
            used[active, columns[active]] = True
            src_slots = src_slots[torch.arange(len(src_slots)), columns]
        arguments.check_slots("state_batch_indices", call.state_batch_indices, used, slots, pad)
        src_slots = src_slots.long()
        active = active & (src_slots != pad)
    if call.intermediate_states_buffer is not None:
        name, rows = "state_batch_indices", src_slots
        if call.intermediate_state_indices is not None:
            name, rows = "intermediate_state_indices", call.intermediate_state_indices.long()
            arguments.check_slots(name, rows, active, call.intermediate_states_buffer.shape[0], None)
        _check_distinct(name, rows[active], "rows of intermediate_states_buffer")
    if call.disable_state_update:
        return
    name, dst_slots, used = "state_batch_indices", src_slots, active
    if call.dst_state_batch_indices is not None:
        name, dst_slots = "dst_state_batch_indices", call.dst_state_batch_indices.long()
        if dst_slots.dim() == 2:
            used = active[:, None] & (torch.arange(dst_slots.shape[1]) < lengths[:, None])
        arguments.check_slots(name, dst_slots, used, slots, pad)
        used = used & (dst_slots != pad)
    written = dst_slots[used]
    _check_distinct(name, written, "slots")
    writer, reader = used.nonzero()[:, 0], active.nonzero()[:, 0]
    foreign = (written[:, None] == src_slots[active]) & (writer[:, None] != reader)
    if bool(foreign.any()):
        fix = "the order of reads and writes of different sequences is undefined"
        got = int(written[foreign.any(1)][0])
        raise ValueError(describe(name, "slots that no other sequence reads", got, fix))


def _lengths(call: Arguments) -> Tensor:
    """Return the number of tokens of each sequence; raise if ``cu_seqlens`` does not fit."""
    cu, x = call.cu_seqlens, call.x
    if cu is None:
        return torch.full((x.shape[0],), x.shape[1] if x.dim() == 4 else 1)
    lengths = cu.long().diff()
    if int(cu[0]) < 0 or int(cu[-1]) > x.shape[0] or bool((lengths < 0).any()):
        raise ValueError(describe("cu_seqlens", f"non-decreasing offsets of at most {x.shape[0]} tokens", cu.tolist()))
    bound, longest = limit(call), max(lengths.tolist(), default=0)
    if longest > bound:
        fix = "raise cache_steps, and give dst_state_batch_indices and intermediate_states_buffer as many steps"
        raise ValueError(describe("cu_seqlens", f"sequences of at most {bound} tokens", f"one of {longest}", fix))
    return lengths


def _columns(num_accepted: Tensor, indices: Tensor, active: Tensor, pad: int) -> Tensor:
    """Return the column of each sequence's first state; sequences that are padding may have any number."""
    most = indices.shape[1]
    bad = (active & (num_accepted > most) & (indices != pad).any(1)).nonzero()[:, 0]
    if len(bad):
        expected, at = f"at most {most}, the columns of state_batch_indices", int(bad[0])
        raise ValueError(describe("num_accepted_tokens", expected, f"{int(num_accepted[at])} at position {at}"))
    return (num_accepted.long() - 1).clamp(0, most - 1)


def _check_distinct(name: str, indices: Tensor, what: str) -> None:
    """Raise if two states are written to the same index."""
    ordered = indices.sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        got = f"{int(repeated[0])} more than once"
        raise ValueError(describe(name, f"distinct {what}", got, "each holds one state"))


def _has_columns(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dim() == 2 and tensor.shape[1] > 0


def _matrix(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dim() == 2


def _tied(tensor: Tensor) -> bool:
    return tensor.stride(-1) == 0 and tensor.stride(-2) == 0


def _spec(call: Arguments, tokens: str) -> SelectiveStateUpdateSpec:
    """Return the spec of a call, for rows that are not aligned."""

    return SelectiveStateUpdateSpec(
        state_dtype=arguments.name_of(call.state.dtype),
        input_dtype=arguments.name_of(call.x.dtype),
        A_dtype=arguments.name_of(call.A.dtype),
        dt_dtype=arguments.name_of(call.dt.dtype),
        D_dtype=arguments.type_of(call.D),
        dt_bias_dtype=arguments.type_of(call.dt_bias),
        dim=call.state.shape[2],
        dstate=call.state.shape[3],
        A_tied=_tied(call.A),
        dt_tied=call.dt.stride(-1) == 0 and (call.dt_bias is None or call.dt_bias.stride(-1) == 0),
        D_tied=call.D is not None and call.D.stride(-1) == 0,
        has_z=call.z is not None,
        dt_softplus=call.dt_softplus,
        src_dtype=arguments.type_of(call.state_batch_indices),
        dst_dtype=arguments.type_of(call.dst_state_batch_indices),
        update_state=not call.disable_state_update,
        zero_padding=call.zero_padding and call.state_batch_indices is not None,
        vector_inputs=False,
        tokens=tokens,
        accepted_dtype=arguments.type_of(call.num_accepted_tokens),
        cu_dtype=arguments.type_of(call.cu_seqlens),
        src_columns=_matrix(call.state_batch_indices),
        dst_columns=_matrix(call.dst_state_batch_indices),
        intermediates=call.intermediate_states_buffer is not None,
        intermediate_dtype=arguments.type_of(call.intermediate_state_indices),
        philox_rounds=call.philox_rounds if call.rand_seed is not None else 0,
        seed_per_slot=call.rand_seed is not None and call.rand_seed.shape[0] != 1,
        saturate=call.saturate,
    )


def _check_combinations(given: Given, call: Arguments) -> None:
    """Raise on arguments that exclude or require each other."""

    def refuse(name: str, expected: str, got: object, fix: str = "") -> None:
        raise ValueError(describe(name, expected, got, fix))

    arguments.check_saturate(call.saturate, "state", given["state"].dtype)
    quantised = arguments.name_of(given["state"].dtype) in QUANTISED
    if quantised and "state_scale" not in given:
        refuse("state_scale", f"scales of a state of {arguments.name_of(given['state'].dtype)}", None)
    if "state_scale" in given and not quantised:
        refuse("state_scale", f"None with a state of {arguments.name_of(given['state'].dtype)}", "a tensor")
    if "intermediate_states_buffer" in given:
        if "dst_state_batch_indices" in given:
            fix = "pass one of them as the destination of the states after every token"
            refuse("dst_state_batch_indices", "None with intermediate_states_buffer", "both", fix)
        if quantised and "intermediate_state_scales" not in given:
            refuse("intermediate_state_scales", "scales for intermediate_states_buffer", None)
    for name in ("intermediate_state_indices", "intermediate_state_scales"):
        if name in given and "intermediate_states_buffer" not in given:
            refuse(name, "None without intermediate_states_buffer", "a tensor")
    if "intermediate_state_scales" in given and not quantised:
        refuse("intermediate_state_scales", "None with a state that has no scales", "a tensor")
    if "num_accepted_tokens" in given and (
        "state_batch_indices" not in given or given["state_batch_indices"].dim() != 2
    ):
        fix = "the state to start from is column num_accepted_tokens - 1"
        refuse("num_accepted_tokens", "None without a matrix of state_batch_indices", "a tensor", fix)
    one = "cu_seqlens" not in given and given["x"].dim() == 3
    if "num_accepted_tokens" not in given and _has_columns(given.get("state_batch_indices")):
        refuse("state_batch_indices", "a vector without num_accepted_tokens", "a matrix", "pass its column 0")
    if one and _has_columns(given.get("dst_state_batch_indices")):
        refuse("dst_state_batch_indices", "a vector with one token per sequence", "a matrix", "pass its column 0")
    if call.cache_steps < 0:
        refuse("cache_steps", "0 or more", call.cache_steps)
    if "rand_seed" in given and call.philox_rounds < 1:
        refuse("philox_rounds", "1 or more with rand_seed", call.philox_rounds)


def _check_shapes(given: Given) -> str:
    """Raise unless all shapes agree; return the layout of tokens."""
    packed = "cu_seqlens" in given
    layout = "packed" if packed else "batched" if given["x"].dim() == 4 else "one"
    axes = TOKENS[layout]
    if given["x"].dim() != len(axes) + 2:
        expected = f"shape {X_SHAPES['packed' if packed else 'dense']}"
        raise ValueError(describe("x", expected, tuple(given["x"].shape)))
    given.check_ranks({"tokens": dict.fromkeys(axes, 0)}, ("state", "B", "cu_seqlens", "intermediate_states_buffer"))
    slots, nheads, dim, dstate = given["state"].shape
    if not (nheads and dim and dstate):
        raise ValueError(describe("state", "at least one head, row and column", tuple(given["state"].shape)))
    tokens = dict(zip(axes, given["x"].shape))
    batch = given["cu_seqlens"].shape[0] - 1 if packed else tokens["batch"]
    if batch < 0:
        raise ValueError(describe("cu_seqlens", "at least one offset", "none"))
    ngroups = given["B"].shape[-2]
    if ngroups < 1 or nheads % ngroups:
        raise ValueError(describe("B", f"ngroups that divides nheads = {nheads}", f"ngroups = {ngroups}"))
    _check_index_shapes(given, batch, tokens.get("T"))
    seed = given.get("rand_seed")
    if seed is not None and (seed.dim() != 1 or seed.shape[0] not in (1, slots)):
        raise ValueError(describe("rand_seed", f"shape (1,) or (slots,) = ({slots},)", tuple(seed.shape)))
    sizes: dict[str, int | dict[str, int]] = {
        "tokens": tokens, "batch": batch, "nheads": nheads, "ngroups": ngroups, "dim": dim, "dstate": dstate,
        "slots": slots,
    }  # fmt: skip
    for name, index in (("src", "state_batch_indices"), ("dst", "dst_state_batch_indices")):
        if index in given:
            sizes[name] = dict(zip(("batch", "n"), given[index].shape))
    buffer = given.get("intermediate_states_buffer")
    if buffer is not None:
        sizes |= {"rows": buffer.shape[0], "steps": buffer.shape[1]}
    given.check_shapes(sizes)
    if slots < batch and "state_batch_indices" not in given:
        fix = "pass state_batch_indices to say which slot each sequence uses"
        raise ValueError(describe("state", f"at least batch = {batch} slots", slots, fix))
    if buffer is not None and "intermediate_state_indices" not in given and buffer.shape[0] < slots:
        fix = "pass intermediate_state_indices to say which row each sequence uses"
        raise ValueError(
            describe("intermediate_states_buffer", f"a row for each of {slots} slots", buffer.shape[0], fix)
        )
    return layout


def _check_index_shapes(given: Given, batch: int, T: int | None) -> None:
    """Raise unless indices have a row for each sequence and, where there are columns, one for each of T tokens."""
    for name in ("state_batch_indices", "dst_state_batch_indices"):
        if name not in given:
            continue
        shape = tuple(given[name].shape)
        if len(shape) not in (1, 2) or shape[0] != batch:
            raise ValueError(describe(name, f"shape (batch,) = ({batch},) or (batch, n)", shape))
        if len(shape) == 2 and (shape[1] < 1 or (T is not None and name[0] == "d" and shape[1] < T)):
            raise ValueError(describe(name, f"a column for each of T = {T or 1} tokens", shape))
    buffer = given.get("intermediate_states_buffer")
    if buffer is not None and T is not None and buffer.shape[1] < T:
        raise ValueError(describe("intermediate_states_buffer", f"at least T = {T} steps", buffer.shape[1]))
