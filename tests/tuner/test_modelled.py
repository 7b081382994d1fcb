"""The machine model on the operators: what a record holds, scaling to large calls, and that choices change the time."""

from __future__ import annotations

import pytest
import torch

from cute_ssm import workloads
from cute_ssm.tuner import modelled
from cute_ssm.workloads import maker

gpumodel = pytest.importorskip("gpumodel")
ptxsim = pytest.importorskip("ptxsim")

STEP = {"nheads": 16, "state_dtype": "float16"}


def step(batch, gpu="H200", config=None, **keys):
    return modelled.time_op("selective_state_update", {**STEP, "batch": batch, **keys}, gpu, config)


@pytest.mark.parametrize("keys", [{"batch": 2}, {"batch": 2, "T": 6}], ids=str)
def test_record_has_the_instructions_and_bytes_that_are_counted(keys):
    call = workloads.build("selective_state_update", {**STEP, **keys})
    with ptxsim.emulate(counters=True) as counted:
        call.run()
    call = workloads.build("selective_state_update", {**STEP, **keys})
    with ptxsim.emulate(trace=gpumodel.Trace, wave_lanes=None) as traced:
        call.run()
    counters, trace = counted.launches[0].counters.as_dict(), traced.launches[0].trace
    assert gpumodel.bytes_of(trace) == counters["dram_read_bytes"] + counters["dram_write_bytes"]
    executed = sum(visit.stop - visit.block.pc for visits in trace.warps.values() for visit in visits)
    assert executed == counters["instructions"]["total"]
    events = [e for visits in trace.warps.values() for v in visits for found in v.events.values() for e in found]
    shared = [event for event in events if isinstance(event, gpumodel.trace.SharedAccess)]
    assert sum(event.wavefronts for event in shared) == counters["smem_wavefronts"]
    assert sum(isinstance(event, gpumodel.trace.BulkCopy) for event in events) == counters["bulk_copies"]


@pytest.mark.parametrize("op", workloads.OPERATORS)
def test_no_argument_is_left_uninitialised(op, monkeypatch):
    """Kernels take a longer path where they read values that are not finite, and memory may hold any."""

    def poisoned(self, *shape, dtype=torch.float32):
        return (
            torch.full(shape, float("nan"), dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
        )

    monkeypatch.setattr(maker.Maker, "empty", poisoned)
    monkeypatch.setattr(modelled, "SMALL", 1 << 12)  # the larger tensors are not filled with random values
    keys = {workloads.batch_key(op): 2, "state_dtype": "float16"}
    arguments = modelled.arguments(op, {k: v for k, v in keys.items() if k in workloads.parameters(op)}).arguments
    floating = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    assert floating
    assert [name for name, value in floating.items() if not value.float().isfinite().all()] == []


def test_emulator_runs_only_the_ctas_of_one_sm():
    session = gpumodel.record(workloads.build("selective_state_update", {**STEP, "batch": 32}).run, gpumodel.H200)
    (launch,) = session.launches
    ctas = -(-launch.grid[0] // gpumodel.H200.sms)
    assert len(launch.trace.warps) == ctas * launch.trace.warps_per_cta


def test_large_calls_continue_small_ones():
    exact = modelled.time_op("selective_state_update", {**STEP, "batch": 512}, "H200", exact=1 << 30)
    scaled = modelled.time_op("selective_state_update", {**STEP, "batch": 512}, "H200", exact=1 << 19)
    assert exact.exact
    assert not scaled.exact
    assert scaled.us == pytest.approx(exact.us, rel=0.05)
    assert scaled.bytes == exact.bytes


def test_no_call_is_faster_than_its_roof():
    for batch in (1, 64):
        found = step(batch)
        assert 0 < found.of_roof <= 1
        assert not found.fitted


@pytest.mark.wide
def test_bytes_and_bandwidth_tell_at_a_large_batch():
    half, single, other = step(1024), step(1024, state_dtype="float32"), step(1024, gpu="B200")
    assert single.us == pytest.approx(2 * half.us, rel=0.15)
    assert 1.1 <= half.us / other.us <= 1.8  # 8 of 4.8 TB/s, if enough is in flight


@pytest.mark.wide
def test_a_ring_beats_units_that_wait_for_themselves():
    base = {"lanes": 8, "rows": 64, "warps": 1, "ctas_per_sm": 1}
    ring = step(128, config={**base, "stages": 3})
    alone = step(128, config={**base, "stages": 1})
    more = step(128, config={**base, "stages": 3, "ctas_per_sm": 4})
    assert ring.kernels[0].grid[0] == gpumodel.H200.sms < alone.kernels[0].grid[0]
    assert more.us < 0.6 * ring.us
    few = ring.kernels[0].timing.bytes_in_flight(("state",))
    assert more.kernels[0].timing.bytes_in_flight(("state",)) > 2 * few


@pytest.mark.parametrize("op", ["gated_delta_rule_mtp", "selective_scan"])
def test_other_operators_have_a_time(op):
    keys = {"gated_delta_rule_mtp": {"B": 4}, "selective_scan": {"length": 64}}[op]
    found = modelled.time_op(op, keys, "H200")
    assert 1.6 < found.us < 100
    assert found.kernels[0].timing.slots > 0


@pytest.mark.wide
def test_long_sequences_continue_short_ones():
    keys = {"dim": 256, "varlen": 1}
    times = {n: modelled.time_op("selective_scan", {**keys, "length": n}, "H200") for n in (256, 512)}
    assert times[256].exact
    assert not times[512].exact
    config = modelled.chosen("selective_scan", {**keys, "length": 512}, gpumodel.H200)
    call = modelled.arguments("selective_scan", {**keys, "length": 512})
    whole = modelled.time_call(call, "H200", config)
    assert times[512].us == pytest.approx(whole.us, rel=0.05)
