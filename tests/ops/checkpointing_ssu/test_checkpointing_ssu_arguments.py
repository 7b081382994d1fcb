"""Every documented precondition of `checkpointing_ssu`, broken once: the message, and that nothing was written."""

from __future__ import annotations

import dataclasses

import kernel_backends
import pytest
import torch
from bits import same_memory
from checkpointing_cases import PAD, Case, arguments
from memory import copy, storage
from refusals import refuses

import cute_ssm
from cute_ssm.errors import UnsupportedSpecError

EMULATED = pytest.mark.parametrize("emulated", [False, True], ids=["reference", "emulate"])

DOUBLE = Case(pads=(), nheads=4, ngroups=2, accepted=(7, 5, 14))
PACKED = dataclasses.replace(DOUBLE, batch=4, lengths=(3, 0, 1, 4))
BASES = {
    "double": DOUBLE,
    "double_x": dataclasses.replace(DOUBLE, history="double_x"),
    "ring": dataclasses.replace(DOUBLE, history="ring"),
    "slack": dataclasses.replace(DOUBLE, history="ring", slack=3),
    "no_indices": dataclasses.replace(DOUBLE, indices=None),
    "packed": PACKED,
    "packed_ring": dataclasses.replace(PACKED, history="ring"),
    "items": dataclasses.replace(DOUBLE, items=True, indices=None),
    "packed_items": dataclasses.replace(PACKED, items=True, accepted=(15, 3, 2, 13)),
    "quantised": dataclasses.replace(DOUBLE, state="i8"),
    "random": dataclasses.replace(DOUBLE, rounds=10),
    "seeds": dataclasses.replace(DOUBLE, rounds=10, seed_per_slot=True),
}


def call_of(case: Case, call: dict) -> torch.Tensor:
    return (cute_ssm.checkpointing_ssu_ring if case.ring else cute_ssm.checkpointing_ssu)(**call)


# -------------------------------------------------------------------------------------------- ways to break an argument
def like(t, *strides):
    return torch.zeros(t.numel() * 4, dtype=t.dtype).as_strided(t.shape, strides)


def unaligned(t):
    return torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)


def odd(t):
    """The outermost stride is no multiple of 16 bytes."""
    return torch.zeros(t.shape[0], t[0].numel() + 1, dtype=t.dtype)[:, :-1].unflatten(1, t.shape[1:])


def wide(t):
    """Rows of the last dimension but one are 16 bytes apart too many."""
    return torch.zeros(*t.shape[:-1], t.shape[-1] + 16, dtype=t.dtype)[..., : t.shape[-1]]


def every_other(t):
    return t.repeat_interleave(2, -1)[..., ::2]


def one_slot(t):
    return torch.zeros_like(t[:1]).expand(t.shape)


def dense(t):
    return t.contiguous()


def put(position, value):
    def change(t):
        t = t.clone()
        t[position] = value
        return t

    return change


def at_slots(value):
    """Of all slots that a sequence has: those with a legal cursor."""
    return lambda t: torch.where(t >= 0, value, t).int()


def always(value):
    return lambda _: value


def cast(dtype):
    return lambda t: t.to(dtype)


def meta(t):
    return t.to("meta")


FLOAT = "expected dtype float32 or bfloat16 or float16, got "
STATE = "expected dtype float32 or bfloat16 or float16 or int16 or int8 or float8_e4m3fn, got "
INTEGER = "expected dtype int32 or int64, got "
TENSOR = "expected a torch.Tensor, or an array with __dlpack__, got "
SHARED = "expected elements that do not share memory, got strides .*; it is written, so allocate it as torch.zeros"
ROWS = "expected an address and outer strides of multiples of 16 bytes, got address .*; pad (its rows|the slots)"
LAST = "expected stride 1 in its last dimension, got strides"
LAST_TWO = "expected contiguous rows of .* in contiguous blocks of .* x .*, got strides"
X_TYPE = "expected dtype bfloat16, got {}; the type of x; (cast it with {}.to|it is written, so allocate it)"

