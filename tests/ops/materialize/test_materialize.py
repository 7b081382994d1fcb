"""`serving.materialize`: against token-by-token float64, on reference and emulator; bits of rounding; bad arguments."""

from __future__ import annotations

import contextlib
import mmap

import pytest
import torch
from bits import each_same_bits, same_bits
from kernel_backends import both
from materialize_cases import BASE, CASES, Case, fold, random, verify

from cute_ssm import arch as archs
from cute_ssm import runtime, serving, tuning
from cute_ssm.ops.materialize.spec import MaterializeSpec
from cute_ssm.reference import rounding


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case):
    for seed in range(2):
        verify(case, seed)


@pytest.mark.thin(21, "state", "out", "history")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated(case, backend):
    with backend() as session:
        verify(case)
    assert len(session.launches) == 1


@pytest.mark.thin(3)
@pytest.mark.parametrize("case", [BASE, Case(state="i8", seeds="slots"), Case(state="f16", seeds="one")], ids=str)
def test_emulated_for_blackwell(case, backend):
    with backend("sm_100a"):
        verify(case)


@pytest.mark.thin(4, "backend")
@both
@pytest.mark.parametrize("rate", [1.0, 100.0])
@pytest.mark.parametrize(
    "state", ["bf16", "f16", *(pytest.param(s, marks=pytest.mark.slow) for s in ("f32", "i16", "i8", "f8"))]
)
def test_a_state_errs_like_one_rounding(state, rate, backend):
    """In root mean square, at most 1.1 times as much as the right state rounded once; float32, as a few roundings.

    All tokens but the last three decay by far more than those: exponents of their sums would cancel.
    """
    made = random(Case(state=state, rows=64, counts=False, rate=rate, heads=8, dim=16), 0)
    call = made["call"]
    for (_, _, step), slot in zip(made["tokens"], made["order"].tolist()):
        count = max(len(step) - 3, 0)
        step[:count] *= 300.0
        call["dt_history"][slot, call["cache_buf_idx"][slot], :, :count] *= 300.0
    before = call["state"].clone(), call["state_scale"].clone() if "state_scale" in call else None
    with backend():
        serving.materialize(**call)
    for b, tokens in enumerate(made["tokens"]):
        source, to = (int(call[name][b]) for name in ("state_batch_indices", "dst_state_batch_indices"))
        if call["pad_slot_id"] in (source, to) or len(tokens[0]) == 0:
            continue
        first = rounding.load(before[0][source], None if before[1] is None else before[1][source])
        want = fold(first.double(), call["A"][:, 0, 0], *tokens)
        got = rounding.load(call["state"][to], None if before[1] is None else call["state_scale"][to]).double()
        dtype = call["state"].dtype
        if before[1] is None:
            nearest = want.to(dtype).double()
        else:
            scale = want.abs().amax(-1, keepdim=True) / rounding.LARGEST[dtype]
            nearest = (want / scale if dtype is torch.float8_e4m3fn else (want / scale).round()).to(
                dtype
            ).double() * scale
        ratio = ((got - want).square().mean((1, 2)) / (nearest - want).square().mean((1, 2))).mean().sqrt()
        assert ratio <= (4.0 if state == "f32" else 1.1), f"{len(tokens[0])} tokens: {ratio:.3f} roundings"


@pytest.mark.thin(3)
@pytest.mark.parametrize("warps", [1, 3, 8])
def test_bits_do_not_depend_on_config_or_order(warps, backend):
    """Nor on the place in the batch, nor on the run."""
    results = []
    for flip in (False, True):
        call = random(Case(state="i8", seeds="slots", out="i8"), 0)["call"]
        if flip:
            for name in ("state_batch_indices", "dst_state_batch_indices", "num_tokens"):
                call[name] = call[name].flip(0)
        with backend(schedule=warps) if flip else backend(), tuning.override(warps=warps if flip else 4):
            serving.materialize(**call)
        results.append((call["out"], call["out_scale"]))
    each_same_bits(*results)


