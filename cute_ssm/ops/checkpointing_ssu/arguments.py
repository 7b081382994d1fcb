"""Validation of `checkpointing_ssu` and `checkpointing_ssu_ring`: the arguments of a call to its spec."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops.checkpointing_ssu.spec import EARLY_READS, WAIT_FIRST, CheckpointingSSUSpec
from cute_ssm.spec import QUANTISED

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = FLOATS[1:]
STATES = (*FLOATS, torch.int16, torch.int8, torch.float8_e4m3fn)
INTEGERS = (torch.int32, torch.int64)
D_SPLITS = (1, 2, 4)
ITEM = 4  # position in the batch, slot, accepted tokens, cursor
ROW_BYTES = 16  # of a vector access, and of what a bulk copy is a multiple of
TILE_ROWS = 16  # of a tensor-core product


class Operands(NamedTuple):
    """The tensors of a call in the order of the kernel's arguments, for both contracts."""

    state: Tensor
    x_history: Tensor
    B_history: Tensor
    dt_history: Tensor
    cum_history: Tensor | None
    cursor: Tensor
    prev_num_accepted_tokens: Tensor
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    out: Tensor
    state_scale: Tensor | None
    state_batch_indices: Tensor | None
    cu_seqlens: Tensor | None
    rand_seed: Tensor | None
    work_items: Tensor | None
    num_writes: Tensor | None


class Settings(NamedTuple):
    """The arguments of a call that are no tensors, and which of the two operators it is of."""

    ring: bool
    dt_softplus: bool
    pad_slot_id: int
    philox_rounds: int
    d_split: int | None
    max_seqlen: int | None
    window: int | None
    pdl: str | None
    saturate: bool


# Operand -> its name in the two signatures.
DOUBLE = {
    "x_history": "old_x",
    "B_history": "old_B",
    "dt_history": "old_dt",
    "cum_history": "old_cumAdt",
    "cursor": "cache_buf_idx",
}
RING = {"x_history": "x_cache", "B_history": "B_cache", "dt_history": "dt_cache", "cursor": "ring_start"}
HISTORY = tuple(DOUBLE)[:4]
WRITTEN = ("state", "state_scale", "out", *HISTORY)
OPTIONAL = (
    "D", "z", "dt_bias", "state_scale", "state_batch_indices", "cu_seqlens", "rand_seed", "work_items", "num_writes",
)  # fmt: skip
TIED = {"dt": 1, "A": 2, "D": 1, "dt_bias": 1}  # one value per head, and its dimensions of stride 0
POOLED = ("state", "state_scale", "x_history", "B_history")  # rows that are copied in bulk, or by vectors
VECTORS = ("cursor", "prev_num_accepted_tokens", "rand_seed", "num_writes")


def check(operands: Operands, settings: Settings) -> tuple[Operands, CheckpointingSSUSpec]:
    """Raise unless the call is as its operator documents it.

    Returns
    -------
    operands : Operands
        The same tensors, with the usual strides in dimensions of size 1, where PyTorch allows any.
    spec : CheckpointingSSUSpec
    """
    names = RING if settings.ring else DOUBLE
    named = {names.get(field, field): tensor for field, tensor in operands._asdict().items()}
    if settings.ring:
        del named["cum_history"]
    arguments.check_tensors(named, OPTIONAL)
    if operands.state.device.type not in ("cuda", "cpu"):
        got = f"one on {operands.state.device}"
        raise ValueError(describe("state", "a tensor on a GPU or on the CPU", got, "move all to one of them"))
    _check_settings(operands, settings)
    given = {field: tensor for field, tensor in operands._asdict().items() if tensor is not None}
    _check_combinations(given, settings)
    tokens, window = _check_shapes(given, settings, names)
    _check_dtypes(given, names)
    operands = operands._replace(**{field: _usual_strides(tensor) for field, tensor in given.items()})
    given = {field: tensor for field, tensor in operands._asdict().items() if tensor is not None}
    _check_strides(given, settings, names)
    spec = _spec(operands, settings, tokens, window)
    spec.check()
    if settings.d_split is not None and spec.dim % (TILE_ROWS * settings.d_split):
        expected = f"None, or parts of dim = {spec.dim} that are multiples of {TILE_ROWS} rows"
        raise ValueError(describe("d_split", expected, settings.d_split))
    return operands, spec