# (base, argument [> argument that the message names], how it is broken, error, what the message says after the name)
BROKEN = [
    # no tensors, and tensors elsewhere
    *(("double", name, always(None), TypeError, TENSOR + "NoneType") for name in (
        "state", "old_x", "old_B", "old_dt", "old_cumAdt", "cache_buf_idx", "prev_num_accepted_tokens", "x", "dt", "A",
        "B", "C", "out")),
    *(("ring", name, always([1]), TypeError, TENSOR + "list") for name in (
        "state", "x_cache", "B_cache", "dt_cache", "ring_start", "prev_num_accepted_tokens", "x", "out", "D", "z",
        "dt_bias", "state_batch_indices", "state_scale", "rand_seed", "cu_seqlens", "work_items", "num_writes")),
    *(("double", name, meta, ValueError, "expected a tensor on cpu like state, got one on meta") for name in (
        "old_x", "cache_buf_idx", "x", "out", "D", "state_batch_indices")),
    ("quantised", "state_scale", meta, ValueError, "expected a tensor on cpu like state"),
    ("random", "rand_seed", meta, ValueError, "expected a tensor on cpu like state"),
    ("items", "num_writes", meta, ValueError, "expected a tensor on cpu like state"),
    # numbers
    ("double", "pad_slot_id", always(None), TypeError, "expected an int, got NoneType"),
    ("double", "pad_slot_id", always(2**63), ValueError, "expected an int of 64 bits, got 9223372036854775808"),
    ("random", "philox_rounds", always("10"), TypeError, "expected an int, got str"),
    ("random", "philox_rounds", always(0), ValueError, "expected 1 or more with rand_seed, got 0"),
    ("double", "d_split", always(3), ValueError, "expected None or 1 or 2 or 4, got 3"),
    ("double", "d_split", always(2.0), TypeError, "expected an int or None, got float"),
    ("packed", "max_seqlen", always(True), TypeError, "expected an int or None, got bool"),
    ("packed", "max_seqlen", always(0), ValueError, "expected 1 or more, got 0"),
    ("slack", "window", always(0), ValueError, "expected 1 or more, got 0"),
    ("double", "max_seqlen", always(4), ValueError, r"expected None without cu_seqlens, got 4; x.size\(1\) is the num"),
    ("ring", "max_seqlen", always(4), ValueError, "expected None without cu_seqlens, got 4"),
    ("packed_ring", "max_seqlen", always(None), ValueError, "the largest number of tokens of a sequence with cu_seqle"),
    ("packed", "max_seqlen", always(65), UnsupportedSpecError, "expected 1 to 64, got 65"),
    # shapes
    ("double", "state", lambda t: t[None], ValueError, r"expected shape \(slots, nheads, dim, dstate\), got \(1, "),
    ("double", "state", lambda t: t[:, :0], ValueError, "expected at least one head, row and column, got"),
    ("double", "x", lambda t: t[0], ValueError, r"expected shape \(batch, T, nheads, dim\), got \(4, 4, 64\)"),
    ("double", "x", lambda t: t[:, :0], ValueError, r"expected at least one token per sequence, got \(3, 0, 4, 64\)"),
    ("double", "x", lambda t: t[..., :32], ValueError, r"shape \(batch, T, nheads, dim\) = \(3, 4, 4, 64\), got \(3, "),
    ("double", "x > dt", lambda t: t[:, :3], ValueError, r"\(batch, T, nheads, dim\) = \(3, 3, 4, 64\), got \(3, 4, 4"),
    ("double", "dt", lambda t: t[..., 0], ValueError, r"expected shape \(batch, T, nheads, dim\)"),
    ("double", "A", lambda t: t[:1], ValueError, r"expected shape \(nheads, dim, dstate\)"),
    ("double", "B", lambda t: t[:, 0], ValueError, r"expected shape \(batch, T, ngroups, dstate\)"),
    ("double", "B", lambda t: t[:, :, :0], ValueError, "expected ngroups that divides nheads = 4, got ngroups = 0"),
    ("double", "C", lambda t: t[:, :, :1], ValueError, r"expected shape \(batch, T, ngroups, dstate\) = \(3, 4, 2, 64"),
    ("double", "D", lambda t: t[:, 0], ValueError, r"expected shape \(nheads, dim\)"),
    ("double", "dt_bias", lambda t: t[:2], ValueError, r"expected shape \(nheads, dim\)"),
    ("double", "z", lambda t: t[:2], ValueError, r"expected shape \(batch, T, nheads, dim\)"),
    ("double", "out", lambda t: t[:, :2], ValueError, r"expected shape \(batch, T, nheads, dim\)"),
    ("double", "old_x", lambda t: t[0], ValueError, r"expected shape \(slots, W, nheads, dim\) or \(slots, 2, W, nh"),
    ("double", "old_x", lambda t: t[:, :0], ValueError, "expected W of at least one row, got"),
    ("double", "old_x", lambda t: t[1:], ValueError, r"expected shape \(slots, W, nheads, dim\) = \(6, 16, 4, 64\)"),
    ("double", "old_x > old_B", lambda t: t[:, :8], ValueError, r"\(slots, 2, W, ngroups, dstate\) = \(6, 2, 8, 2, 64"),
    ("double_x", "old_x", lambda t: t[:, :1], ValueError, r"expected shape \(slots, 2, W, nheads, dim\)"),
    ("double", "old_B", lambda t: t[:, :1], ValueError, r"expected shape \(slots, 2, W, ngroups, dstate\)"),
    ("double", "old_B", lambda t: t[:, :, :4], ValueError, r"expected shape \(slots, 2, W, ngroups, dstate\)"),
    ("double", "old_dt", lambda t: t[..., :8], ValueError, r"expected shape \(slots, 2, nheads, W\) = \(6, 2, 4, 16\)"),
    ("double", "old_cumAdt", lambda t: t[:, :, :1], ValueError, r"expected shape \(slots, 2, nheads, W\)"),
    ("double", "cache_buf_idx", lambda t: t[:3], ValueError, r"expected shape \(slots,\) = \(6,\), got \(3,\)"),
    ("double", "prev_num_accepted_tokens", lambda t: t[:, None], ValueError, r"expected shape \(slots,\) = \(6,\)"),
    ("ring", "x_cache", lambda t: t[0], ValueError, r"expected shape \(slots, nheads, rows, dim\), got \(4, 20, 64\)"),
    ("ring", "x_cache", lambda t: t[:, :, :4], ValueError, r"at least W \+ T = 5 rows of a ring, got 4; new tokens mu"),
    ("slack", "x_cache", lambda t: t[:, :, :19], ValueError, r"expected at least W \+ T = 20 rows of a ring, got 19"),
    ("slack", "window > x_cache", always(20), ValueError, r"expected at least W \+ T = 24 rows of a ring, got 23"),
    ("ring", "B_cache", lambda t: t[:, :, :8], ValueError, r"expected shape \(slots, ngroups, rows, dstate\) = \(6, 2"),
    ("ring", "dt_cache", lambda t: t[..., 1:], ValueError, r"expected shape \(slots, nheads, rows\) = \(6, 4, 20\)"),
    ("ring", "ring_start", lambda t: t[:3], ValueError, r"expected shape \(slots,\) = \(6,\), got \(3,\)"),
    ("double", "state_batch_indices", lambda t: t[:2], ValueError, r"expected shape \(batch,\) = \(3,\), got \(2,\)"),
    ("double", "state_batch_indices", lambda t: t[:, None], ValueError, r"expected shape \(batch,\) = \(3,\)"),
    ("packed", "x", lambda t: t[0], ValueError, r"expected shape \(1, total, nheads, dim\) with cu_seqlens, got \(11,"),
    ("packed", "x", lambda t: t[0][:, None], ValueError, r"expected shape \(1, total, nheads, dim\) with cu_seqlens, "),
    ("packed", "dt", lambda t: t[:, 1:], ValueError, r"expected shape \(1, total, nheads, dim\)"),
    ("packed", "cu_seqlens", lambda t: t[None], ValueError, r"expected shape \(batch \+ 1,\), got \(1, 5\)"),
    ("packed", "cu_seqlens", lambda t: t[:0], ValueError, "expected at least one offset, got none"),
    ("packed", "state_batch_indices", lambda t: t[:3], ValueError, r"expected shape \(batch,\) = \(4,\)"),
    ("items", "work_items", lambda t: t[:2], ValueError, r"expected shape \(batch, 4\) = \(3, 4\), got \(2, 4\)"),
    ("items", "work_items", lambda t: t[:, :3], ValueError, r"expected shape \(batch, 4\)"),
    ("items", "num_writes", lambda t: t[0], ValueError, r"expected shape \(1,\) = \(1,\), got \(\)"),
    ("items", "work_items", always(None), ValueError, "expected a tensor with num_writes, got None; cute_ssm.serving."),
    ("items", "num_writes", always(None), ValueError, "expected a tensor with work_items, got None; cute_ssm.serving."),
    ("random", "rand_seed", lambda t: t.repeat(2), ValueError, r"expected shape \(1,\) or \(slots,\) = \(6,\), got \("),
    ("random", "rand_seed", lambda t: t[0], ValueError, r"expected shape \(1,\) or \(slots,\) = \(6,\), got \(\)"),
    ("quantised", "state_scale", lambda t: t[..., :1], ValueError, r"expected shape \(slots, nheads, dim\)"),
    # types
    ("double", "state", cast(torch.float64), TypeError, STATE + "float64"),
    ("double", "x", cast(torch.float32), TypeError, "expected dtype bfloat16 or float16, got float32"),
    *(("double", name, cast(torch.float64), TypeError, FLOAT + "float64") for name in ("dt", "A", "D", "dt_bias")),
    *(("double", name, cast(torch.float16), TypeError, X_TYPE.format("float16", name)) for name in (
        "B", "C", "z", "out", "old_x", "old_B")),
    *(("ring", name, cast(torch.float32), TypeError, X_TYPE.format("float32", name)) for name in (
        "x_cache", "B_cache")),
    *(("double", name, cast(torch.bfloat16), TypeError, "expected dtype float32, got bfloat16") for name in (
        "old_dt", "old_cumAdt")),
    ("ring", "dt_cache", cast(torch.float16), TypeError, "expected dtype float32, got float16"),
    ("quantised", "state_scale", cast(torch.float16), TypeError, "expected dtype float32, got float16"),
    *(("double", name, cast(torch.int64), TypeError, "expected dtype int32, got int64") for name in (
        "cache_buf_idx", "prev_num_accepted_tokens")),
    ("ring", "ring_start", cast(torch.int64), TypeError, "expected dtype int32, got int64"),
    ("double", "state_batch_indices", cast(torch.int16), TypeError, INTEGER + "int16"),
    ("packed", "cu_seqlens", cast(torch.float32), TypeError, INTEGER + "float32"),
    ("items", "work_items", cast(torch.int64), TypeError, "expected dtype int32, got int64"),
    ("items", "num_writes", cast(torch.int64), TypeError, "expected dtype int32, got int64"),
    ("random", "rand_seed", cast(torch.int32), TypeError, "expected dtype int64, got int32"),
    # strides and addresses
    ("double", "dt", dense, ValueError, r"one value per head, that is, stride 0 in its last dimension, .*\[..., :1\]."),
    ("double", "A", dense, ValueError, r"stride 0 in its last 2 dimensions, got .*; pass A\[..., :1, :1\].expand\(A.s"),
    ("double", "D", dense, ValueError, r"one value per head, .*; pass D\[..., :1\].expand\(D.shape\)"),
    ("double", "dt_bias", dense, ValueError, r"one value per head, .*; pass dt_bias\[..., :1\].expand\(dt_bias.shape"),
    *(("double", name, wide, ValueError, LAST_TWO) for name in ("x", "B", "C", "z", "out", "old_x", "old_B")),
    *(("double", name, every_other, ValueError, LAST_TWO) for name in ("x", "B", "C", "z", "out", "old_x", "old_B")),
    ("double", "state", wide, ValueError, "blocks of nheads x dim x dstate, got strides .*; it is written, so al"),
    ("quantised", "state_scale", wide, ValueError, LAST_TWO),
    *(("ring", name, every_other, ValueError, LAST) for name in ("x_cache", "B_cache", "dt_cache", "ring_start")),
    *(("double", name, every_other, ValueError, LAST) for name in (
        "old_dt", "old_cumAdt", "cache_buf_idx", "prev_num_accepted_tokens")),
    ("seeds", "rand_seed", lambda t: t[:1].expand_as(t), ValueError, LAST),
    ("items", "work_items", wide, ValueError, LAST_TWO),
    *(("double", name, change, ValueError, ROWS) for change in (unaligned, odd) for name in (
        "state", "old_x", "old_B")),
    *(("ring", name, change, ValueError, ROWS) for change in (unaligned, odd) for name in ("x_cache", "B_cache")),
    ("quantised", "state_scale", odd, ValueError, ROWS),
    *(("double", name, one_slot, ValueError, SHARED) for name in (
        "state", "out", "old_x", "old_B", "old_dt", "old_cumAdt")),
    *(("ring", name, one_slot, ValueError, SHARED) for name in ("x_cache", "B_cache", "dt_cache")),
    ("quantised", "state_scale", one_slot, ValueError, SHARED),
    # scales and seeds
    ("quantised", "state_scale", always(None), ValueError, "expected scales of a state of int8, got None"),
    ("double", "state_scale", always(torch.ones(6, 4, 64)), ValueError, "None with a state of float16, got a tensor"),
    ("random", "state > rand_seed", lambda t: t.float(), ValueError, "expected None with a float32 state, which is no"),
    ("no_indices", "state > old_x", lambda t: t[:2], ValueError, r"expected shape \(slots, W, nheads, dim\) = \(2, 16"),
    # contents
    ("double", "state_batch_indices", put(1, 6), ValueError, r"in \[0, 6\) or pad_slot_id = -1, got 6 at position 1"),
    ("double", "state_batch_indices", put(2, -2), ValueError, "got -2 at position 2"),
    ("double", "state_batch_indices", lambda t: t * 0, ValueError, "distinct slots, got 0 more than once; each holds"),
    ("double", "prev_num_accepted_tokens", at_slots(17), ValueError, r"values in \[0, 16\], got 17 of slot"),
    ("double", "prev_num_accepted_tokens", at_slots(-1), ValueError, r"values in \[0, 16\], got -1 of slot"),
    ("slack", "prev_num_accepted_tokens", at_slots(17), ValueError, r"values in \[0, 16\], got 17 of slot"),
    ("double", "cache_buf_idx", at_slots(2), ValueError, r"values in \[0, 1\], got 2 of slot"),
    ("double_x", "cache_buf_idx", at_slots(-1), ValueError, r"values in \[0, 1\], got -1 of slot"),
    ("ring", "ring_start", at_slots(20), ValueError, r"values in \[0, 19\], got 20 of slot"),
    ("slack", "ring_start", at_slots(-1), ValueError, r"values in \[0, 22\], got -1 of slot"),
    ("packed", "cu_seqlens", put(0, -1), ValueError, r"expected offsets from 0 to 11 tokens, got \[-1, 4"),
    ("packed", "cu_seqlens", put(-1, 12), ValueError, "expected offsets from 0 to 11 tokens, got"),
    ("packed", "max_seqlen > cu_seqlens", always(3), ValueError, "of at most 3 tokens, got one of 4; raise max_seqlen"),
    ("packed", "cu_seqlens", put(slice(1, 3), torch.tensor([4, 3])), ValueError, "sequences that share no token, got"),
    ("items", "work_items", put((0, 0), 1), ValueError, "every position in the batch, 0 to 2, once in column 0, got"),
    ("items", "work_items", put((0, 0), 7), ValueError, "every position in the batch, 0 to 2, once in column 0, got"),
    ("items", "work_items", put((1, 1), 6), ValueError, r"in \[0, 6\) or pad_slot_id = -1, got 6 at position 1"),
    ("items", "work_items", put((slice(2), 1), 2), ValueError, "distinct slots, got 2 more than once"),
    ("items", "work_items > prev_num_accepted_tokens", put((0, 2), 17), ValueError, r"values in \[0, 16\], got 17 of "),
    ("items", "work_items > cache_buf_idx", put((0, 3), 2), ValueError, r"values in \[0, 1\], got 2 of slot"),
    ("items", "num_writes > work_items", always(torch.tensor([2], dtype=torch.int32)), ValueError, "the 1 sequences t"),
    ("items", "work_items", lambda t: t.flip(0), ValueError, r"write their state first, and num_writes = 1, got num_w"),
    ("packed_items", "num_writes > work_items", always(torch.zeros(1, dtype=torch.int32)), ValueError, "the 2 sequenc"),
]  # fmt: skip