@pytest.mark.thin(5)
@pytest.mark.parametrize("out", ["f16", "bf16", "i8", "i16", "f8"])
@pytest.mark.parametrize("seeds", ["slots", None])
def test_bits_are_those_of_the_reference(out, seeds, backend):
    """Where no sum is rounded, kernel and reference agree in every bit, random ones included."""
    results = []
    for context in (contextlib.nullcontext(), backend()):
        call = random(Case(out=out, counts=False, seeds=seeds, rate=0.0), 3)["call"]
        for name in ("state", "x_history", "B_history", "dt_history"):
            call[name].copy_(call[name].float().nan_to_num().mul(8).round().clamp(-16, 16).div(8))
        with context:
            serving.materialize(**call)
        results.append(call["out"])
    same_bits(results[0].view(torch.uint8), results[1].view(torch.uint8))


SPECS = [
    MaterializeSpec("float32", "float32", "bfloat16", "float32", 64, 128, "ring", "int32", "int32", "int32"),
    MaterializeSpec("int8", "int8", "float16", "float32", 128, 256, "double_x", "int64", "int64", None, 10, True),
    MaterializeSpec("float16", "float16", "bfloat16", "float32", 80, 128, "double", "int32", "int32", None, 10, True),
    MaterializeSpec("float8_e4m3fn", "float32", "bfloat16", "bfloat16", 64, 96, "ring", "int32", "int32", None),
]


@pytest.mark.thin(4)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.text())
def test_nothing_spills(spec, arch):
    compiled = runtime.emulated(spec, None, archs.by_name(arch))
    assert compiled.kernels and all(kernel.spill_bytes == 0 for kernel in compiled.kernels)


# -------------------------------------------------------------------------------------------------------- bad arguments
def changed(name, change):
    return lambda call: call.__setitem__(name, change(call[name]))


