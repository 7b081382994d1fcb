"""The arguments of `checkpointing_ssu` and `checkpointing_ssu_ring`: their table, further checks, and their spec."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops._dlpack import not_tensor
from cute_ssm.ops._table import FLOAT32, INDICES, INT32, Arg, Given, Table, spelled
from cute_ssm.ops.checkpointing_ssu.spec import EARLY_READS, WAIT_FIRST, CheckpointingSSUSpec
from cute_ssm.spec import FLOATS, QUANTISED

D_SPLITS = (1, 2, 4)
ROW_BYTES = 16  # bulk copies: addresses and sizes are multiples of it
TILE_ROWS = 16  # of a tensor-core product
TOKENS = {False: ("batch", "T"), True: ("1", "total")}  # axes of tokens, without and with cu_seqlens
X_HISTORY = {
    "double": ("slots", "W", "nheads", "dim"),
    "double_x": ("slots", "2", "W", "nheads", "dim"),
    "ring": ("slots", "nheads", "rows", "dim"),
}
B_HISTORY = {False: ("slots", "2", "W", "ngroups", "dstate"), True: ("slots", "ngroups", "rows", "dstate")}
DT_HISTORY = {False: ("slots", "2", "nheads", "W"), True: ("slots", "nheads", "rows")}

Row = Arg("*tokens nheads dim", like="x", contiguous=2)  # one per head and token
Column = Arg("*tokens ngroups dstate", like="x", contiguous=2)
Cache = Arg("*x_history", like="x", contiguous=1, align=ROW_BYTES, written=True)
Cursor = Arg("slots", INT32, contiguous=1)


class Arguments(NamedTuple):
    """The arguments of a call of either operator in the order of the schema, the tensors in that of the kernel."""

    state: Annotated[
        Tensor, Arg("slots nheads dim dstate", (*FLOATS, *QUANTISED), contiguous=3, align=ROW_BYTES, written=True)
    ]
    x_history: Annotated[Tensor, Cache]
    B_history: Annotated[Tensor, replace(Cache, shape="*B_history")]
    dt_history: Annotated[Tensor, Arg("*dt_history", FLOAT32, contiguous=1, written=True)]
    cum_history: Annotated[Tensor | None, Arg("*dt_history", FLOAT32, contiguous=1, written=True)]
    cursor: Annotated[Tensor, Cursor]
    prev_num_accepted_tokens: Annotated[Tensor, Cursor]
    x: Annotated[Tensor, Arg("*tokens nheads dim", FLOATS[1:], contiguous=2)]
    dt: Annotated[Tensor, Arg("*tokens nheads dim", FLOATS)]
    A: Annotated[Tensor, Arg("nheads dim dstate", FLOATS)]
    B: Annotated[Tensor, Column]
    C: Annotated[Tensor, Column]
    D: Annotated[Tensor | None, Arg("nheads dim", FLOATS)]
    z: Annotated[Tensor | None, Row]
    dt_bias: Annotated[Tensor | None, Arg("nheads dim", FLOATS)]
    out: Annotated[Tensor, replace(Row, written=True)]
    state_scale: Annotated[Tensor | None, Arg("slots nheads dim", FLOAT32, contiguous=2, align=ROW_BYTES, written=True)]
    state_batch_indices: Annotated[Tensor | None, Arg("batch", INDICES)]
    cu_seqlens: Annotated[Tensor | None, Arg("batch+1", INDICES)]
    rand_seed: Annotated[Tensor | None, Arg("seeds", ("int64",), contiguous=1)]
    work_items: Annotated[Tensor | None, Arg("batch 4", INT32, contiguous=2)]
    num_writes: Annotated[Tensor | None, Arg("1", INT32, contiguous=1)]
    ring: bool
    dt_softplus: bool
    pad_slot_id: int
    philox_rounds: int
    d_split: int | None
    max_seqlen: int | None
    window: int | None
    pdl: str | None
    saturate: bool = False


TABLE = Table(Arguments)

# Argument -> its name in the two signatures.
DOUBLE = {
    "x_history": "old_x",
    "B_history": "old_B",
    "dt_history": "old_dt",
    "cum_history": "old_cumAdt",
    "cursor": "cache_buf_idx",
}
RING = {"x_history": "x_cache", "B_history": "B_cache", "dt_history": "dt_cache", "cursor": "ring_start"}
TIED = {"dt": 1, "A": 2, "D": 1, "dt_bias": 1}  # one value per head, and its dimensions of stride 0


def check(call: Arguments) -> tuple[Arguments, CheckpointingSSUSpec]:
    """Raise unless the call is as its operator documents it.

    Returns
    -------
    call : Arguments
        The same call, with the usual strides in dimensions of size 1, where PyTorch allows any.
    spec : CheckpointingSSUSpec
    """
    given = TABLE.given(call, RING if call.ring else DOUBLE)
    if not call.ring and call.cum_history is None:
        raise not_tensor("old_cumAdt", None)
    _check_settings(call)
    _check_combinations(given, call)
    tokens, window = _check_shapes(given, call)
    given.check_dtypes()
    tensors: dict[str, Any] = {name: _usual_strides(tensor) for name, tensor in given.items()}
    given.update(tensors)
    call = call._replace(**tensors)
    _check_strides(given, call.ring)
    spec = _spec(call, tokens, window)
    spec.check()
    if call.d_split is not None and spec.dim % (TILE_ROWS * call.d_split):
        expected = f"None, or parts of dim = {spec.dim} that are multiples of {TILE_ROWS} rows"
        raise ValueError(describe("d_split", expected, call.d_split))
    return call, spec


def pdl_of(enable_pdl: object) -> str | None:
    """Return the kind of launch that an argument ``enable_pdl`` asks for."""
    if enable_pdl is False:
        return None
    if enable_pdl is True:
        return WAIT_FIRST
    if enable_pdl == EARLY_READS:
        return EARLY_READS
    raise ValueError(describe("enable_pdl", f"False, True or {EARLY_READS!r}", repr(enable_pdl)))


def batch_of(call: Arguments) -> int:
    """Return the number of sequences of a call."""
    packed = call.cu_seqlens
    return call.x.shape[0] if packed is None else packed.shape[0] - 1


def input_bytes(call: Arguments) -> int:
    """Return what rows of new tokens and of outputs are multiples of: `CheckpointingSSUSpec.input_bytes`."""
    rows = (call.x, call.B, call.C, call.z, call.out)
    return arguments.common_alignment(rows, ROW_BYTES) if call.x.numel() else ROW_BYTES


def check_contents(call: Arguments, spec: CheckpointingSSUSpec) -> None:
    """Raise on indices, cursors and lengths that do not fit; called for tensors on the CPU, whose contents can be read.

    Padding and sequences without tokens may hold anything.
    """
    o, batch = call, batch_of(call)
    lengths = _lengths(call, spec)
    if o.work_items is not None:
        name, positions = "work_items", o.work_items[:, 0].long()
        if positions.sort().values.tolist() != list(range(batch)):
            expected = f"every position in the batch, 0 to {batch - 1}, once in column 0"
            raise ValueError(describe(name, expected, positions.tolist()))
        lengths, slots = lengths[positions], o.work_items[:, 1].long()
    else:
        name = "state_batch_indices"
        slots = torch.arange(batch) if o.state_batch_indices is None else o.state_batch_indices.long()
    active = (lengths > 0) & (slots != call.pad_slot_id)
    arguments.check_slots(name, slots, active, o.state.shape[0], call.pad_slot_id)
    lengths, slots = lengths[active], slots[active]
    ordered = slots.sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        got = f"{int(repeated[0])} more than once"
        raise ValueError(describe(name, "distinct slots", got, "each holds one state"))
    if o.work_items is not None:
        pending, cursors = o.work_items[active, 2], o.work_items[active, 3]
    else:
        pending, cursors = o.prev_num_accepted_tokens[slots], o.cursor[slots]
    end = o.dt_history.shape[-1] if call.ring else 2
    cursor_name = (RING if call.ring else DOUBLE)["cursor"]
    for what, values, high in (("prev_num_accepted_tokens", pending, spec.window), (cursor_name, cursors, end - 1)):
        outside = ((values < 0) | (values > high)).nonzero()
        if len(outside):
            at = int(outside[0])
            got = f"{int(values[at])} of slot {int(slots[at])}"
            raise ValueError(describe(what, f"values in [0, {high}]", got))
    if o.num_writes is not None:
        writes = torch.zeros_like(active)
        writes[active] = pending + lengths > spec.window
        count = int(writes.sum())
        if int(o.num_writes) != count or not bool(writes[:count].all()):
            got = f"num_writes = {int(o.num_writes)} and writes at {writes.nonzero()[:, 0].tolist()}"
            expected = f"the {count} sequences that write their state first, and num_writes = {count}"
            raise ValueError(describe(name, expected, got, "build it anew from the cursors of this step"))


def _lengths(call: Arguments, spec: CheckpointingSSUSpec) -> Tensor:
    """Return the tokens of each sequence; raise if ``cu_seqlens`` does not fit."""
    if call.cu_seqlens is None:
        return torch.full((call.x.shape[0],), call.x.shape[1])
    offsets, total = call.cu_seqlens.long(), call.x.shape[1]
    first, last = offsets[:-1], offsets[1:]
    lengths = last - first
    active = lengths > 0
    if bool((active & ((first < 0) | (last > total))).any()):
        raise ValueError(describe("cu_seqlens", f"offsets from 0 to {total} tokens", offsets.tolist()))
    longest = int(lengths.max()) if len(lengths) else 0
    if longest > spec.tokens:
        fix = "raise max_seqlen"
        raise ValueError(describe("cu_seqlens", f"sequences of at most {spec.tokens} tokens", f"one of {longest}", fix))
    order = first[active].argsort()
    if bool((first[active][order][1:] < last[active][order][:-1]).any()):
        raise ValueError(describe("cu_seqlens", "sequences that share no token", offsets.tolist()))
    return lengths


def _check_settings(call: Arguments) -> None:
    for name in ("pad_slot_id", "philox_rounds"):
        arguments.check_integer(name, getattr(call, name))
    for name in ("d_split", "max_seqlen", "window"):
        arguments.check_integer(name, getattr(call, name), optional=True)
    for name in ("max_seqlen", "window"):
        value = getattr(call, name)
        if value is not None and value < 1:
            raise ValueError(describe(name, "1 or more", value))
    if call.d_split not in (None, *D_SPLITS):
        raise ValueError(describe("d_split", "None or " + " or ".join(map(str, D_SPLITS)), call.d_split))
    if call.rand_seed is not None and call.philox_rounds < 1:
        raise ValueError(describe("philox_rounds", "1 or more with rand_seed", call.philox_rounds))


def _check_combinations(given: Given, call: Arguments) -> None:
    """Raise on arguments that exclude or need each other."""

    def refuse(name: str, expected: str, got: object, fix: str = "") -> None:
        raise ValueError(describe(name, expected, got, fix))

    arguments.check_saturate(call.saturate, "state", given["state"].dtype)
    state_dtype = arguments.name_of(given["state"].dtype)
    if state_dtype in QUANTISED and "state_scale" not in given:
        refuse("state_scale", f"scales of a state of {state_dtype}", None)
    if "state_scale" in given and state_dtype not in QUANTISED:
        refuse("state_scale", f"None with a state of {state_dtype}", "a tensor")
    if "rand_seed" in given and state_dtype == "float32":
        refuse("rand_seed", "None with a float32 state, which is not rounded", "a tensor")
    for name, other in (("work_items", "num_writes"), ("num_writes", "work_items")):
        if name in given and other not in given:
            refuse(other, f"a tensor with {name}", None, "cute_ssm.serving.build_work_items makes both")
    if "cu_seqlens" not in given and call.max_seqlen is not None:
        refuse("max_seqlen", "None without cu_seqlens", call.max_seqlen, "x.size(1) is the number of tokens")
    if "cu_seqlens" in given and call.max_seqlen is None and call.ring:
        fix = "the rows of a ring do not say which of them are for new tokens"
        refuse("max_seqlen", "the largest number of tokens of a sequence with cu_seqlens", None, fix)


def _check_shapes(given: Given, call: Arguments) -> tuple[int, int]:
    """Raise unless all shapes agree; return the bounds (T, W) of new and of pending tokens."""
    packed = "cu_seqlens" in given
    shape, rank = tuple(call.x.shape), call.x_history.dim()
    if packed and (len(shape) != 4 or shape[0] != 1):
        raise ValueError(describe("x", "shape (1, total, nheads, dim) with cu_seqlens", shape, "pass x.unsqueeze(0)"))
    kind = "ring" if call.ring else "double_x" if rank == 5 else "double"
    if not call.ring and rank not in (4, 5):
        forms = " or ".join(spelled(list(X_HISTORY[kind])) for kind in ("double", "double_x"))
        raise ValueError(describe("old_x", f"shape {forms}", tuple(call.x_history.shape)))
    axes = {
        "tokens": dict.fromkeys(TOKENS[packed], 0),
        "x_history": dict.fromkeys(X_HISTORY[kind], 0),
    }
    given.check_ranks(axes, ("state", "x", "B", "x_history", "cu_seqlens"))
    slots, nheads, dim, dstate = given["state"].shape
    if not (nheads and dim and dstate):
        raise ValueError(describe("state", "at least one head, row and column", tuple(given["state"].shape)))
    first = tuple(given["x"].shape[:2])
    batch = given["cu_seqlens"].shape[0] - 1 if packed else first[0]
    if batch < 0:
        raise ValueError(describe("cu_seqlens", "at least one offset", "none"))
    ngroups = given["B"].shape[2]
    if ngroups < 1 or nheads % ngroups:
        raise ValueError(describe("B", f"ngroups that divides nheads = {nheads}", f"ngroups = {ngroups}"))
    tokens, window = _bounds(given, call)
    seed = given.get("rand_seed")
    if seed is not None and (seed.dim() != 1 or seed.shape[0] not in (1, slots)):
        raise ValueError(describe("rand_seed", f"shape (1,) or (slots,) = ({slots},)", tuple(seed.shape)))
    sizes = {
        "slots": slots, "nheads": nheads, "ngroups": ngroups, "dim": dim, "dstate": dstate, "batch": batch,
        "W": window, "rows": given["x_history"].shape[2], "2": 2,
    }  # fmt: skip
    given.check_shapes(
        {
            **sizes,
            "tokens": dict(zip(TOKENS[packed], first)),
            "x_history": {axis: sizes[axis] for axis in X_HISTORY[kind]},
            "B_history": {axis: sizes[axis] for axis in B_HISTORY[call.ring]},
            "dt_history": {axis: sizes[axis] for axis in DT_HISTORY[call.ring]},
        }
    )
    if slots < batch and "state_batch_indices" not in given and "work_items" not in given:
        fix = "pass state_batch_indices to say which slot each sequence uses"
        raise ValueError(describe("state", f"at least batch = {batch} slots", slots, fix))
    return tokens, window


def _bounds(given: Given, call: Arguments) -> tuple[int, int]:
    """Return the bounds (T, W) of new and of pending tokens."""
    x_history = given["x_history"]
    if "cu_seqlens" not in given:
        tokens = given["x"].shape[1]
        if tokens < 1:
            raise ValueError(describe("x", "at least one token per sequence", tuple(given["x"].shape)))
    else:
        tokens = call.max_seqlen or x_history.shape[-3]
    if not call.ring:
        window = x_history.shape[-3]
        if window < 1:
            raise ValueError(describe("old_x", "W of at least one row", tuple(x_history.shape)))
        return tokens, window
    rows = x_history.shape[2]
    window = rows - tokens if call.window is None else call.window
    if window < 1 or window + tokens > rows:
        least = (call.window or 1) + tokens
        expected = f"at least W + T = {least} rows of a ring"
        raise ValueError(describe("x_cache", expected, rows, "new tokens must not overwrite pending ones"))
    return tokens, window


def _usual_strides(tensor: Tensor) -> Tensor:
    """Return the tensor with dimensions of size 1 as far apart as their contents are long."""
    strides, changed = list(tensor.stride()), False
    for i in range(tensor.dim() - 1, -1, -1):
        if tensor.shape[i] == 1:
            usual = 1 if i == tensor.dim() - 1 else strides[i + 1] * tensor.shape[i + 1]
            changed |= strides[i] != usual
            strides[i] = usual
    return tensor.as_strided(tensor.shape, strides) if changed else tensor


def _check_strides(given: Given, ring: bool) -> None:
    """Raise unless all tensors lie in memory as the kernel reads them, and none that is written overlaps itself."""
    for name, count in TIED.items():
        if name in given:
            arguments.check_tied(name, given[name], count, given["state"])
    if not ring:  # tokens are rows of all heads, or groups
        for name, axes in (("x_history", X_HISTORY["double"]), ("B_history", B_HISTORY[ring])):
            arguments.check_contiguous(given.public(name), given[name], 2, axes, written=True)
    given.check_strides()
    items = given.get("work_items")
    if items is not None and items.data_ptr() % ROW_BYTES:
        expected = f"an address that is a multiple of {ROW_BYTES} bytes"
        fix = f"cute_ssm.serving.build_work_items makes one: {arguments.allocation(items)}"
        raise ValueError(describe("work_items", expected, f"{items.data_ptr():#x}", fix))
    given.check_written()


def _spec(call: Arguments, tokens: int, window: int) -> CheckpointingSSUSpec:
    return CheckpointingSSUSpec(
        state_dtype=arguments.name_of(call.state.dtype),
        input_dtype=arguments.name_of(call.x.dtype),
        A_dtype=arguments.name_of(call.A.dtype),
        dt_dtype=arguments.name_of(call.dt.dtype),
        D_dtype=arguments.type_of(call.D),
        dt_bias_dtype=arguments.type_of(call.dt_bias),
        heads=call.state.shape[1],
        groups=call.B.shape[2],
        dim=call.state.shape[2],
        dstate=call.state.shape[3],
        tokens=tokens,
        window=window,
        history="ring" if call.ring else "double_x" if call.x_history.dim() == 5 else "double",
        has_z=call.z is not None,
        dt_softplus=call.dt_softplus,
        src_dtype=arguments.type_of(call.state_batch_indices),
        cu_dtype=arguments.type_of(call.cu_seqlens),
        work_items=call.work_items is not None,
        philox_rounds=call.philox_rounds if call.rand_seed is not None else 0,
        seed_per_slot=call.rand_seed is not None and call.rand_seed.shape[0] != 1,
        saturate=call.saturate,
        pdl=call.pdl,
        input_bytes=input_bytes(call),
    )
