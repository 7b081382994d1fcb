"""How kernels are launched: as programmatic dependents that wait, and with the shared memory that they ask for.

No operator uses memory before it has waited, but for what it declares.  The emulator's racecheck refuses the rest, so
every test under racecheck looks for it; these see that it would.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from bits import same_bits
from checkpointing_cases import Case, arguments, verify

import cute_ssm
import ptxsim
from cute_ssm import arch as archs
from cute_ssm import serving, tuning, workloads
from cute_ssm.compat.flashinfer import mamba as flashinfer
from cute_ssm.ops.checkpointing_ssu import kernel as checkpointing_ssu
from cute_ssm.ops.checkpointing_ssu.config import DYNAMIC, FUSED, PAIR
from cute_ssm.runtime import emulation

CALLS = {
    "selective_state_update": {"batch": 1, "nheads": 2, "dim": 16, "dstate": 16},
    "selective_scan": {"batch": 1, "dim": 32, "length": 8, "dstate": 4},
    "gated_delta_rule_mtp": {"B": 1, "T": 2, "H": 1, "HV": 1, "K": 64, "V": 64, "verify": 0},
    "gated_delta_rule_replay": {"B": 1, "T": 2, "W": 4, "H": 1, "HV": 1, "K": 64, "V": 64, "pnat": "2"},
}
ONE_UNIT = {"d_split": 1, "tiles": 1, "consumers": 1, "depth": 1, "ctas_per_sm": 1}


@pytest.fixture
def changed(request, settings, monkeypatch):
    """For one test, compile anew, and keep nothing: kernels are changed."""
    if request.config.getoption("--gpu"):
        pytest.skip("the emulator alone knows what a kernel may not do")
    settings(CACHE="0")
    monkeypatch.setattr(emulation, "_memory", {})
    return monkeypatch


@pytest.fixture
def no_wait(changed):
    """Kernels without `griddepcontrol.wait`."""
    from cutlass import cute

    changed.setattr(cute.arch, "griddepcontrol_wait", lambda **_: None)


def findings(run, **options):
    """What racecheck finds in the launches of a call: kinds and tensors."""
    with ptxsim.emulate(racecheck=True, race_raise=False, **options) as session:
        run()
    return {(f.kind, f.where) for launch in session.launches for f in launch.race_findings.values()}


def touched(found, kind):
    return {name for what, where in found if what == f"{kind} before griddepcontrol.wait" for name in where.split("+")}


@pytest.mark.parametrize("op", CALLS)
def test_a_kernel_without_its_wait_is_refused(op, no_wait):
    call = workloads.build(op, CALLS[op])
    found = findings(call.run)
    assert ("never waits", "") in found  # so it is launched as a dependent
    results = {"selective_scan": "out", "selective_state_update": "out"}.get(op, "output")
    assert results in touched(found, "write")
    inputs = {"selective_state_update": {"state", "x", "dt", "A", "B", "C"}, "selective_scan": {"u", "delta", "A", "B"}}
    assert touched(found, "read") >= inputs.get(op, {"q", "k", "v", "initial_state", "a", "b", "A_log"})


CASE = Case(batch=3, nheads=1, dim=16, accepted=(7, 5, 14), pads=(0,), lengths=(4, 2, 3), pdl="early_reads")
READ_EARLY = {"state", "cursor", "prev_num_accepted_tokens", "state_batch_indices", "cu_seqlens"}


@pytest.mark.thin(9)
@pytest.mark.parametrize("pads", [(0,), (1,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize(
    ("form", "unit_stages", "pdl"),
    [
        (DYNAMIC, 2, "early_reads"),
        pytest.param(DYNAMIC, 1, "early_reads", marks=pytest.mark.slow),
        (FUSED, 1, "early_reads"),
        (FUSED, 1, True),
        pytest.param(DYNAMIC, 2, True, marks=pytest.mark.slow),
    ],
)
def test_checkpointing_uses_memory_after_the_wait(form, unit_stages, pads, pdl):
    """Whatever a CTA's first unit is, and with units that wait for each other's buffers."""
    case = Case(batch=3, nheads=1, dim=16, accepted=(7, 5, 14), pads=pads, pdl=pdl)
    with (
        ptxsim.emulate(sm_count=1, async_mode="late", shuffle_sync=False, racecheck=True),
        tuning.override(form=form, unit_stages=unit_stages, **ONE_UNIT),
    ):
        verify(case)


@pytest.mark.parametrize("pdl", ["early_reads", pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", [DYNAMIC, pytest.param(FUSED, marks=pytest.mark.slow)])
def test_rows_that_no_bulk_copy_takes_are_used_after_the_wait(form, pdl):
    case = Case(tokens=2, window=4, nheads=1, dim=16, accepted=(0, 3, 4), shift=1, pdl=pdl)
    with ptxsim.emulate(sm_count=1, async_mode="late", racecheck=True), tuning.override(form=form, **ONE_UNIT):
        verify(case)


@pytest.mark.parametrize("pdl", ["early_reads", pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("accepted", [(0, 0, 1), (3, 4, 4)], ids=["no writes", "writes alone"])
def test_a_kernel_of_a_pair_that_has_nothing_to_do_waits(accepted, pdl):
    """It must not let the next kernel start while the one before it runs."""
    case = Case(tokens=2, window=4, nheads=1, dim=16, accepted=accepted, pads=(), items=True, pdl=pdl)
    with ptxsim.emulate(racecheck=True), tuning.override(form=PAIR):
        verify(case)


def test_what_is_read_early_is_declared_and_nothing_else(changed):
    changed.setattr(checkpointing_ssu, "READS_BEFORE_WAIT", ())
    found = findings(lambda: verify(CASE))
    assert touched(found, "read") == READ_EARLY
    assert not touched(found, "write")


def test_items_that_are_read_early_are_declared(changed):
    changed.setattr(checkpointing_ssu, "READS_BEFORE_WAIT", ())
    with tuning.override(form=PAIR):
        found = findings(
            lambda: verify(Case(batch=2, nheads=1, dim=16, accepted=(7, 14), items=True, pdl="early_reads"))
        )
    assert touched(found, "read") == {"state", "work_items", "num_writes"}


@pytest.mark.parametrize("pdl", [True, pytest.param("early_reads", marks=pytest.mark.slow)])
def test_checkpointing_without_its_wait_is_refused(pdl, no_wait):
    case = Case(batch=3, nheads=1, dim=16, accepted=(7, 5, 14), pads=(0,), pdl=pdl)
    found = findings(lambda: verify(case))
    assert ("never waits", "") in found
    assert touched(found, "read") >= {"x", "dt", "B", "C", "x_history", "B_history", "dt_history"}
    assert ("state" in touched(found, "read")) == (pdl is True)
    assert touched(found, "write") >= {"out", "state", "x_history", "B_history", "dt_history"}


def test_messages_name_the_python_line(no_wait):
    call = workloads.build("selective_state_update", CALLS["selective_state_update"])
    with pytest.raises(ptxsim.RaceError) as caught, ptxsim.emulate(racecheck=True):
        call.run()
    assert re.search(r"selective_state_update/\w+\.py:\d+ \(\w+\).* \| PTX line \d+: ", str(caught.value))


@pytest.mark.parametrize(
    ("enable_pdl", "pdl"), [(False, None), (True, "wait_first"), ("early_reads", "early_reads")], ids=str
)
def test_kinds_of_launch(enable_pdl, pdl):
    """Of both operators, and of FlashInfer's functions, whose True means the safe kind here."""
    functions = {
        "double": (cute_ssm.checkpointing_ssu, flashinfer.checkpointing_ssu_double_buffer),
        "ring": (cute_ssm.checkpointing_ssu_ring, flashinfer.checkpointing_ssu),
    }
    for history in functions:
        call = arguments(Case(history=history))
        call["enable_pdl"] = enable_pdl
        for function in functions[history]:
            with emulation.planned(archs.SM_90A) as plan:
                function(**call)
            assert plan.kernels[0][0].pdl == pdl