def check_tied(name: str, tensor: object, inner: int, state: object) -> None:
    """Raise unless a tensor has one value per head: stride 0 in its `inner` last dimensions, which are a state's."""
    if not isinstance(tensor, Tensor):
        raise TypeError(describe(name, "a torch.Tensor", type(tensor).__name__))
    if not isinstance(state, Tensor):
        raise TypeError(describe("state", "a torch.Tensor", type(state).__name__))
    sizes = state.shape[2 : 2 + inner]
    if tensor.dim() <= inner or tensor.shape[-inner:] != sizes:
        fix = f"pass {name}[..., {', '.join(['None'] * inner)}].expand(*{name}.shape, {', '.join(map(str, sizes))})"
        raise ValueError(describe(name, f"last dimensions {tuple(sizes)}", f"shape {tuple(tensor.shape)}", fix))
    if any(tensor.stride()[-inner:]):
        several = "dimension" if inner == 1 else f"{inner} dimensions"
        fix = f"pass {name}[...{', :1' * inner}].expand({name}.shape)"
        expected = f"one value per head, that is, stride 0 in its last {several}"
        raise ValueError(describe(name, expected, f"strides {tensor.stride()}", fix))


def pdl_of(enable_pdl: object) -> str | None:
    """Return the kind of launch that an argument ``enable_pdl`` asks for."""
    if enable_pdl is False:
        return None
    if enable_pdl is True:
        return WAIT_FIRST
    if enable_pdl == EARLY_READS:
        return EARLY_READS
    raise ValueError(describe("enable_pdl", f"False, True or {EARLY_READS!r}", repr(enable_pdl)))


def batch_of(operands: Operands) -> int:
    """Number of sequences of a call."""
    packed = operands.cu_seqlens
    return operands.x.shape[0] if packed is None else packed.shape[0] - 1


def input_bytes(operands: Operands) -> int:
    """What rows of new tokens and of outputs are multiples of: `CheckpointingSSUSpec.input_bytes`."""
    o = operands
    return arguments.common_alignment((o.x, o.B, o.C, o.z, o.out), ROW_BYTES) if o.x.numel() else ROW_BYTES


def check_contents(operands: Operands, settings: Settings, spec: CheckpointingSSUSpec) -> None:
    """Raise on indices, cursors and lengths that do not fit; called for tensors on the CPU, whose contents can be read.

    Nothing is asked of sequences that are padding or have no tokens.
    """
    o, batch = operands, batch_of(operands)
    lengths = _lengths(o, spec)
    if o.work_items is not None:
        name, positions = "work_items", o.work_items[:, 0].long()
        if positions.sort().values.tolist() != list(range(batch)):
            expected = f"every position in the batch, 0 to {batch - 1}, once in column 0"
            raise ValueError(describe(name, expected, positions.tolist()))
        lengths, slots = lengths[positions], o.work_items[:, 1].long()
        position_of = positions
    else:
        name, position_of = "state_batch_indices", torch.arange(batch)
        slots = position_of if o.state_batch_indices is None else o.state_batch_indices.long()
    live = (lengths > 0) & (slots != settings.pad_slot_id)
    arguments.check_slots(name, slots, live, o.state.shape[0], settings.pad_slot_id)
    lengths, slots, position_of = lengths[live], slots[live], position_of[live]
    ordered = slots.sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        got = f"{int(repeated[0])} more than once"
        raise ValueError(describe(name, "distinct slots", got, "each holds one state"))
    if o.work_items is not None:
        accepted, cursors = o.work_items[live, 2], o.work_items[live, 3]
    else:
        accepted, cursors = o.prev_num_accepted_tokens[slots], o.cursor[slots]
    end = o.dt_history.shape[-1] if settings.ring else 2
    cursor_name = (RING if settings.ring else DOUBLE)["cursor"]
    for what, values, high in (("prev_num_accepted_tokens", accepted, spec.window), (cursor_name, cursors, end - 1)):
        outside = ((values < 0) | (values > high)).nonzero()
        if len(outside):
            at = int(outside[0])
            got = f"{int(values[at])} of slot {int(slots[at])}"
            raise ValueError(describe(what, f"values in [0, {high}]", got))
    if o.num_writes is not None:
        writes = torch.zeros_like(live)
        writes[live] = accepted + lengths > spec.window
        count = int(writes.sum())
        if int(o.num_writes) != count or not bool(writes[:count].all()):
            got = f"num_writes = {int(o.num_writes)} and writes at {writes.nonzero()[:, 0].tolist()}"
            expected = f"the {count} sequences that write their state first, and num_writes = {count}"
            raise ValueError(describe(name, expected, got, "build it anew from the cursors of this step"))