def expect(case: Case, call: dict, name: str, error: type, message: str, emulated: bool) -> None:
    refuses(lambda: call_of(case, call), call, name, error, message, emulated)


def base(name: str) -> tuple[Case, dict]:
    case = BASES[name]
    return case, {"max_seqlen": None, "philox_rounds": 10, **arguments(case)}


@pytest.mark.parametrize("name", BASES)
def test_what_is_broken_below_is_legal_before(name):
    case, call = base(name)
    assert call_of(case, call) is call["out"]


def ids(value):
    return value if isinstance(value, str) else getattr(value, "__name__", "")


@EMULATED
@pytest.mark.parametrize(("start", "name", "change", "error", "message"), BROKEN, ids=ids)
def test_broken_precondition(start, name, change, error, message, emulated):
    case, call = base(start)
    changed, _, named = name.partition(" > ")
    call[changed] = change(call.get(changed))
    named = "tokens" if error is UnsupportedSpecError else named
    expect(case, call, named or changed, error, message, emulated)


@EMULATED
@pytest.mark.parametrize(
    ("case", "name", "message"),
    [
        (Case(pads=(), dim=24), "dim", "expected a multiple of 16 up to 128, got 24"),
        (Case(pads=(), dim=144), "dim", "expected a multiple of 16 up to 128, got 144"),
        (Case(pads=(), dstate=80), "dstate", "expected 64 or 96 or 128 or 256, got 80"),
        (Case(pads=(), tokens=65), "tokens", "expected 1 to 64, got 65"),
        (Case(pads=(), window=65), "window", "expected 1 to 64, got 65"),
        (Case(pads=(), history="ring", tokens=65), "tokens", "expected 1 to 64, got 65"),
    ],
    ids=str,
)
def test_sizes_outside_the_kernel(case, name, message, emulated):
    expect(case, arguments(case), name, UnsupportedSpecError, message, emulated)


