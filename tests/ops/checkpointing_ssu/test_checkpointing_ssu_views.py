"""Rows of new tokens that are no multiples of 16 bytes apart, as of views of a fused projection."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bits import each_same_bits, same_bits
from checkpointing_cases import STATES, Case, arguments, run, verify
from checkpointing_runs import LATE
from memory import copy

from cute_ssm import arch as archs
from cute_ssm import runtime, tuning
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.ops._plans import Plans
from cute_ssm.ops.checkpointing_ssu import arguments as _checkpointing_arguments
from cute_ssm.ops.checkpointing_ssu import operator as module
from cute_ssm.ops.checkpointing_ssu.config import DYNAMIC, FUSED, PAIR, choose
from cute_ssm.workloads import build

BASE = Case(accepted=(7, 5, 14), nheads=4, ngroups=2)
FORMS = {
    "double": (BASE, FUSED),
    "ring": (dataclasses.replace(BASE, history="ring", dim=32, pads=()), FUSED),
    "persistent": (dataclasses.replace(BASE, has_z=False, state="i8", dstate=96), DYNAMIC),
    "pair": (dataclasses.replace(BASE, items=True, batch=4, accepted=(16, 0, 14, 3), io="f16"), PAIR),
    "packed": (
        Case(batch=5, lengths=(3, 0, 1, 4, 2), accepted=(15, 3, 16, 2, 14), pads=(3,), history="ring"),
        DYNAMIC,
    ),
    "many": (Case(tokens=20, window=8, history="ring", accepted=(0, 8, 0), pads=()), FUSED),
}


QUICK = [("double", 1), ("pair", 4)]


@pytest.mark.parametrize("shift", [1, 2, 4, 8])
@pytest.mark.parametrize("form", FORMS)
def test_reference(form, shift):
    verify(dataclasses.replace(FORMS[form][0], shift=shift))


@pytest.mark.wide
@pytest.mark.parametrize(
    ("form", "shift"),
    [
        pytest.param(form, shift, marks=() if (form, shift) in QUICK else pytest.mark.slow)
        for form in FORMS
        for shift in (1, 2, 4, 8)
    ],
)
def test_results_at_any_alignment_are_those_of_aligned_rows(form, shift, backend):
    """Against the oracle, and bit for bit against contiguous arguments; a grid of one SM uses each buffer again."""
    case, kind = FORMS[form]
    with backend(sm_count=1, **LATE), tuning.override(form=kind):
        views = verify(dataclasses.replace(case, shift=shift))
        aligned = arguments(case)
        run(case, aligned)
    for name, value in aligned.items():
        if isinstance(value, torch.Tensor):
            same_bits(value, views[name], name)


@pytest.mark.thin(5)
@pytest.mark.parametrize("name", ["x", "B", "C", "z", "out"])
def test_one_unaligned_tensor_is_enough(name, backend):
    aligned, shifted = arguments(BASE), arguments(dataclasses.replace(BASE, shift=1))
    call = {**copy(aligned), name: shifted[name]}
    with backend(**LATE):
        run(BASE, aligned)
        run(BASE, call)
    for name in ("state", "old_x", "old_B", "out"):
        same_bits(call[name], aligned[name], name)


@pytest.mark.wide
def test_views_of_a_fused_projection_in_a_declared_workload(backend):
    call = build("checkpointing_ssu", {"batch": 2, "T": 2, "nheads": 12, "dstate": 64, "z": 1, "fused": 1})
    rows = call.arguments
    assert rows["z"].stride(1) == rows["x"].stride(1) == rows["B"].stride(1) == rows["dt"].stride(1)
    separate = {n: v.contiguous() if n in ("x", "z", "B", "C") else v for n, v in copy(rows).items()}
    with backend(checks=False, **LATE):
        call.run()
        module.checkpointing_ssu(**separate)
    each_same_bits(separate, call.results())


TENSORS = tuple(_checkpointing_arguments.TABLE.tensors)


def given(case, **changed):
    """Arguments of the operator that PyTorch knows."""
    call = arguments(case)
    named = {"x_history": "old_x", "B_history": "old_B", "dt_history": "old_dt", "cum_history": "old_cumAdt"}
    named["cursor"] = "cache_buf_idx"
    tensors = {name: {**call, **changed}.get(named.get(name, name)) for name in TENSORS}
    return _checkpointing_arguments.Arguments(
        **tensors, ring=False, dt_softplus=True, pad_slot_id=-1, philox_rounds=10, d_split=None, max_seqlen=None,
        window=None, pdl=None,
    )  # fmt: skip


@pytest.mark.parametrize(("shift", "expected"), [(0, 16), (1, 2), (2, 4), (3, 2), (4, 8), (6, 4), (8, 16)])
def test_the_widest_access_that_all_rows_allow_is_a_part_of_the_spec(shift, expected):
    assert _checkpointing_arguments.input_bytes(given(dataclasses.replace(BASE, shift=shift))) == expected


@pytest.mark.parametrize("name", ["x", "B", "C", "z", "out"])
def test_an_address_or_a_stride_alone_decides(name):
    def rows(values, offset, gap):
        wide = torch.zeros(values.numel() * 2, dtype=values.dtype)
        row = values[0, 0].numel() + gap
        strides = (values.shape[1] * row, row, values.shape[-1], 1)
        return wide.as_strided(values.shape, strides, offset)

    for offset, gap, expected in ((0, 0, 16), (1, 0, 2), (0, 1, 2), (4, 0, 8), (0, 4, 8), (8, 8, 16)):
        changed = {name: rows(arguments(BASE)[name], offset, gap)}
        assert _checkpointing_arguments.input_bytes(given(BASE, **changed)) == expected


def test_a_plan_is_used_for_rows_of_its_own_alignment_alone(monkeypatch):
    """An entry for rows of 2 bytes would take aligned rows; one for aligned rows refuses others."""
    launched = []

    class Entry:
        def __init__(self, name, *accepted):
            self.name, self.accepted = name, accepted

        def __call__(self, *tensors):
            found = _checkpointing_arguments.input_bytes(given(BASE)._replace(**dict(zip(TENSORS, tensors))))
            if found not in self.accepted:
                raise ValueError("Misaligned x")
            launched.append(self.name)

    class Keys(dict):
        def get(self, key, default=None):
            seen.append(key)

    seen = []
    monkeypatch.setattr(module._path, "plans", Keys())
    run(BASE, arguments(BASE))
    for order in ((16, 4, 2), (2, 16, 4), (4, 2, 16)):
        monkeypatch.setattr(module._path, "plans", Plans())
        monkeypatch.setattr(module._path, "loose_plans", Plans())
        for width in order:
            entry = Entry(width, *(wider for wider in (2, 4, 8, 16) if wider >= width))
            shift = {16: 0, 4: 2, 2: 1}[width]
            checked = module._checked(given(dataclasses.replace(BASE, shift=shift)))
            assert checked.strict == (width == 16)
            module._path.remember(seen[0], checked, (entry, (132,)))
        launched.clear()
        for shift in (0, 1, 2, 0, 2, 1, 1):
            run(BASE, arguments(dataclasses.replace(BASE, shift=shift)))
        assert launched == [16, 2, 4, 16, 4, 2, 2]
    launched.clear()
    run(BASE, arguments(dataclasses.replace(BASE, shift=4)))
    assert not launched  # no plan for 8 bytes: the full check, and here the reference


def test_a_width_that_no_access_has_is_refused():
    spec = _checkpointing_arguments.check(given(BASE))[1]
    with pytest.raises(UnsupportedSpecError, match="input_bytes: expected 16 or 8 or 4 or 2, got 3"):
        dataclasses.replace(spec, input_bytes=3).check()


@pytest.mark.wide
@pytest.mark.parametrize(
    ("state", "batch"),
    [("f16", 64), *(pytest.param(state, b, marks=pytest.mark.slow) for state in STATES for b in (1, 64, 1024))],
)
@pytest.mark.parametrize("width", [8, pytest.param(2, marks=pytest.mark.slow)])
def test_no_spills(state, batch, width):
    base = _checkpointing_arguments.check(given(BASE))[1]
    spec = dataclasses.replace(
        base, state_dtype=str(STATES[state]).removeprefix("torch."), heads=12, groups=1,
        dim=64, dstate=128, tokens=6, window=16, input_bytes=width,
    )  # fmt: skip
    target = archs.by_name("sm_90a")
    config = choose(spec, target, batch, target.sm_count)
    compiled = runtime.emulated(spec, config, target)
    for kernel, launch in zip(compiled.kernels, config.launch_configs):
        assert kernel.spill_bytes == 0
        assert kernel.registers * launch.threads * launch.ctas_per_sm <= 65536
