"""Inputs of every operator as views of a projection's rows at any alignment; checkpointing_ssu has its own file."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bits import equal
from memory import copy

import cute_ssm
from cute_ssm import arch as archs
from cute_ssm import runtime
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.ops._gated_delta import config as gated_delta_tuning
from cute_ssm.ops.gated_delta_rule_mtp import operator as gated_delta_rule
from cute_ssm.ops.gated_delta_rule_replay import operator as gated_delta_rule_replay
from cute_ssm.ops.selective_scan import operator as selective_scan
from cute_ssm.ops.selective_state_update import operator as selective_state_update
from cute_ssm.workloads import build

# operator: sizes of a call, inputs that one projection holds, with the dimensions that are a token's row
CALLS = {
    "selective_state_update": (
        {"batch": 2, "nheads": 2, "dstate": 32, "z": 1},
        {"x": 2, "z": 2, "B": 2, "C": 2, "dt": 1, "out": 2},
    ),
    "selective_state_update, tokens": (
        {"batch": 2, "T": 4, "nheads": 2, "dstate": 64, "z": 1},
        {"x": 2, "z": 2, "B": 2, "C": 2, "dt": 1, "out": 2},
    ),
    "selective_scan": ({"batch": 2, "length": 20, "dim": 32}, {"u": 1, "delta": 1, "B": 1, "C": 1, "z": 1, "out": 1}),
    "gated_delta_rule_mtp": (
        {"B": 2, "T": 4, "H": 1, "HV": 2, "K": 64, "V": 64},
        {"q": 2, "k": 2, "v": 2, "a": 1, "b": 1, "output": 2},
    ),
    "gated_delta_rule_mtp, one": (
        {"B": 2, "T": 1, "H": 1, "HV": 2, "K": 64, "V": 64},
        {"q": 2, "k": 2, "v": 2, "a": 1, "b": 1, "output": 2},
    ),
    "gated_delta_rule_replay": (
        {"B": 2, "T": 4, "H": 1, "HV": 2, "K": 64, "V": 64},
        {"q": 2, "k": 2, "v": 2, "a": 1, "b": 1, "output": 2},
    ),
}
MODULES = {
    "selective_state_update": selective_state_update,
    "selective_scan": selective_scan,
    "gated_delta_rule_mtp": gated_delta_rule,
    "gated_delta_rule_replay": gated_delta_rule_replay,
}


def arguments(name):
    """Arguments of a call, and what its inputs and results are."""
    op = name.partition(",")[0]
    sizes, rows = CALLS[name]
    call = build(op, sizes)
    given = {n: v for n, v in call.arguments.items() if n not in rows or isinstance(v, torch.Tensor)}
    return op, given, {n: inner for n, inner in rows.items() if n in given}


def view(tensor, inner, shift):
    """The same values in rows that are `shift` elements longer, and start `shift` elements into their memory."""
    tied = tensor.stride(-1) == 0
    values = tensor[..., 0] if tied else tensor
    row = values.shape[-inner:].numel()
    wide = torch.full((values.numel() // row * (row + shift) + shift,), float("nan"), dtype=tensor.dtype)
    rows = wide[shift:].view(-1, row + shift)[:, :row].unflatten(-1, values.shape[-inner:])
    result = rows.unflatten(0, values.shape[:-inner]).copy_(values)
    return result[..., None].expand(tensor.shape) if tied else result


def results(given):
    return {n: v.clone() for n, v in given.items() if isinstance(v, torch.Tensor)}


QUICK = [("selective_scan", 1), ("gated_delta_rule_mtp", 1),
         ("gated_delta_rule_mtp, one", 2), ("gated_delta_rule_replay", 4)]  # fmt: skip


@pytest.mark.thin(4)
@pytest.mark.parametrize(
    ("name", "shift"),
    [
        pytest.param(name, shift, marks=() if (name, shift) in QUICK else pytest.mark.slow)
        for name in CALLS
        for shift in (1, 2, 4)
    ],
)
def test_results_at_any_alignment_are_those_of_contiguous_rows(name, shift, backend):
    op, given, rows = arguments(name)
    views = copy(given) | {n: view(given[n], inner, shift) for n, inner in rows.items()}
    operator = getattr(cute_ssm, op)
    with backend():
        expected, got = operator(**given), operator(**views)
    for one, other in zip(expected, got):  # of a tensor, its sequences
        equal(one, other)
    for n, value in results(given).items():
        equal(value.float(), views[n].float(), n)


@pytest.mark.parametrize("name", CALLS)
def test_alignment_is_in_the_key_of_plans(name, monkeypatch):
    """A kernel for narrow accesses takes aligned rows too, and must not be found for them."""
    op, given, rows = arguments(name)
    seen = []

    class Keys(dict):
        def get(self, key, default=None):
            seen.append(key)

        def __bool__(self):
            return True

    for store in ("plans", "loose_plans"):
        monkeypatch.setattr(MODULES[op]._path, store, Keys())
    keys = set()
    rows = {n: inner for n, inner in rows.items() if n not in ("out", "output")}
    for shift in (0, 1, 4, 0):
        call = copy(given)
        if shift:
            call |= {n: view(given[n], inner, shift) for n, inner in rows.items()}
        getattr(cute_ssm, op)(**call)
        keys.add(seen[-1])
    assert len(keys) == 3


@pytest.mark.wide
@pytest.mark.parametrize(
    "name",
    [*(pytest.param(n, marks=pytest.mark.slow) for n in list(CALLS)[-3:-1]), "gated_delta_rule_replay"],
)
@pytest.mark.parametrize("width", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("K", [128, pytest.param(256, marks=pytest.mark.slow)])
def test_narrow_accesses_do_not_spill(name, width, K):
    op, sizes = name.partition(",")[0], {**CALLS[name][0], "K": K, "V": K, "B": 64}
    target = archs.by_name("sm_90a")
    with runtime.planned(target) as plan:
        build(op, sizes, fill=False).run()
    spec = dataclasses.replace(plan.kernels[0][0], input_bytes=width)
    compiled = runtime.emulated(spec, gated_delta_tuning.choose(spec, target, 128, target.sm_count), target)
    assert all(kernel.spill_bytes == 0 for kernel in compiled.kernels)
    with pytest.raises(UnsupportedSpecError, match="input_bytes: expected 16 or 8 or 4 or 2, got 6"):
        dataclasses.replace(spec, input_bytes=6).check()