@EMULATED
@pytest.mark.parametrize(("dim", "d_split"), [(80, 2), (16, 2), (32, 4)])
def test_parts_of_a_head_are_whole_tiles(dim, d_split, emulated):
    case = Case(pads=(), dim=dim, d_split=d_split)
    message = f"None, or parts of dim = {dim} that are multiples of 16 rows, got {d_split}"
    expect(case, arguments(case), "d_split", ValueError, message, emulated)


@EMULATED
def test_too_few_slots_without_indices(emulated):
    case = Case(indices=None, pads=(), batch=3)
    call = arguments(case)
    names = ("state", *case.names[:4], "prev_num_accepted_tokens", case.names[4])
    call |= {name: call[name][:2] for name in names}
    expect(case, call, "state", ValueError, "at least batch = 3 slots, got 2; pass state_batch_indices to", emulated)


@EMULATED
def test_groups_must_divide_heads(emulated):
    case = Case(nheads=3, pads=())
    call = arguments(case)
    call["B"], call["C"] = (call[n].expand(3, 4, 2, 64).contiguous() for n in "BC")
    expect(case, call, "B", ValueError, "expected ngroups that divides nheads = 3, got ngroups = 2", emulated)


def test_a_tensor_on_neither_gpu_nor_cpu():
    case, call = base("double")
    call = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in call.items()}
    expect(case, call, "state", ValueError, "a tensor on a GPU or on the CPU, got one on meta; move all to one", False)


