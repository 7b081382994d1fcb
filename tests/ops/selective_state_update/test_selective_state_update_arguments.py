"""Every documented precondition of `selective_state_update`, broken once: the message, and that nothing was written."""

from __future__ import annotations

import kernel_backends
import pytest
import step_cases
import token_cases
import torch
from bits import same_memory
from memory import copy
from refusals import refuses
from step_cases import Case
from token_cases import Tokens

import cute_ssm
from cute_ssm.errors import UnsupportedSpecError

BASES = {
    "one": Case(separate=True, pads=()),
    "no_indices": Case(indices=None),
    "batched": Tokens(destination="matrix", pads=()),
    "packed": Tokens(packed=True, lengths=(3, 0, 1, 5), pads=(), destination="matrix", cache_steps=5),
    "in_place": Tokens(lengths=(2, 2, 2), pads=()),
    "saved": Tokens(destination="intermediates", pads=()),
    "saved_unindexed": Tokens(destination="intermediates", rows=False, pads=()),
    "saved_packed": Tokens(destination="intermediates", packed=True, lengths=(3, 1), pads=()),
    "quantised": Tokens(destination="intermediates", state="i8", pads=()),
    "accepted": Tokens(accepted=True, destination="matrix", pads=()),
    "random": Tokens(rounds=10, pads=()),
    "seeds": Tokens(rounds=10, seed_per_slot=True, pads=()),
}


def base(name: str) -> dict:
    case = BASES[name]
    call = step_cases.arguments(case) if isinstance(case, Case) else token_cases.arguments(case)
    return {"algorithm": "auto", **call}


# -------------------------------------------------------------------------------------------- ways to break an argument
def unaligned(t):
    return torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)


def odd_slots(t):
    return torch.zeros(t.shape[0], t[0].numel() + 1, dtype=t.dtype)[:, :-1].unflatten(1, t.shape[1:])


