"""Every tensor argument of every operator with strides of its own, one argument at a time.

Which strides are free is what a kernel's fakes say.  In the emulator, which does not go through the checks of a
kernel's entry for the GPU, results must be those of contiguous arguments, bit for bit, and nothing between elements may
be read (it is NaN) or written.  The entries are compiled for CPU tensors, to see that they take such arguments at all.
"""

from __future__ import annotations

import functools
import itertools

import checkpointing_cases
import cutlass.cute as cute
import gdn_cases
import pytest
import replay_cases
import scan_cases
import token_cases
import torch
from bits import same_bits
from cutlass.cute.runtime import make_fake_tensor

import cute_ssm
from cute_ssm import arch as archs
from cute_ssm import serving
from cute_ssm.device import fakes as fakes_of_kernels
from cute_ssm.runtime import emulation, registry

SLOW = pytest.mark.slow
# vectors without a free stride; of the two cursors only where checkpointing_ssu reads them, and accepted_steps where no
# state is written and they are ignored
CONTIGUOUS = {
    "work_items", "num_writes", "rand_seed", "cache_buf_idx", "ring_start", "prev_num_accepted_tokens",
    "accepted_steps", "query_start_loc", "cu_chunk_seqlen",
}  # fmt: skip
GUARD = 64  # elements around a strided view
POISON = 99  # of integers: neither a slot, nor a cursor, nor an offset of these calls


def steps(**changes):
    call = token_cases.arguments(token_cases.Tokens(**{"lengths": (2, 2), "pads": (), **changes}))
    if changes.get("lengths") == (1, 1):  # without the axis of tokens
        call |= {name: call[name][:, 0] for name in ("x", "dt", "B", "C", "z", "out")}
    return call


def checkpointing(**changes):
    return checkpointing_cases.arguments(checkpointing_cases.Case(**{"batch": 2, "pads": (), **changes}))


def replay(**changes):
    fields = {"batch": 2, "K": 64, "tokens": 2, "window": 8, "pending": (5, 8), "pads": (), **changes}
    return replay_cases.arguments(replay_cases.Case(**fields))


def gated(**changes):
    return gdn_cases.arguments(gdn_cases.Case(**{"batch": 2, "K": 64, "tokens": 2, "pads": (), **changes}))


def verified():
    """Accepted tokens without a state that they would be passed by."""
    call = gated(mode="verify")
    return {**call, "accepted_steps": torch.tensor([1, 2])}


def scan(**changes):
    fields = {"lengths": (16, 16), "dim": 8, "nulls": (), "in_place": False, "layout": "packed", "slot_gap": 0}
    call = scan_cases.arguments(scan_cases.Case(**{**fields, **changes}))
    return {name: value.contiguous() if isinstance(value, torch.Tensor) else value for name, value in call.items()}


def cursors():
    slots, batch = 9, 5
    call = {
        "prev_num_accepted_tokens": torch.arange(slots, dtype=torch.int32),
        "ring_start": torch.arange(slots, dtype=torch.int32) % 4 * 3,
        "state_batch_indices": torch.arange(batch)[:].flip(0) + 2,
        "cu_seqlens": torch.arange(batch + 1) * 3,
    }
    return {**call, "window": 8, "ring_length": 16}


def commit():
    return {**cursors(), "num_accepted_tokens": torch.arange(5) % 4, "rand_seed": torch.arange(27).view(3, 9)}


def work():
    return {**cursors(), "work_items": torch.zeros(5, 4, dtype=torch.int32), "num_writes": torch.zeros(1).int()}


def materialize(state="i8", history="ring"):
    case = checkpointing_cases.Case(batch=2, pads=(), state=state, history=history, accepted=(3, 7))
    call = checkpointing_cases.arguments(case)
    x, B, dt, _, cursor = case.names
    renamed = {"x_history": call[x], "B_history": call[B], "dt_history": call[dt], cursor: call[cursor]}
    names = ("state", "state_scale", "A", "prev_num_accepted_tokens", "state_batch_indices")
    call = {**renamed, **{name: call[name] for name in names if name in call}}
    slots = call["state"].shape[0]
    for name in ("state", "state_scale"):  # another pool
        if name in call:
            call[name.replace("state", "out")] = torch.zeros_like(call[name].contiguous())
    call["dst_state_batch_indices"] = torch.tensor([slots - 1, 0])
    return {**call, "num_tokens": torch.tensor([2, 7])}