def _lengths(o: Operands, spec: CheckpointingSSUSpec) -> Tensor:
    """Tokens of each sequence; raise if ``cu_seqlens`` does not fit."""
    if o.cu_seqlens is None:
        return torch.full((o.x.shape[0],), o.x.shape[1])
    offsets, total = o.cu_seqlens.long(), o.x.shape[1]
    first, last = offsets[:-1], offsets[1:]
    lengths = last - first
    live = lengths > 0
    if bool((live & ((first < 0) | (last > total))).any()):
        raise ValueError(describe("cu_seqlens", f"offsets from 0 to {total} tokens", offsets.tolist()))
    longest = int(lengths.max()) if len(lengths) else 0
    if longest > spec.tokens:
        fix = "raise max_seqlen"
        raise ValueError(describe("cu_seqlens", f"sequences of at most {spec.tokens} tokens", f"one of {longest}", fix))
    order = first[live].argsort()
    if bool((first[live][order][1:] < last[live][order][:-1]).any()):
        raise ValueError(describe("cu_seqlens", "sequences that share no token", offsets.tolist()))
    return lengths


def _check_settings(operands: Operands, settings: Settings) -> None:
    optional = ("d_split", "max_seqlen", "window")
    for name in ("pad_slot_id", "philox_rounds", *optional):
        value = getattr(settings, name)
        if value is None and name in optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(describe(name, "an int" + " or None" * (name in optional), type(value).__name__))
        if not -(2**63) <= value < 2**63:
            raise ValueError(describe(name, "an int of 64 bits", value))
    for name in ("max_seqlen", "window"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(describe(name, "1 or more", value))
    if settings.d_split not in (None, *D_SPLITS):
        raise ValueError(describe("d_split", "None or " + " or ".join(map(str, D_SPLITS)), settings.d_split))
    if operands.rand_seed is not None and settings.philox_rounds < 1:
        raise ValueError(describe("philox_rounds", "1 or more with rand_seed", settings.philox_rounds))


def _check_combinations(given: dict[str, Tensor], settings: Settings) -> None:
    """Raise on arguments that exclude or need each other."""

    def refuse(name: str, expected: str, got: object, fix: str = "") -> None:
        raise ValueError(describe(name, expected, got, fix))

    arguments.check_saturate(settings.saturate, "state", given["state"].dtype)
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
    if "cu_seqlens" not in given and settings.max_seqlen is not None:
        refuse("max_seqlen", "None without cu_seqlens", settings.max_seqlen, "x.size(1) is the number of tokens")
    if "cu_seqlens" in given and settings.max_seqlen is None and settings.ring:
        fix = "the rows of a ring do not say which of them are for new tokens"
        refuse("max_seqlen", "the largest number of tokens of a sequence with cu_seqlens", None, fix)


def _check_shapes(given: dict[str, Tensor], settings: Settings, names: dict[str, str]) -> tuple[int, int]:
    """Raise unless all shapes agree; return the bounds (T, W) of new and of accepted tokens."""
    packed, ring = "cu_seqlens" in given, settings.ring
    lead = "1, total, " if packed else "batch, T, "
    x_letters = f"({lead}nheads, dim)" + " with cu_seqlens" * packed
    history_ranks = (4,) if ring else (4, 5)
    history_letters = "(slots, nheads, rows, dim)" if ring else "(slots, W, nheads, dim) or (slots, 2, W, nheads, dim)"
    ranks: dict[str, tuple[tuple[int, ...], str]] = {
        "state": ((4,), "(slots, nheads, dim, dstate)"),
        "x": ((4,), x_letters),
        "B": ((4,), f"({lead}ngroups, dstate)"),
        "x_history": (history_ranks, history_letters),
        "cu_seqlens": ((1,), "(batch + 1,)"),
        "rand_seed": ((1,), "(1,) or (slots,)"),
    }
    for field, (allowed, letters) in ranks.items():
        if field in given and given[field].dim() not in allowed:
            raise ValueError(describe(names.get(field, field), f"shape {letters}", tuple(given[field].shape)))
    slots, nheads, dim, dstate = given["state"].shape
    if not (nheads and dim and dstate):
        raise ValueError(describe("state", "at least one head, row and column", tuple(given["state"].shape)))
    first = tuple(given["x"].shape[:2])
    if packed and first[0] != 1:
        raise ValueError(describe("x", f"shape {x_letters}", tuple(given["x"].shape), "pass x.unsqueeze(0)"))
    batch = given["cu_seqlens"].shape[0] - 1 if packed else first[0]
    if batch < 0:
        raise ValueError(describe("cu_seqlens", "at least one offset", "none"))
    ngroups = given["B"].shape[2]
    if ngroups < 1 or nheads % ngroups:
        raise ValueError(describe("B", f"ngroups that divides nheads = {nheads}", f"ngroups = {ngroups}"))
    tokens, window = _bounds(given, settings)
    rows = given["x_history"].shape[2 if ring else -3]
    row, column, head = (*first, nheads, dim), (*first, ngroups, dstate), (nheads, dim)
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "x": (row, f"({lead}nheads, dim)"),
        "dt": (row, f"({lead}nheads, dim)"),
        "A": ((nheads, dim, dstate), "(nheads, dim, dstate)"),
        "B": (column, f"({lead}ngroups, dstate)"),
        "C": (column, f"({lead}ngroups, dstate)"),
        "D": (head, "(nheads, dim)"),
        "z": (row, f"({lead}nheads, dim)"),
        "dt_bias": (head, "(nheads, dim)"),
        "out": (row, f"({lead}nheads, dim)"),
        "state_scale": ((slots, *head), "(slots, nheads, dim)"),
        "cursor": ((slots,), "(slots,)"),
        "prev_num_accepted_tokens": ((slots,), "(slots,)"),
        "state_batch_indices": ((batch,), "(batch,)"),
        "work_items": ((batch, ITEM), "(batch, 4)"),
        "num_writes": ((1,), "(1,)"),
    }
    if ring:
        shapes["x_history"] = ((slots, nheads, rows, dim), "(slots, nheads, rows, dim)")
        shapes["B_history"] = ((slots, ngroups, rows, dstate), "(slots, ngroups, rows, dstate)")
        shapes["dt_history"] = ((slots, nheads, rows), "(slots, nheads, rows)")
    else:
        x_lead, x_letters = ((slots, 2), "slots, 2") if given["x_history"].dim() == 5 else ((slots,), "slots")
        shapes["x_history"] = ((*x_lead, window, nheads, dim), f"({x_letters}, W, nheads, dim)")
        shapes["B_history"] = ((slots, 2, window, ngroups, dstate), "(slots, 2, W, ngroups, dstate)")
        for field in ("dt_history", "cum_history"):
            shapes[field] = ((slots, 2, nheads, window), "(slots, 2, nheads, W)")
    for field, (shape, letters) in shapes.items():
        if field in given:
            arguments.check_shape(names.get(field, field), given[field], shape, letters)
    if slots < batch and "state_batch_indices" not in given and "work_items" not in given:
        fix = "pass state_batch_indices to say which slot each sequence uses"
        raise ValueError(describe("state", f"at least batch = {batch} slots", slots, fix))
    seed = given.get("rand_seed")
    if seed is not None and seed.shape[0] not in (1, slots):
        raise ValueError(describe("rand_seed", f"shape (1,) or (slots,) = ({slots},)", tuple(seed.shape)))
    return tokens, window