@pytest.mark.parametrize("value", ["wait_first", "yes", None, 2, torch.tensor(True)], ids=str)
def test_other_kinds_of_launch_are_refused(value):
    call = arguments(Case())
    before = call["out"].clone()
    with pytest.raises(ValueError, match=r"enable_pdl: expected False, True or 'early_reads', got"):
        cute_ssm.checkpointing_ssu(**{**call, "enable_pdl": value})
    same_bits(call["out"], before)


def launches(run):
    with ptxsim.emulate(racecheck=True) as session:
        run()
    return session.launches


@pytest.mark.thin(4)
@pytest.mark.parametrize("op", CALLS)
def test_kernels_prefer_shared_memory_to_cache(op):
    """Or the driver may choose a share that holds fewer CTAs than fit."""
    made = launches(workloads.build(op, CALLS[op]).run)
    assert all(launch.dynamic_smem and launch.carveout == 100 for launch in made)


@pytest.mark.parametrize("form", [FUSED, pytest.param(PAIR, marks=pytest.mark.slow)])
def test_both_kernels_of_checkpointing_prefer_shared_memory(form):
    with tuning.override(form=form):
        made = launches(lambda: verify(Case(tokens=2, window=4, nheads=1, dim=16, items=True, pads=())))
    assert len(made) == (2 if form == PAIR else 1)
    assert all(launch.dynamic_smem and launch.carveout == 100 for launch in made)


def test_every_launch_with_shared_memory_says_how_much_it_prefers():
    """Of every kernel there is, by its source: one whose CTAs need next to none is left out."""
    for path in sorted(Path(checkpointing_ssu.__file__).parent.glob("*.py")):
        source = path.read_text()
        if "SmemAllocator()" in source and path.stem != "serving_work_items":
            assert source.count(".prefer_shared()") == source.count(".launch("), path.name


def test_kernels_that_need_little_shared_memory_leave_the_cache_as_it_is():
    pool = serving.StatePool.mamba2(1, 2, nheads=1, dim=16, dstate=64, window=4, tokens=2)
    slot = torch.tensor([pool.allocate()], dtype=torch.int32)

    def run():
        pool.build_work_items(slot)
        pool.commit(slot, torch.ones(1, dtype=torch.int32))

    made = launches(run)
    assert len(made) == 2
    assert all(launch.dynamic_smem <= 128 and launch.carveout is None and not launch.pdl for launch in made)