# ---------------------------------------------------------------------------------- what looks broken, and is not
def run(case: Case, call: dict, emulated: bool) -> None:
    if emulated:
        with kernel_backends.kernel(checks=False):
            call_of(case, call)
    else:
        call_of(case, call)


LEGAL = [
    ("packed", {"state_batch_indices": put(1, 99)}),  # of a sequence without tokens
    ("packed", {"cu_seqlens": put(-1, 2)}),  # fewer tokens than none
    ("packed", {"state_batch_indices": put(slice(None), PAD)}),
    ("double", {"state_batch_indices": put(slice(None), 5), "pad_slot_id": always(5)}),
    ("no_indices", {"pad_slot_id": always(1)}),  # no sequence is padding
    ("items", {"prev_num_accepted_tokens": put(slice(None), 99), "cache_buf_idx": put(slice(None), 99)}),
]


@pytest.mark.thin(4, "emulated")
@EMULATED
@pytest.mark.parametrize(("start", "changes"), LEGAL)
def test_what_is_never_read_may_be_anything(start, changes, emulated):
    case, call = base(start)
    for name, change in changes.items():
        call[name] = change(call[name])
    before = copy(call)
    run(case, call, emulated)
    real = call.get("state_batch_indices", torch.zeros(1)) != call["pad_slot_id"]
    assert torch.equal(storage(call["out"]), storage(before["out"])) == (not bool(real.any()))