def _bounds(given: dict[str, Tensor], settings: Settings) -> tuple[int, int]:
    """Bounds (T, W) of new and of accepted tokens."""
    if "cu_seqlens" not in given:
        tokens = given["x"].shape[1]
        if tokens < 1:
            raise ValueError(describe("x", "at least one token per sequence", tuple(given["x"].shape)))
    else:
        tokens = settings.max_seqlen or given["x_history"].shape[-3]
    if not settings.ring:
        window = given["x_history"].shape[-3]
        if window < 1:
            raise ValueError(describe("old_x", "W of at least one row", tuple(given["x_history"].shape)))
        return tokens, window
    rows = given["x_history"].shape[2]
    window = rows - tokens if settings.window is None else settings.window
    if window < 1 or window + tokens > rows:
        least = (settings.window or 1) + tokens
        expected = f"at least W + T = {least} rows of a ring"
        raise ValueError(describe("x_cache", expected, rows, "new tokens must not meet those that are still needed"))
    return tokens, window


def _check_dtypes(given: dict[str, Tensor], names: dict[str, str]) -> None:
    allowed = {
        "state": STATES,
        "x": HALVES,
        **dict.fromkeys(("dt", "A", "D", "dt_bias"), FLOATS),
        **dict.fromkeys(("state_scale", "dt_history", "cum_history"), (torch.float32,)),
        **dict.fromkeys(("cursor", "prev_num_accepted_tokens", "work_items", "num_writes"), (torch.int32,)),
        **dict.fromkeys(("state_batch_indices", "cu_seqlens"), INTEGERS),
        "rand_seed": (torch.int64,),
    }
    for field, dtypes in allowed.items():
        if field in given:
            arguments.check_dtype(names.get(field, field), given[field], dtypes)
    dtype = given["x"].dtype
    for field in ("B", "C", "z", "out", "x_history", "B_history"):
        if field in given:
            name = names.get(field, field)
            arguments.check_dtype(name, given[field], (dtype,), "the type of x", cast=True)