BAD = {
    "state: expected dtype": changed("state", lambda t: t.double()),
    "state: expected shape": changed("state", lambda t: t[0]),
    "state: expected contiguous rows": changed("state", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
    "state: expected an address": changed("state", lambda t: torch.zeros(t.numel() + 1)[1:].view(t.shape)),
    "state: expected elements": changed("state", lambda t: t[:1].expand(t.shape)),
    "out: expected shape": lambda call: call.update(out=torch.zeros(3, 2, 64, 64)),
    "state_scale: expected None with": lambda call: call.update(state_scale=torch.zeros(11, 2, 64)),
    "state_scale: expected scales": changed("state", lambda t: t.to(torch.int8)),
    "out_scale: expected None without": lambda call: call.update(out_scale=torch.zeros(11, 2, 64)),
    "out_scale: expected scales": lambda call: call.update(out=call["state"].to(torch.int8)),
    "x_history: expected dtype": changed("x_history", lambda t: t.float()),
    "x_history: expected shape": changed("x_history", lambda t: t[:, :, 0]),
    "x_history: expected at most 64": changed("x_history", lambda t: t.repeat(1, 5, 1, 1)),
    "x_history: expected stride 1": changed("x_history", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
    "B_history: expected dtype": changed("B_history", lambda t: t.half()),
    "B_history: expected ngroups": changed("B_history", lambda t: t.repeat(1, 1, 1, 3, 1)),
    "B_history: expected shape": changed("B_history", lambda t: t[:, :, :8]),
    "dt_history: expected shape": changed("dt_history", lambda t: t[:, :1]),
    "dt_history: expected dtype": changed("dt_history", lambda t: t.half()),
    "A: expected stride 0": changed("A", lambda t: t.contiguous()),
    "A: expected shape": changed("A", lambda t: t[:1]),
    "prev_num_accepted_tokens: expected dtype": changed("prev_num_accepted_tokens", lambda t: t.long()),
    "prev_num_accepted_tokens: expected values from 0 to 16": changed("prev_num_accepted_tokens", lambda t: t + 100),
    "cache_buf_idx: expected values from 0 to 1": changed("cache_buf_idx", lambda t: t + 2),
    "cache_buf_idx: expected a tensor, or ring_start": changed("cache_buf_idx", lambda t: None),
    "cache_buf_idx: expected a torch.Tensor": changed("cache_buf_idx", lambda t: 1),
    "ring_start: expected None with": lambda call: call.update(ring_start=call["cache_buf_idx"]),
    "state_batch_indices: expected indices in": changed("state_batch_indices", lambda t: t + 11),
    "dst_state_batch_indices: expected indices in": changed("dst_state_batch_indices", lambda t: t + 11),
    "dst_state_batch_indices: expected distinct": changed("dst_state_batch_indices", lambda t: t * 0 + t[0]),
    "dst_state_batch_indices: expected slots that no other": lambda call: call.update(
        dst_state_batch_indices=call["state_batch_indices"].roll(1)
    ),
    "dst_state_batch_indices: expected shape": changed("dst_state_batch_indices", lambda t: t[:3]),
    "dst_state_batch_indices: expected dtype": changed("dst_state_batch_indices", lambda t: t.float()),
    "num_tokens: expected 0 to": changed("num_tokens", lambda t: t + 17),
    "num_tokens: expected shape": changed("num_tokens", lambda t: t[:3]),
    "num_tokens: expected dtype": changed("num_tokens", lambda t: t.float()),
    "rand_seed: expected None with a float32": lambda call: call.update(rand_seed=torch.zeros(1, dtype=torch.int64)),
    "rand_seed: expected shape": lambda call: call.update(rand_seed=torch.zeros(2, dtype=torch.int64)),
    "philox_rounds: expected 1 or more": lambda call: call.update(
        rand_seed=torch.zeros(1, dtype=torch.int64), out=call["state"].half(), philox_rounds=0
    ),
    "dim: expected a multiple of 8": lambda call: call.update(
        state=call["state"][:, :, :60], x_history=call["x_history"][..., :60], A=call["A"][:, :60]
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    call = random(BASE, 0)["call"]
    BAD[message](call)
    before = {name: value.clone() for name, value in call.items() if isinstance(value, torch.Tensor)}
    with pytest.raises((ValueError, TypeError)) as caught:
        serving.materialize(**call)
    assert message in str(caught.value)
    each_same_bits(call, before)


def test_an_empty_batch(backend):
    call = random(BASE, 0)["call"]
    for name in ("state_batch_indices", "dst_state_batch_indices", "num_tokens"):
        call[name] = call[name][:0]
    state = call["state"].clone()
    for context in (contextlib.nullcontext(), backend()):
        with context:
            serving.materialize(**call)
    same_bits(call["state"], state)


@pytest.mark.long
def test_slots_beyond_31_bits(backend):
    """Offsets in elements of the pool and of the history pass 2^31."""
    small = random(Case(counts=False, history="ring"), 0)["call"]
    call = random(Case(counts=False, history="ring"), 0)["call"]
    for name in ("state", "x_history", "B_history"):
        value = call[name]
        stride = (2**31 // 5) // 64 * 64
        size = (len(value) * stride) * value.element_size()
        memory = mapped(size).view(value.dtype)
        far = memory.as_strided(value.shape, (stride, *value.stride()[1:]))
        call[name] = far.copy_(value)
    with backend(checks=False):
        serving.materialize(**call)
        serving.materialize(**small)
    same_bits(call["state"], small["state"])


def mapped(size):
    """Bytes of memory that exists where it is touched."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(pages, dtype=torch.uint8)


def test_registered_with_pytorch():
    call, eager = (random(Case(state="i8"), 0)["call"] for _ in range(2))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(call):
        return serving.materialize(**call)

    step(call)
    serving.materialize(**eager)
    same_bits(call["state"], eager["state"])
    same_bits(call["state_scale"], eager["state_scale"])
