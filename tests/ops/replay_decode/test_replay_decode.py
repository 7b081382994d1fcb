"""vLLM's one-token ReplaySSM function: against the recurrence in float64, on reference and emulator; bad arguments."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import out_of_range
import pytest
import torch
from bits import each_same_bits, same_bits
from kernel_backends import both
from memory import copy
from replay_decode_cases import BASE, FEW, MORE, NULL, Case, arguments, sequences, verify

from cute_ssm import arch as archs
from cute_ssm import runtime, tuning
from cute_ssm.compat import vllm
from cute_ssm.ops.replay_decode import arguments as checks
from cute_ssm.ops.replay_decode.spec import ReplayDecodeSpec

decode = vllm.selective_state_update_replayssm_output_only


def written(call):
    return {name: call[name] for name in ("state", "x_cache", "B_cache", "dt_cache", "out")}


@pytest.mark.parametrize("case", [*FEW, *MORE], ids=str)
def test_reference(case):
    verify(case)


@pytest.mark.thin(3)
@pytest.mark.parametrize("case", [*FEW, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)], ids=str)
def test_emulated(case, backend):
    with backend() as session:
        verify(case)
    assert len(session.launches) == 1


@pytest.mark.thin(3)
@pytest.mark.parametrize("case", [BASE, Case(state="f16", seed=3), Case(inputs="f32", dstate=16)], ids=str)
def test_emulated_for_blackwell(case, backend):
    with backend("sm_100a"):
        verify(case)


@pytest.mark.thin(2, "backend")
@both
@pytest.mark.parametrize("rows", [1, 4])
def test_many_steps_are_those_of_the_plain_update(rows, backend):
    """With a float32 state, in which both round alike, and sequences that flush in different steps."""
    call = arguments(Case(rows=rows, inputs="f32", dt=torch.float32, indices=None), positions=[0] * 6)
    call["write_pos"] = (torch.arange(6) % rows).int()
    for name in ("x_cache", "B_cache", "dt_cache"):
        call[name].zero_()  # tokens that change nothing
    state, out = call["state"].clone(), torch.empty_like(call["out"])
    g = torch.Generator().manual_seed(0)
    for _ in range(2 * rows + 1):
        for name in ("x", "B", "C", "z"):
            call[name].copy_(torch.randn(call[name].shape, generator=g))
        call["is_flush"] = call["write_pos"] == rows - 1
        with backend(checks=False):
            decode(**call)
        names = ("x", "dt", "A", "B", "C", "D", "dt_bias", "z", "dt_softplus")
        vllm.selective_state_update(state, **{name: call[name] for name in names}, out=out)
        torch.testing.assert_close(call["out"], out, rtol=1e-4, atol=1e-4)
        flushed = call["is_flush"].nonzero()[:, 0]
        torch.testing.assert_close(call["state"][flushed], state[flushed], rtol=1e-5, atol=1e-5)
        call["write_pos"] = torch.where(call["is_flush"], 0, call["write_pos"] + 1).int()


@pytest.mark.thin(2)
@pytest.mark.parametrize("case", [Case(state="f16", seed=11), Case(state="bf16", dstate=16)], ids=str)
def test_bits_are_those_of_the_reference(case, backend):
    """Where no sum is rounded, kernel and reference agree in every bit of states, random ones included."""
    results = []
    for context in (contextlib.nullcontext(), backend()):
        call = arguments(dataclasses.replace(case, softplus=False, bias=False, z=False, rate=0.0))
        for name in ("state", "x", "B", "C", "x_cache", "B_cache", "dt_cache"):
            call[name].copy_(call[name].float().mul(8).round().clamp(-8, 8).div(8))
        call["dt"] = torch.full_like(call["dt"][..., :1], 0.5).expand_as(call["dt"])
        with context:
            decode(**call)
        results.append({name: value + 0.0 for name, value in written(call).items()})  # zeros have one sign
    each_same_bits(*results)


@pytest.mark.thin(2)
@pytest.mark.parametrize("warps", [1, 8])
def test_bits_do_not_depend_on_config_or_order(warps, backend):
    """Nor on the schedule; a call that draws the same seed draws the same bits."""
    results = []
    for flip in (False, True):
        call = arguments(Case(state="f16", seed=4))
        if flip:
            per_token = ("x", "dt", "B", "C", "z", "write_pos", "is_flush", "state_batch_indices")
            call |= {name: call[name].flip(0) for name in per_token if name != "dt"}
            call["dt"] = call["dt"][..., 0].flip(0)[..., None].expand_as(call["dt"])
        with backend(schedule=warps) if flip else backend(), tuning.override(warps=warps if flip else 4):
            decode(**call)
        results.append(written(call) | {"out": call["out"].flip(0) if flip else call["out"]})
    each_same_bits(*results)


def test_numbers_out_of_range_leave_their_rows_as_they_are(backend, monkeypatch):
    """As on a GPU, where the host does not look at them."""
    monkeypatch.setattr(checks, "check_contents", lambda call: None)
    call = arguments(Case(indices=torch.int64), positions=[2] * 18)
    call["state_batch_indices"] = torch.arange(1, 19)
    wanted = copy(call)
    bad_slots = out_of_range.outside(21, torch.int64, right=3)
    bad_places = out_of_range.outside(8, torch.int32)
    bad = len(bad_slots) + len(bad_places[: 16 - len(bad_slots)])
    call["state_batch_indices"][: len(bad_slots)] = torch.tensor(bad_slots)
    call["write_pos"][len(bad_slots) : bad] = torch.tensor(bad_places[: bad - len(bad_slots)])
    untouched = copy(call)
    with backend():
        decode(**wanted)
        decode(**call)
    for name in written(call):
        rows = slice(bad, None) if name == "out" else slice(bad + 1, 19)
        same_bits(call[name][rows], wanted[name][rows], name)
        rows = slice(0, bad) if name == "out" else slice(0, bad + 1)
        same_bits(call[name][rows], untouched[name][rows], name)


def test_without_heads_and_from_arrays(backend):
    call = arguments(Case(heads=1, groups=1, inputs="f32", dt=torch.float32, indices=None, z=False))
    single = {name: call[name].squeeze(1) for name in ("state", "x", "dt", "B", "C", "out")}
    single |= {name: call[name][0] for name in ("A", "D", "dt_bias")}
    flat = copy({**call, **single})
    with backend():
        decode(**call)
        decode(**flat)
    for name, value in written(call).items():
        same_bits(flat[name].view(value.shape), value, name)
    arrays = arguments(Case(heads=1, groups=1, inputs="f32", dt=torch.float32, indices=None, z=False))
    arrays |= {name: arrays[name].numpy() for name in ("state", "x", "x_cache", "out", "write_pos")}
    decode(**arrays)
    np.testing.assert_allclose(arrays["out"], call["out"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, given in arguments(BASE).items() if isinstance(given, torch.Tensor)])
def test_any_one_argument_may_be_an_array(name):
    case = Case(heads=2, groups=1, inputs="f32", dt=torch.float32)
    call, mixed = arguments(case), arguments(case)
    mixed[name] = mixed[name].numpy()
    decode(**call)
    decode(**mixed)
    for key, value in written(call).items():
        same_bits(torch.as_tensor(mixed[key]), value, key)


def test_longer_indices_and_an_empty_batch(backend):
    call, longer = arguments(BASE), arguments(BASE)
    for name in ("write_pos", "is_flush", "state_batch_indices"):
        longer[name] = torch.cat([longer[name], torch.full((3,), 99).to(longer[name].dtype)])
    empty = {**copy(longer), **{name: longer[name][:0] for name in ("x", "B", "C", "z", "out", "dt")}}
    empty["dt"] = call["dt"][:0]
    before = copy(empty)
    for context in (contextlib.nullcontext(), backend()):
        with context:
            decode(**copy(call))
            decode(**empty)
    decode(**call)
    decode(**longer)
    each_same_bits(written(longer), written(call))
    each_same_bits(written(empty), written(before))


SPECS = [
    ReplayDecodeSpec(
        "float32", "bfloat16", "float32", "bfloat16", "float32", "float32", 64, 128, True, True, "int32", True
    ),
    ReplayDecodeSpec(
        "float16", "bfloat16", "float32", "bfloat16", "float32", "float32", 80, 128, True, True, "int32", False, 10
    ),
    ReplayDecodeSpec("float32", "float32", "float32", "float32", None, None, 64, 256, False, True, None, True),
]


@pytest.mark.thin(3)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.text())
def test_nothing_spills(spec, arch):
    compiled = runtime.emulated(spec, None, archs.by_name(arch))
    assert compiled.kernels and all(kernel.spill_bytes == 0 for kernel in compiled.kernels)


# -------------------------------------------------------------------------------------------------------- bad arguments
def changed(name, change):
    return lambda call: call.__setitem__(name, change(call[name]))


def seeded(dtype):
    def change(call):
        call.update(state=call["state"].to(dtype), enable_stochastic_rounding=True)

    return change


BAD = {
    "state: expected a torch.Tensor": changed("state", lambda t: t.tolist()),
    "state: expected dtype": changed("state", lambda t: t.to(torch.int8)),
    "state: expected shape (slots, nheads, dim, dstate)": changed("state", lambda t: t[0, 0]),
    "state: expected contiguous": changed("state", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
    "state: expected dtype float16 with": seeded(torch.bfloat16),
    "out: expected a torch.Tensor": changed("out", lambda t: None),
    "out: expected shape": changed("out", lambda t: t[:2]),
    "out: expected dtype": changed("out", lambda t: t.float()),
    "x: expected shape": changed("x", lambda t: t[..., :8]),
    "B: expected dtype": changed("B", lambda t: t.float()),
    "B: expected ngroups": changed("B", lambda t: t.repeat(1, 2, 1)[:, :3]),
    "C: expected shape": changed("C", lambda t: t[..., :8]),
    "z: expected shape": changed("z", lambda t: t[:1]),
    "dt: expected one value per head": changed("dt", lambda t: t.contiguous()),
    "dt: expected last dimensions": changed("dt", lambda t: t[..., :1]),
    "dt_bias: expected one value per head": changed("dt_bias", lambda t: t.contiguous()),
    "A: expected one value per head": changed("A", lambda t: t.contiguous()),
    "x_cache: expected a torch.Tensor": changed("x_cache", lambda t: None),
    "x_cache: expected max_cache_len = 8 rows": changed("x_cache", lambda t: t[:, :, :7]),
    "x_cache: expected stride 1": changed("x_cache", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
    "B_cache: expected shape": changed("B_cache", lambda t: t[:, :, :7]),
    "B_cache: expected dtype": changed("B_cache", lambda t: t.half()),
    "dt_cache: expected dtype": changed("dt_cache", lambda t: t.half()),
    "dt_cache: expected elements": changed("dt_cache", lambda t: t[..., :1].expand(t.shape)),
    "write_pos: expected dtype": changed("write_pos", lambda t: t.long()),
    "write_pos: expected shape": changed("write_pos", lambda t: t[:2]),
    "write_pos: expected values in [0, 8), got 8 at position 1": changed("write_pos", lambda t: t + 8),
    "is_flush: expected a torch.Tensor": changed("is_flush", lambda t: None),
    "is_flush: expected dtype": changed("is_flush", lambda t: t.int()),
    "state_batch_indices: expected dtype": changed("state_batch_indices", lambda t: t.float()),
    "state_batch_indices: expected indices in [0, 9) or null_block_id = 0": changed(
        "state_batch_indices", lambda t: t + 9
    ),
    "state_batch_indices: expected distinct slots": changed("state_batch_indices", lambda t: t * 0 + 1),
    "max_cache_len: expected 1 to 64": lambda call: call.update(max_cache_len=65),
    "rand_seed: expected None without": lambda call: call.update(rand_seed=torch.tensor([1])),
    "rand_seed: expected shape": lambda call: [seeded(torch.half)(call), call.update(rand_seed=torch.tensor([1, 2]))],
    "cache_philox_rounds: expected 0 or more": lambda call: [
        seeded(torch.half)(call), call.update(cache_philox_rounds=-1)
    ],
    "dstate: expected a multiple of 8": lambda call: call.update(
        state=call["state"][..., :100].contiguous(), A=call["A"][..., :100], B=call["B"][..., :100],
        C=call["C"][..., :100], B_cache=call["B_cache"][..., :100],
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    call = arguments(BASE)
    if message.startswith("write_pos: expected values"):
        call["state_batch_indices"][0] = NULL
    BAD[message](call)
    before = copy(call)
    with pytest.raises((ValueError, TypeError)) as caught:
        decode(**call)
    assert message in str(caught.value)
    for name, value in written(before).items():
        if isinstance(value, torch.Tensor):
            same_bits(call[name], value, name)


def test_registered_with_pytorch():
    call, eager = arguments(BASE), arguments(BASE)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(call):
        return decode(**call)

    step(call)
    decode(**eager)
    each_same_bits(written(call), written(eager))
    assert sequences(call)