def materialize_gated():
    call = replay()
    names = ("initial_state", *replay_cases.RINGS, "ring_start", "prev_num_accepted_tokens")
    slots = call["initial_state_indices"]
    more = {"state_batch_indices": slots, "dst_state_batch_indices": slots.flip(0), "num_tokens": torch.tensor([2, 7])}
    out = torch.zeros_like(call["initial_state"])
    return {**{name: call[name] for name in names}, **more, "out": out, "window": 8}


STEP, CHECKPOINT, RULE = cute_ssm.selective_state_update, cute_ssm.checkpointing_ssu, cute_ssm.gated_delta_rule_mtp
OPERATORS = {
    "one_token": (STEP, steps, {"lengths": (1, 1), "state": "i8", "destination": "vector"}),
    "dense": (STEP, steps, {"lengths": (1, 1), "layout": "dense", "ngroups": 2}),
    "tokens": (STEP, steps, {"ngroups": 2, "state": "bf16"}),
    "sequences": (
        STEP,
        steps,
        {"packed": True, "accepted": True, "destination": "matrix", "layout": "dense_A", "rounds": 2},
    ),
    "intermediates": (STEP, steps, {"destination": "intermediates", "state": "i8"}),
    "checkpointing": (CHECKPOINT, checkpointing, {"state": "i8", "ngroups": 2}),
    "checkpointing_items": (CHECKPOINT, checkpointing, {"items": True, "history": "double_x"}),
    "checkpointing_packed": (CHECKPOINT, checkpointing, {"lengths": (2, 3), "rounds": 2}),
    "ring": (cute_ssm.checkpointing_ssu_ring, checkpointing, {"history": "ring", "tokens": 2}),
    "gated_delta_rule": (RULE, gated, {"mode": "accepted_split"}),
    "gated_delta_rule_one": (RULE, gated, {"tokens": 1, "mode": "buffer_update"}),
    "gated_delta_rule_scatter": (RULE, gated, {"mode": "scatter", "out": "bf16"}),
    "gated_delta_rule_verify": (RULE, verified, {}),
    "gated_delta_rule_packed": (RULE, gated, {"lengths": (2, 1), "mode": "accepted_split"}),
    "replay": (cute_ssm.gated_delta_rule_replay, replay, {}),
    "scan": (cute_ssm.selective_scan, scan, {"ngroups": 2}),
    "scan_of_blocks": (
        cute_ssm.selective_scan,
        scan,
        {"varlen": True, "block_size": 8, "computed": (3, 8), "io": "f32"},
    ),
    "commit": (serving.commit, commit, {}),
    "build_work_items": (serving.build_work_items, work, {}),
    "materialize": (serving.materialize, materialize, {}),
    "materialize_gated": (serving.materialize_gated_delta, materialize_gated, {}),
}
EVERY = list(OPERATORS)
FEW = ("one_token", "tokens", "intermediates", "ring", "gated_delta_rule", "scan", "commit")  # emulated by default


def contiguous(tensor):
    """The same values without gaps; dimensions of stride 0 stay so."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    values = tensor
    for d, stride in enumerate(tensor.stride()):
        values = values.narrow(d, 0, 1) if stride == 0 else values
    return values.clone(memory_format=torch.contiguous_format).expand(tensor.shape)


def call_of(name):
    _, make, fields = OPERATORS[name]
    return {argument: contiguous(value) for argument, value in make(**fields).items()}


def planned(name, monkeypatch, call=None):
    """(spec, config, arguments of the kernel) of an operator's call."""
    seen = []
    monkeypatch.setattr(emulation, "_nothing", lambda *args: seen.append(args))
    with emulation.planned(archs.SM_90A) as plan:
        OPERATORS[name][0](**(call_of(name) if call is None else call))
    return (*plan.kernels[0][:2], seen[0])


def fakes_of(spec, config):
    return registry.kernel_class(spec)(spec, config, archs.SM_90A).fakes()[:-1]


def is_tensor(fake):
    return hasattr(fake, "stride")


def free(fake):
    """Smallest step of each stride that is free, in elements; 0 where it is not."""
    return [getattr(stride, "divisibility", 0) for stride in fake.stride]


def strided(tensor, steps):
    """(memory, view in it): the same values with gaps along each dimension that has a step, filled with NaN."""
    block, strides = 1, []
    for d in reversed(range(tensor.dim())):
        if tensor.stride(d) == 0 and not steps[d]:
            strides.insert(0, 0)
            continue
        gap = steps[d] * (d + 2)
        strides.insert(0, block + gap - (block % steps[d] if steps[d] else 0))
        block = tensor.shape[d] * strides[0]
    memory = torch.full((block + 2 * GUARD,), POISON if not tensor.dtype.is_floating_point else 0).to(tensor.dtype)
    if tensor.dtype.is_floating_point:
        memory.copy_(torch.full(memory.shape, float("nan")))
    view = memory.as_strided(tensor.shape, strides, GUARD)
    values = tensor
    for d, stride in enumerate(strides):
        if stride == 0:
            values, view = values.narrow(d, 0, 1), view.narrow(d, 0, 1)
    view.copy_(values)
    return memory, memory.as_strided(tensor.shape, strides, GUARD)


