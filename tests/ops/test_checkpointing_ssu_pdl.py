"""Rows that the upstream kernel may write are asked for after `griddepcontrol.wait`, whatever a CTA's first unit is."""

from __future__ import annotations

import pytest
from checkpointing_cases import Case, verify

import ptxsim
from cute_ssm import tuning
from cute_ssm.tuning.checkpointing_ssu import DYNAMIC, FUSED
from ptxsim import decode
from ptxsim.isa import tma


@pytest.fixture(scope="module")
def threads():
    """Threads that waited, and those that copied rows to shared memory before they did; of programs decoded here."""
    waited, early = set(), []
    plain_control, plain_copy = decode.HANDLERS["griddepcontrol"], tma.linear

    def control(decoder, instruction):
        if "wait" not in instruction.mods:
            return plain_control(decoder, instruction)
        return lambda S: waited.update(S.lanes.tolist())

    def copy(decoder, instruction):
        run, mods = plain_copy(decoder, instruction), list(instruction.mods)
        loads = "shared::cluster" in mods and mods.index("shared::cluster") < mods.index("global")

        def watched(S):
            if loads:
                early.extend(lane for lane in S.lanes.tolist() if lane not in waited)
            return run(S)

        return watched

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(decode.HANDLERS, "griddepcontrol", control)
        patch.setattr(tma, "linear", copy)
        yield waited, early


@pytest.mark.parametrize("pads", [(0,), (1,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize(("form", "unit_stages"), [(DYNAMIC, 2), (DYNAMIC, 1), (FUSED, 1)])
def test_rows_come_after_the_wait(form, unit_stages, pads, threads):
    waited, early = threads
    waited.clear()
    early.clear()
    case = Case(batch=3, nheads=1, dim=16, accepted=(7, 5, 14), pads=pads, pdl=True)
    fields = {"form": form, "d_split": 1, "tiles": 1, "consumers": 1, "depth": 1, "unit_stages": unit_stages}
    with ptxsim.emulate(sm_count=1, async_mode="late", shuffle_sync=False), tuning.override(**fields, ctas_per_sm=1):
        verify(case)
    assert waited
    assert not early