@EMULATED
@pytest.mark.parametrize("form", ["batch", "packed"])
def test_calls_without_sequences(form, emulated):
    case, call = base("packed" if form == "packed" else "double")
    if form == "packed":
        call["cu_seqlens"], call["state_batch_indices"] = call["cu_seqlens"][:1], call["state_batch_indices"][:0]
    else:
        call |= {n: call[n][:0] for n in ("state_batch_indices", "x", "dt", "B", "C", "z", "out")}
    before = copy(call)
    run(case, call, emulated)
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            same_memory(value, call[name], name)


@pytest.mark.thin(4)
@EMULATED
@pytest.mark.parametrize("history", ["double", "ring"])
def test_dimensions_of_size_one_may_have_any_stride(history, emulated):
    """One group, one sequence, one token: views of projections have strides there that mean nothing."""
    case = Case(batch=1, tokens=1, pads=(), nheads=2, ngroups=1, history=history)
    call = arguments(case)
    twin = copy(call)
    for name in ("x", "B", "C", "z", "out", "state_batch_indices"):
        t = twin[name]
        strides = [7 if n == 1 else s for n, s in zip(t.shape, t.stride())]
        twin[name] = t.as_strided(t.shape, strides)
    run(case, call, emulated)
    run(case, twin, emulated)
    same_memory(call["out"], twin["out"])
    same_memory(call["state"], twin["state"])