@pytest.mark.parametrize("name", EVERY)
def test_no_two_tensors_share_a_fake_or_the_symbol_of_a_stride(name, monkeypatch):
    spec, config, _ = planned(name, monkeypatch)
    tensors = [fake for fake in fakes_of(spec, config) if is_tensor(fake)]
    assert len({id(fake) for fake in tensors}) == len(tensors)
    symbols = [id(stride) for fake in tensors for stride in fake.stride if not isinstance(stride, int)]
    assert len(set(symbols)) == len(symbols)
    for one, other in itertools.combinations(tensors, 2):
        named = [{stride.symbol for stride in t.stride if getattr(stride, "symbol", None)} for t in (one, other)]
        assert not named[0] & named[1]


@cute.jit
def entry(tensors: list, scalars: list):
    """Nothing."""


@pytest.mark.thin(5)
@pytest.mark.parametrize("name", EVERY)
def test_the_entry_of_a_kernel_takes_independent_strides_of_each_tensor(name, monkeypatch):
    spec, config, args = planned(name, monkeypatch)
    on_cpu = functools.partial(make_fake_tensor, memspace=cute.AddressSpace.generic)
    monkeypatch.setattr(fakes_of_kernels, "make_fake_tensor", on_cpu)
    fakes = fakes_of(spec, config)
    scalars = (i for i, fake in enumerate(fakes) if fake is not None and not is_tensor(fake))
    count = next(scalars, len(fakes))  # tensors come first; both may be absent
    function = cute.compile(entry, list(fakes[:count]), list(fakes[count:]), options="--enable-tvm-ffi")
    function = function.__tvm_ffi_object__()
    tensors, scalars = list(args[:count]), list(args[count:])
    function(tensors, scalars)
    for i, fake in enumerate(fakes[:count]):
        if fake is None or not any(free(fake)):
            continue
        _, view = strided(tensors[i], free(fake))
        assert view.stride() != tensors[i].stride()
        function([*tensors[:i], view, *tensors[i + 1 :]], scalars)


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", [name if name in FEW else pytest.param(name, marks=SLOW) for name in EVERY])
@pytest.mark.parametrize("arch", ["sm_90a", pytest.param("sm_100a", marks=SLOW)])
def test_each_tensor_strided_alone_gives_the_bits_of_contiguous_ones(name, arch, monkeypatch, backend):
    operator, call = OPERATORS[name][0], call_of(name)
    spec, config, args = planned(name, monkeypatch, call)
    given = {
        t.data_ptr(): steps
        for t, fake in zip(args, fakes_of(spec, config))
        if is_tensor(fake)
        for steps in [free(fake)]
    }

    def ran(call):
        with backend(arch, checks=False):
            operator(**call)
        return call

    def copy(call):
        return {name: contiguous(value) for name, value in call.items()}

    tensors = {argument: t for argument, t in call.items() if isinstance(t, torch.Tensor)}
    want = ran(copy(call))
    fixed = set()
    for argument, tensor in tensors.items():
        steps = given.get(tensor.data_ptr(), [])
        steps = steps[len(steps) - tensor.dim() :]  # operators put axes in front
        if not any(steps):
            fixed.add(argument)
            continue
        memory, view = strided(tensor, steps)
        before = memory.clone()
        changed = {**copy(call), argument: view}
        assert planned(name, monkeypatch, changed)[0] == spec, f"{argument}: another kernel"
        ran(changed)
        for result in tensors:
            same_bits(changed[result], want[result], f"{result} with {argument} strided")
        if 0 not in view.stride():  # else it is never written
            before.as_strided(view.shape, view.stride(), GUARD).copy_(view.clone())
        same_bits(memory, before, f"memory around {argument}")
    assert fixed <= CONTIGUOUS


def test_views_do_not_hide_what_is_read_between_elements():
    memory, view = strided(torch.arange(6.0).view(2, 3), [1, 0])
    assert view.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert view.stride() == (5, 1)
    assert memory.isnan().sum() == len(memory) - 6
    _, view = strided(torch.ones(2, 1)[:, 0, None].expand(2, 4), [1, 0])
    assert view.stride() == (3, 0)
