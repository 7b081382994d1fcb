"""`gpumodel.fit`: constants that made some times are found again from these times."""

from __future__ import annotations

import dataclasses

import pytest

from gpumodel import B200, H200, MACHINES
from gpumodel.fit import BOUNDS, Errors, Observation, fit

pytest.importorskip("scipy")


def copy_of(n_bytes):
    """A model of a copy: a launch, a latency, and the bytes at the bandwidth of the memory."""
    return lambda m: m.launch_us + m.microseconds(m.dram_latency + n_bytes / m.dram_rate)


def observed(true, half="fit", **more):
    return [
        Observation(f"{true.name} {n} {half}", copy_of(n)(true), copy_of(n), half=half, **more)
        for n in (1 << 10, 1 << 22, 1 << 28)
    ]


def test_constants_that_made_the_times_are_found():
    true = dataclasses.replace(H200, dram_efficiency=0.79, launch_us=1.1)
    points = observed(true) + observed(true, "kept", source="copies")
    fitted = fit(points, H200, ["dram_efficiency", "launch_us"], rounds=12)
    assert fitted.machine.dram_efficiency == pytest.approx(0.79, rel=0.01)
    assert fitted.machine.launch_us == pytest.approx(1.1, rel=0.02)
    assert fitted.machine.fitted and not H200.fitted
    assert fitted.changes["launch_us"].before == H200.launch_us
    assert fitted.after["held out"].median_error < 0.01 < fitted.before["held out"].median_error
    assert fitted.after["copies"].n == 3


def test_held_out_points_have_no_part_in_the_fit():
    other = dataclasses.replace(H200, dram_efficiency=0.93)
    points = observed(H200) + observed(other, "held out")
    fitted = fit(points, H200, ["dram_efficiency"])
    assert fitted.machine.dram_efficiency == pytest.approx(H200.dram_efficiency, rel=0.01)
    assert fitted.after["held out"].bias > 1.01


def test_a_constant_may_differ_between_machines():
    slow, fast = (dataclasses.replace(m, dram_efficiency=e) for m, e in ((H200, 0.78), (B200, 0.86)))
    points = observed(slow, machine="H200") + observed(fast, machine="B200")
    fitted = fit(points, [H200, B200], ["dram_efficiency@H200", "dram_efficiency@B200"], rounds=12)
    assert fitted.machines["H200"].dram_efficiency == pytest.approx(0.78, rel=0.01)
    assert fitted.machines["B200"].dram_efficiency == pytest.approx(0.86, rel=0.01)


def test_constants_stay_within_bounds_and_pipes_can_be_fitted():
    point = Observation("p", 3.0, lambda m: m.pipes["int"].occupancy)
    fitted = fit([point], H200, {"pipes.int.occupancy": (0.5, 2.5)}, rounds=20)
    assert fitted.machine.pipes["int"].occupancy == pytest.approx(2.5, rel=0.01)
    assert H200.pipes["int"].occupancy == 2
    assert fitted.as_json()["constants"]["pipes.int.occupancy"]["bounds"] == [0.5, 2.5]


def test_bounds_are_of_constants_that_exist():
    for name in BOUNDS:
        machine = MACHINES[name.partition("@")[2] or H200.name]
        fit([Observation("p", 1.0, lambda m: 1.0)], machine, [name], rounds=1)


@pytest.mark.parametrize(
    "points,names,said",
    [
        ([Observation("p", 1.0, float, half="held out")], ["launch_us"], "at least one whose half is 'fit'"),
        ([Observation("p", 1.0, float)], ["arch"], "numeric fields"),
        ([Observation("p", 1.0, float)], ["sms"], "no known bounds"),
        ([Observation("p", 1.0, float)], ["launch_us@H9"], "one of H200"),
        ([Observation("p", 1.0, float, "H9")], ["launch_us"], "point 'p': machine"),
    ],
)
def test_what_cannot_be_fitted_is_refused(points, names, said):
    with pytest.raises(ValueError, match=said):
        fit(points, H200, names)


def test_bias_is_the_geometric_mean():
    assert Errors.of([0.5, 2.0]) == (2, 0.75, pytest.approx(1.0))