def overlapping_slots(t):
    return torch.zeros_like(t).as_strided(t.shape, (t.stride(0) // 2, *t.stride()[1:]))


def one_slot(t):
    return torch.zeros_like(t[:1]).expand(t.shape)


def transposed(t):
    return t.mT.contiguous().mT


def every_other(t):
    return t.repeat_interleave(2, -1)[..., ::2]


def put(position, value):
    def change(t):
        t = t.clone()
        t[position] = value
        return t

    return change


def always(value):
    return lambda _: value


def cast(dtype):
    return lambda t: t.to(dtype)


FLOAT = "expected dtype float32 or bfloat16 or float16, got "
STATE = "expected dtype float32 or bfloat16 or float16 or int16 or int8 or float8_e4m3fn, got "
INTEGER = "expected dtype int32 or int64, got "
TENSOR = "expected a torch.Tensor, or an array with __dlpack__, got "
SHARED = "expected elements that do not share memory, got strides .*; it is written, so allocate it as torch.zeros"
LAST = r"expected stride 1 in its last dimension, got strides .*; (pass {}.contiguous|it is written, so allocate)"

# (base, argument [> argument that the message names], how it is broken, error, what the message says after the name)
BROKEN = [
    # no tensors, and tensors elsewhere
    ("one", "state", always(None), TypeError, TENSOR + "NoneType"),
    ("one", "dt", always(0.5), TypeError, TENSOR + "float"),
    ("one", "B", always(None), TypeError, TENSOR + "NoneType"),
    ("one", "C", always([1.0]), TypeError, TENSOR + "list"),
    ("one", "D", always(1.0), TypeError, TENSOR + "float"),
    ("one", "z", always(True), TypeError, TENSOR + "bool"),
    ("one", "dt_bias", always(0.0), TypeError, TENSOR + "float"),
    ("one", "out", always([0.0]), TypeError, TENSOR + "list"),
    ("one", "state_batch_indices", lambda t: t.tolist(), TypeError, TENSOR + "list"),
    ("one", "dst_state_batch_indices", lambda t: t.tolist(), TypeError, TENSOR + "list"),
    ("batched", "dst_state_batch_indices", lambda t: t.tolist(), TypeError, TENSOR + "list"),
    ("packed", "cu_seqlens", lambda t: t.tolist(), TypeError, TENSOR + "list"),
    ("accepted", "num_accepted_tokens", lambda t: t.tolist(), TypeError, TENSOR + "list"),
    ("saved", "intermediate_states_buffer", always([1]), TypeError, TENSOR + "list"),
    ("saved", "intermediate_state_indices", lambda t: t.tolist(), TypeError, TENSOR + "list"),
    ("quantised", "state_scale", always(0.5), TypeError, TENSOR + "float"),
    ("quantised", "intermediate_state_scales", always(1), TypeError, TENSOR + "int"),
    ("random", "rand_seed", always(7), TypeError, TENSOR + "int"),
    ("one", "B", lambda t: t.to("meta"), ValueError, "expected a tensor on cpu like state, got one on meta; move it w"),
    ("random", "rand_seed", lambda t: t.to("meta"), ValueError, "expected a tensor on cpu like state, got one on meta"),
    ("packed", "cu_seqlens", lambda t: t.to("meta"), ValueError, "expected a tensor on cpu like state, got one on met"),
    ("quantised", "state_scale", lambda t: t.to("meta"), ValueError, "expected a tensor on cpu like state"),
    # shapes of one token
    ("one", "state", lambda t: t[None], ValueError, r"expected shape \(slots, nheads, dim, dstate\), got \(1, "),
    ("one", "state", lambda t: t[:, :0], ValueError, "expected at least one head, row and column, got"),
    ("one", "state", lambda t: t[:, :, :0], ValueError, "expected at least one head, row and column, got"),
    ("one", "state", lambda t: t[..., :0], ValueError, "expected at least one head, row and column, got"),
    ("one", "x", lambda t: t[None, None], ValueError, r"expected shape \(batch, nheads, dim\) or \(batch, T, nheads"),
    ("one", "x", lambda t: t[0, 0], ValueError, r"expected shape \(batch, nheads, dim\) or \(batch, T, nheads, dim\)"),
    ("one", "x", lambda t: t[:, :, :32], ValueError, r"shape \(batch, nheads, dim\) = \(3, 4, 64\), got \(3, 4, 32\)"),
    ("one", "x", lambda t: t[:, :2], ValueError, r"shape \(batch, nheads, dim\) = \(3, 4, 64\), got \(3, 2, 64\)"),
    ("one", "dt", lambda t: t[:2], ValueError, r"expected shape \(batch, nheads, dim\) = \(3, 4, 64\)"),
    ("one", "dt", lambda t: t[..., 0], ValueError, r"expected shape \(batch, nheads, dim\) = \(3, 4, 64\)"),
    ("one", "A", lambda t: t[:3], ValueError, r"expected shape \(nheads, dim, dstate\)"),
    ("one", "B", lambda t: t[..., :64], ValueError, r"expected shape \(batch, ngroups, dstate\)"),
    ("one", "B", lambda t: t[:, None], ValueError, r"expected shape \(batch, ngroups, dstate\)"),
    ("one", "B", lambda t: t[:, :0], ValueError, "expected ngroups that divides nheads = 4, got ngroups = 0"),
    ("one", "C", lambda t: t[:, :1], ValueError, r"expected shape \(batch, ngroups, dstate\) = \(3, 2, 128\)"),
    ("one", "D", lambda t: t[:1], ValueError, r"expected shape \(nheads, dim\)"),
    ("one", "D", lambda t: t[:, 0], ValueError, r"expected shape \(nheads, dim\)"),
    ("one", "z", lambda t: t[:1], ValueError, r"expected shape \(batch, nheads, dim\)"),
    ("one", "dt_bias", lambda t: t[:, :1], ValueError, r"expected shape \(nheads, dim\)"),
    ("one", "out", lambda t: t[:, :, :8], ValueError, r"expected shape \(batch, nheads, dim\)"),
    ("one", "state_batch_indices", lambda t: t[:2], ValueError, r"expected shape \(batch,\) = \(3,\).*, got \(2,\)"),
    ("one", "state_batch_indices", lambda t: t[:, None, None], ValueError, r"expected shape \(batch,\)"),
    ("one", "dst_state_batch_indices", lambda t: t[:1], ValueError, r"expected shape \(batch,\)"),
    ("no_indices", "state", lambda t: t[:2], ValueError, "at least batch = 3 slots, got 2; pass state_batch_indices"),
    ("one", "state_batch_indices", lambda t: t[:, None][:, :0], ValueError, "expected a column for each of T = 1 tok"),
    ("one", "dst_state_batch_indices", lambda t: t[:, None][:, :0], ValueError, "expected a column for each of T = 1"),
    ("no_indices", "x", lambda t: t[0, 0, 0], ValueError, r"expected shape \(batch, nheads, dim\) or .*, got \(\)"),
    ("no_indices", "state", lambda t: t[0, 0, 0, 0], ValueError, r"expected shape \(slots, nheads, dim, dstate\), got"),
    ("saved", "x", lambda t: t[0, 0, 0], ValueError, r"expected shape \(batch, nheads, dim\) or .*, got \(64,\)"),
    # shapes of several tokens
    ("batched", "x > dt", lambda t: t[:, :3], ValueError, r"\(batch, T, nheads, dim\)"),
    ("batched", "dt", lambda t: t[:, :3], ValueError, r"expected shape \(batch, T, nheads, dim\) = \(3, 4, 2, 64\)"),
    ("batched", "dt", lambda t: t[:, 0], ValueError, r"expected shape \(batch, T, nheads, dim\)"),
    ("batched", "B", lambda t: t[:, 0], ValueError, r"expected shape \(batch, T, ngroups, dstate\)"),
    ("batched", "C", lambda t: t[:, :1], ValueError, r"expected shape \(batch, T, ngroups, dstate\) = \(3, 4, 1, 64\)"),
    ("batched", "z", lambda t: t[:2], ValueError, r"expected shape \(batch, T, nheads, dim\)"),
    ("batched", "out", lambda t: t[:, :2], ValueError, r"expected shape \(batch, T, nheads, dim\)"),
    ("batched", "state_batch_indices", lambda t: t[:2], ValueError, r"expected shape \(batch,\) = \(3,\) or \(batch,"),
    ("batched", "dst_state_batch_indices", lambda t: t[:2], ValueError, r"expected shape \(batch,\) = \(3,\) or"),
    ("batched", "dst_state_batch_indices", lambda t: t[:, :3], ValueError, "a column for each of T = 4 tokens, got"),
    ("batched", "dst_state_batch_indices", lambda t: t[..., None], ValueError, r"expected shape \(batch,\) = \(3,\) o"),
    ("packed", "x", lambda t: t[None], ValueError, r"expected shape \(total, nheads, dim\) with cu_seqlens, got \(1, "),
    ("packed", "dt", lambda t: t[1:], ValueError, r"expected shape \(total, nheads, dim\) = \(11, 2, 64\)"),
    ("packed", "B", lambda t: t[None], ValueError, r"expected shape \(total, ngroups, dstate\)"),
    ("packed", "C", lambda t: t[:9], ValueError, r"expected shape \(total, ngroups, dstate\) = \(11, 1, 64\)"),
    ("packed", "z", lambda t: t[:9], ValueError, r"expected shape \(total, nheads, dim\)"),
    ("packed", "out", lambda t: t[:9], ValueError, r"expected shape \(total, nheads, dim\)"),
    ("packed", "state_batch_indices", lambda t: t[:3], ValueError, r"expected shape \(batch,\) = \(4,\)"),
    ("packed", "dst_state_batch_indices", lambda t: t[:3], ValueError, r"expected shape \(batch,\) = \(4,\)"),
    ("packed", "dst_state_batch_indices", lambda t: t[:, :0], ValueError, r"expected a column for each of T"),
    ("packed", "cu_seqlens", lambda t: t[None], ValueError, r"expected shape \(batch \+ 1,\), got \(1, 5\)"),
    ("packed", "cu_seqlens", lambda t: t[:0], ValueError, "expected at least one offset, got none"),
    ("accepted", "num_accepted_tokens", lambda t: t[:2], ValueError, r"expected shape \(batch,\) = \(3,\), got \(2,\)"),
    ("accepted", "state_batch_indices", lambda t: t[:2], ValueError, r"expected shape \(batch,\) = \(3,\) or \(batch,"),
    # types
    ("one", "state", cast(torch.float64), TypeError, STATE + "float64"),
    ("one", "state", cast(torch.int32), TypeError, STATE + "int32"),
    ("one", "x", cast(torch.float8_e4m3fn), TypeError, FLOAT + "float8_e4m3fn"),
    ("one", "dt", cast(torch.int64), TypeError, FLOAT + "int64"),
    ("one", "A", cast(torch.float64), TypeError, FLOAT + "float64"),
    ("one", "D", cast(torch.int32), TypeError, FLOAT + "int32"),
    ("one", "dt_bias", cast(torch.float64), TypeError, FLOAT + "float64"),
    ("one", "B", cast(torch.float32), TypeError, "dtype bfloat16, got float32; the type of x; cast it with B.to"),
    ("one", "C", cast(torch.float16), TypeError, "dtype bfloat16, got float16; the type of x; cast it with C.to"),
    ("one", "z", cast(torch.float32), TypeError, "expected dtype bfloat16, got float32; the type of x"),
    ("one", "out", cast(torch.float32), TypeError, "expected dtype bfloat16, got float32; the type of x"),
    ("one", "state_batch_indices", cast(torch.int16), TypeError, INTEGER + "int16"),
    ("one", "dst_state_batch_indices", cast(torch.float32), TypeError, INTEGER + "float32"),
    ("packed", "cu_seqlens", cast(torch.float32), TypeError, INTEGER + "float32"),
    ("accepted", "num_accepted_tokens", cast(torch.bool), TypeError, INTEGER + "bool"),
    ("saved", "intermediate_state_indices", cast(torch.uint8), TypeError, INTEGER + "uint8"),
    ("saved", "intermediate_states_buffer", cast(torch.float32), TypeError, "float16, got float32; the type of state"),
    ("quantised", "state_scale", cast(torch.float16), TypeError, "expected dtype float32, got float16"),
    ("quantised", "intermediate_state_scales", cast(torch.float64), TypeError, "expected dtype float32, got float64"),
    ("random", "rand_seed", cast(torch.int32), TypeError, "expected dtype int64, got int32"),
    # strides and addresses
    ("one", "x", transposed, ValueError, LAST.format("x")),
    ("one", "B", every_other, ValueError, LAST.format("B")),
    ("one", "C", every_other, ValueError, LAST.format("C")),
    ("one", "z", transposed, ValueError, LAST.format("z")),
    ("one", "out", transposed, ValueError, LAST.format("out")),
    ("batched", "x", transposed, ValueError, LAST.format("x")),
    ("packed", "B", every_other, ValueError, LAST.format("B")),
    ("one", "A", always(torch.ones(4, 128, 64).mT), ValueError, r"stride 1 in the last.*; pass A.contiguous\(\)"),
    ("one", "state", transposed, ValueError, "expected contiguous rows of dstate.*; it is written, so allocate it"),
    ("one", "state", every_other, ValueError, "expected contiguous rows of dstate"),
    ("one", "state", unaligned, ValueError, "multiples of 16 bytes.*; pad the slots of the pool"),
    ("one", "state", odd_slots, ValueError, "multiples of 16 bytes.*; pad the slots of the pool"),
    ("one", "state", overlapping_slots, ValueError, SHARED),
    ("one", "state", one_slot, ValueError, SHARED),
    ("one", "state", lambda t: t[:, :1].expand_as(t), ValueError, SHARED),
    ("one", "out", lambda t: t[:1].expand_as(t), ValueError, SHARED),
    ("batched", "out", lambda t: t[:, :1].expand_as(t), ValueError, SHARED),
    ("packed", "out", lambda t: t[:, :1].expand_as(t), ValueError, SHARED),
    ("saved", "intermediate_states_buffer", transposed, ValueError, "expected contiguous rows of dstate"),
    ("saved", "intermediate_states_buffer", unaligned, ValueError, "multiples of 16 bytes"),
    ("saved", "intermediate_states_buffer", odd_slots, ValueError, "multiples of 16 bytes"),
    ("saved", "intermediate_states_buffer", one_slot, ValueError, SHARED),
    ("saved", "intermediate_states_buffer", lambda t: t[:, :1].expand_as(t), ValueError, SHARED),
    ("quantised", "state_scale", every_other, ValueError, LAST.format("state_scale")),
    ("quantised", "state_scale", one_slot, ValueError, SHARED),
    ("quantised", "intermediate_state_scales", every_other, ValueError, LAST.format("intermediate_state_scales")),
    ("quantised", "intermediate_state_scales", one_slot, ValueError, SHARED),
    ("seeds", "rand_seed", lambda t: t[:1].expand_as(t), ValueError, LAST.format("rand_seed")),
    # scales
    ("quantised", "state_scale", always(None), ValueError, "expected scales of a state of int8, got None"),
    ("one", "state_scale", always(torch.ones(9, 4, 64)), ValueError, "None with a state of float16, got a tensor"),
    ("one", "state > state_scale", cast(torch.int8), ValueError, "scales of a state of int8, got None"),
    ("quantised", "state_scale", lambda t: t[:2], ValueError, r"expected shape \(slots, nheads, dim\) = "),
    ("quantised", "state_scale", lambda t: t[..., :1], ValueError, r"expected shape \(slots, nheads, dim\) = "),
    ("quantised", "intermediate_state_scales", always(None), ValueError, "scales for intermediate_states_buffer, got"),
    ("quantised", "intermediate_state_scales", lambda t: t[:, :2], ValueError, r"\(rows, steps, nheads, dim\) = \(5,"),
    ("saved", "intermediate_state_scales", always(torch.ones(1)), ValueError, "None with a state that has no scales"),
    ("in_place", "intermediate_state_scales", always(torch.ones(1)), ValueError, "None without intermediate_states_bu"),
    # intermediate states
    ("saved", "intermediate_states_buffer", lambda t: t[0], ValueError, r"expected shape \(rows, steps, nheads, dim,"),
    ("saved", "intermediate_states_buffer", lambda t: t[:, :3], ValueError, "expected at least T = 4 steps, got 3"),
    ("saved", "intermediate_states_buffer", lambda t: t[:, :, :1], ValueError, r"expected shape \(rows, steps, nheads"),
    ("saved_unindexed", "intermediate_states_buffer", lambda t: t[1:], ValueError, "slots.*; pass intermediate_state_"),
    ("saved", "intermediate_state_indices", lambda t: t[:2], ValueError, r"expected shape \(batch,\) = \(3,\)"),
    ("saved", "intermediate_state_indices", lambda t: t[:, None], ValueError, r"expected shape \(batch,\) = \(3,\)"),
    ("saved", "intermediate_state_indices", put(1, 5), ValueError, r"indices in \[0, 5\), got 5 at position 1"),
    ("saved", "intermediate_state_indices", put(2, -1), ValueError, r"indices in \[0, 5\), got -1 at position 2"),
    ("saved", "intermediate_state_indices", lambda t: t * 0 + 1, ValueError, "distinct rows of .*, got 1 more than on"),
    ("in_place", "intermediate_state_indices", always(torch.arange(3)), ValueError, "None without intermediate_states"),
    ("saved", "dst_state_batch_indices", always(torch.arange(3)), ValueError, "None with intermediate_states_buffer,"),
    # indices, tokens and lengths
    ("one", "state_batch_indices", put(1, 9), ValueError, r"in \[0, 9\) or pad_slot_id = -1, got 9 at position 1"),
    ("one", "state_batch_indices", put(0, -2), ValueError, "got -2 at position 0"),
    ("one", "dst_state_batch_indices", put(0, 9), ValueError, "got 9 at position 0"),
    ("batched", "dst_state_batch_indices", put((1, 2), -2), ValueError, r"got -2 at position \(1, 2\)"),
    ("accepted", "state_batch_indices", lambda t: t * 0 + 99, ValueError, r"got 99 at position \(0, "),
    ("one", "dst_state_batch_indices", lambda t: t * 0 + 8, ValueError, "distinct slots, got 8 more than once"),
    ("batched", "dst_state_batch_indices", put((0, slice(2)), 6), ValueError, "expected distinct slots, got 6 more th"),
    ("in_place", "state_batch_indices", lambda t: t * 0, ValueError, "expected distinct slots, got 0 more than once"),
    ("one", "num_accepted_tokens", always(torch.ones(3).int()), ValueError, "None without a matrix of state_batch_ind"),
    ("batched", "num_accepted_tokens", always(torch.ones(3).int()), ValueError, "None without a matrix.*; the state t"),
    ("accepted", "state_batch_indices > num_accepted_tokens", lambda t: t[:, 0], ValueError, "None without a matrix o"),
    ("accepted", "num_accepted_tokens", put(1, 6), ValueError, "at most 5, the columns of state_batch_indices, got 6"),
    ("packed", "cu_seqlens", put(1, 9), ValueError, r"non-decreasing offsets of at most 11 tokens, got \[1, 9, 4"),
    ("packed", "cu_seqlens", put(-1, 12), ValueError, "expected non-decreasing offsets of at most 11 tokens"),
    ("packed", "cu_seqlens", put(0, -1), ValueError, "expected non-decreasing offsets of at most 11 tokens"),
    ("packed", "cache_steps > cu_seqlens", always(4), ValueError, "sequences of at most 4 tokens, got one of 5; raise"),
    ("packed", "cache_steps", always(-1), ValueError, "expected 0 or more, got -1"),
    ("packed", "dst_state_batch_indices > cu_seqlens", lambda t: t[:, :4], ValueError, "at most 4 tokens, got one of"),
    ("saved_packed", "intermediate_states_buffer > cu_seqlens", lambda t: t[:, :2], ValueError, "at most 2 tokens, go"),
    # seeds
    ("random", "rand_seed", lambda t: t.repeat(2), ValueError, r"expected shape \(1,\) or \(slots,\) = \(\d+,\), got"),
    ("seeds", "rand_seed", lambda t: t[1:], ValueError, r"expected shape \(1,\) or \(slots,\) = "),
    ("random", "rand_seed", lambda t: t[0], ValueError, r"expected shape \(1,\) or \(slots,\) = .*got \(\)"),
    ("random", "philox_rounds", always(0), ValueError, "expected 1 or more with rand_seed, got 0"),
    ("random", "philox_rounds", always(-3), ValueError, "expected 1 or more with rand_seed, got -3"),
    ("random", "state > rand_seed", lambda t: t.float(), UnsupportedSpecError, "None with a float32 state, which is n"),
    # the rest
    ("one", "pad_slot_id", always(None), TypeError, "expected an int, got NoneType"),
    ("one", "pad_slot_id", always(-1.0), TypeError, "expected an int, got float"),
    ("one", "pad_slot_id", always(torch.tensor(-1)), TypeError, "expected an int, got Tensor"),
    ("one", "pad_slot_id", always(2**63), ValueError, "expected an int of 64 bits, got 9223372036854775808"),
    ("packed", "cache_steps", always(5.0), TypeError, "expected an int, got float"),
    ("random", "philox_rounds", always("10"), TypeError, "expected an int, got str"),
    ("one", "algorithm", always("diagonal"), ValueError, "expected auto or simple or vertical or horizontal"),
]  # fmt: skip


def expect(call: dict, name: str, error: type, message: str, emulated: bool) -> None:
    refuses(lambda: cute_ssm.selective_state_update(**call), call, name, error, message, emulated)


@pytest.mark.parametrize("name", BASES)
def test_what_is_broken_below_is_legal_before(name):
    cute_ssm.selective_state_update(**base(name))


def ids(value):
    return value if isinstance(value, str) else getattr(value, "__name__", "")


@pytest.mark.parametrize("emulated", [False, True], ids=["reference", "emulate"])
@pytest.mark.parametrize(("start", "name", "change", "error", "message"), BROKEN, ids=ids)
def test_broken_precondition(start, name, change, error, message, emulated):
    call = base(start)
    changed, _, named = name.partition(" > ")
    call[changed] = change(call.get(changed))
    expect(call, named or changed, error, message, emulated)


@pytest.mark.parametrize("emulated", [False, True], ids=["reference", "emulate"])
@pytest.mark.parametrize(
    ("case", "name", "message"),
    [
        (Case(pads=(), dim=12), "dim", "expected a positive multiple of 8, got 12"),
        (Case(pads=(), dstate=7), "dstate", "expected 8 to 256, got 7"),
        (Case(pads=(), dstate=264), "dstate", "expected 8 to 256, got 264"),
        (
            Tokens(pads=(), dstate=20, state="i8"),
            "dstate",
            "a multiple of 8 for quantised states and stochastic rounding",
        ),
        (Tokens(pads=(), dstate=20, state="i16"), "dstate", "a multiple of 8 for quantised states"),
        (Tokens(pads=(), dstate=20, state="f8"), "dstate", "a multiple of 8 for quantised states"),
        (
            Tokens(pads=(), dstate=20, rounds=10),
            "dstate",
            "a multiple of 8 for quantised states and stochastic rounding",
        ),
    ],
    ids=str,
)
def test_sizes_outside_the_kernel(case, name, message, emulated):
    call = step_cases.arguments(case) if isinstance(case, Case) else token_cases.arguments(case)
    expect(call, name, UnsupportedSpecError, message, emulated)


@pytest.mark.parametrize("emulated", [False, True], ids=["reference", "emulate"])
def test_groups_must_divide_heads(emulated):
    call = step_cases.arguments(Case(nheads=3, ngroups=1, pads=()))
    call["B"], call["C"] = (call[n].expand(3, 2, 128).contiguous() for n in "BC")
    expect(call, "B", ValueError, "expected ngroups that divides nheads = 3, got ngroups = 2", emulated)


@pytest.mark.parametrize("emulated", [False, True], ids=["reference", "emulate"])
def test_no_destination_may_be_read_by_another_sequence(emulated):
    call = base("one")
    call["dst_state_batch_indices"] = call["state_batch_indices"].roll(1)
    expect(
        call, "dst_state_batch_indices", ValueError, "slots that no other sequence reads, got .*; the order", emulated
    )


def test_a_tensor_on_neither_gpu_nor_cpu():
    call = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in base("one").items()}
    expect(call, "state", ValueError, "a tensor on a GPU or on the CPU, got one on meta; move all to one", False)


# ---------------------------------------------------------------------------------- what looks broken, and is not
LEGAL = [
    ("in_place", {"state_batch_indices": lambda t: t * 0, "disable_state_update": always(True)}),  # all read one slot
    ("batched", {"dst_state_batch_indices": lambda t: torch.cat([t[:, :4], t[:, 4:] * 0 + 99], 1)}),  # no token uses it
    ("packed", {"dst_state_batch_indices": put(1, 99)}),  # of a sequence without tokens
    ("packed", {"state_batch_indices": put(1, 99)}),
    ("saved", {"state_batch_indices": put(1, -1), "intermediate_state_indices": put(1, 99)}),  # of padding
    ("batched", {"state_batch_indices": put(1, -1), "dst_state_batch_indices": put(1, 99)}),
    ("accepted", {"num_accepted_tokens": always(torch.tensor([0, -7, 5], dtype=torch.int32))}),
    ("one", {"pad_slot_id": always(-100)}),
    ("packed", {"cache_steps": always(0)}),
    ("packed", {"cache_steps": always(2**40)}),
]


@pytest.mark.thin(5, "emulated")
@pytest.mark.parametrize("emulated", [False, True], ids=["reference", "emulate"])
@pytest.mark.parametrize(("start", "changes"), LEGAL)
def test_what_is_never_read_may_be_anything(start, changes, emulated):
    call = base(start)
    if "pad_slot_id" in changes:  # a destination of this base is padding
        call["dst_state_batch_indices"] = call["dst_state_batch_indices"].masked_fill(
            call["dst_state_batch_indices"] < 0, -100
        )
    for name, change in changes.items():
        call[name] = change(call[name])
    if emulated:
        with kernel_backends.kernel(checks=False):
            cute_ssm.selective_state_update(**call)
    else:
        cute_ssm.selective_state_update(**call)


@pytest.mark.parametrize("emulated", [False, True], ids=["reference", "emulate"])
@pytest.mark.parametrize("form", ["batch", "steps", "packed"])
def test_calls_without_tokens(form, emulated):
    """No sequences, no steps, or offsets of no sequence: nothing is written."""
    call = base("packed" if form == "packed" else "in_place")
    if form == "packed":
        call["cu_seqlens"] = torch.zeros(1, dtype=torch.int32)
        call |= {n: call[n][:0] for n in ("state_batch_indices", "dst_state_batch_indices")}
    elif form == "batch":
        call |= {n: call[n][:0] for n in ("state_batch_indices", "x", "dt", "B", "C", "z", "out")}
    else:
        call |= {n: call[n][:, :0] for n in ("x", "dt", "B", "C", "z", "out")}
    before = copy(call)
    if emulated:
        with kernel_backends.kernel(checks=False):
            out = cute_ssm.selective_state_update(**call)
    else:
        out = cute_ssm.selective_state_update(**call)
    assert out is call["out"]
    same_memory(call["state"], before["state"])