def _usual_strides(tensor: Tensor) -> Tensor:
    """Return the tensor with dimensions of size 1 as far apart as their contents are long."""
    strides, changed = list(tensor.stride()), False
    for i in range(tensor.dim() - 1, -1, -1):
        if tensor.shape[i] == 1:
            usual = 1 if i == tensor.dim() - 1 else strides[i + 1] * tensor.shape[i + 1]
            changed |= strides[i] != usual
            strides[i] = usual
    return tensor.as_strided(tensor.shape, strides) if changed else tensor


def _check_strides(given: dict[str, Tensor], settings: Settings, names: dict[str, str]) -> None:
    """Raise unless all tensors lie in memory as the kernel reads them, and none that is written overlaps itself."""
    for name, count in TIED.items():
        if name in given:
            check_tied(name, given[name], count, given["state"])
    inner = {"x": 2, "B": 2, "C": 2, "z": 2, "out": 2, "state": 3, "state_scale": 2}
    inner |= dict.fromkeys(("x_history", "B_history"), 1 if settings.ring else 2)
    inner |= dict.fromkeys(("dt_history", "cum_history", *VECTORS), 1) | {"work_items": 2}
    for field, count in inner.items():
        if field in given and given[field].numel():
            _check_inner(names.get(field, field), given[field], count)
    for field in POOLED:
        if field not in given or not given[field].numel():
            continue
        tensor, name = given[field], names.get(field, field)
        if not arguments.aligned(tensor, ROW_BYTES):
            got = f"address {tensor.data_ptr():#x} and strides {tensor.stride()} of {tensor.element_size()} bytes"
            expected = f"an address, and strides but the last, of multiples of {ROW_BYTES} bytes"
            fix = f"pad its rows or slots: {arguments.allocation(tensor)}"
            raise ValueError(describe(name, expected, got, fix))
    if "work_items" in given and given["work_items"].data_ptr() % ROW_BYTES:
        expected = f"an address that is a multiple of {ROW_BYTES} bytes"
        fix = f"cute_ssm.serving.build_work_items makes one: {arguments.allocation(given['work_items'])}"
        raise ValueError(describe("work_items", expected, f"{given['work_items'].data_ptr():#x}", fix))
    for field in WRITTEN:
        if field in given:
            arguments.check_writable(names.get(field, field), given[field])


def _check_inner(name: str, tensor: Tensor, count: int) -> None:
    """Raise unless the last `count` dimensions are contiguous."""
    span = 1
    for i in range(1, min(count, tensor.dim()) + 1):
        if tensor.stride(-i) != span:
            what = "stride 1 in its last dimension" if count == 1 else f"its last {count} dimensions contiguous"
            fix = arguments.allocation(tensor) if name in arguments.WRITTEN else f"pass {name}.contiguous()"
            raise ValueError(describe(name, what, f"strides {tensor.stride()}", fix))
        span *= tensor.shape[-i]


def _spec(operands: Operands, settings: Settings, tokens: int, window: int) -> CheckpointingSSUSpec:
    def name_of(tensor: Tensor | None) -> str | None:
        return None if tensor is None else arguments.name_of(tensor.dtype)

    o = operands
    return CheckpointingSSUSpec(
        state_dtype=arguments.name_of(o.state.dtype),
        input_dtype=arguments.name_of(o.x.dtype),
        A_dtype=arguments.name_of(o.A.dtype),
        dt_dtype=arguments.name_of(o.dt.dtype),
        D_dtype=name_of(o.D),
        dt_bias_dtype=name_of(o.dt_bias),
        heads=o.state.shape[1],
        groups=o.B.shape[2],
        dim=o.state.shape[2],
        dstate=o.state.shape[3],
        tokens=tokens,
        window=window,
        history="ring" if settings.ring else "double_x" if o.x_history.dim() == 5 else "double",
        has_z=o.z is not None,
        dt_softplus=settings.dt_softplus,
        src_dtype=name_of(o.state_batch_indices),
        cu_dtype=name_of(o.cu_seqlens),
        work_items=o.work_items is not None,
        philox_rounds=settings.philox_rounds if o.rand_seed is not None else 0,
        seed_per_slot=o.rand_seed is not None and o.rand_seed.shape[0] != 1,
        saturate=settings.saturate,
        pdl=settings.pdl,
        input_bytes=input_bytes(o),
    )
