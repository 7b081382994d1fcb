"""Every mode and type of every operator once, called as on a GPU."""

from __future__ import annotations

import pytest
import torch
from bits import same_bits
from shim import on_device

import ptxsim
from cute_ssm import workloads
from cute_ssm.tuner.gate import Gate

pytestmark = pytest.mark.gpu

CALLS = [(op, keys) for op in workloads.OPERATORS for keys in workloads.modes(op)]
NAMES = [" ".join([op, *(f"{name}={value}" for name, value in keys.items())]) for op, keys in CALLS]


@pytest.mark.parametrize(("op", "keys"), CALLS, ids=NAMES)
def test_results_are_right_and_a_memorised_plan_repeats_them(driver, op, keys):
    here, there = workloads.build(op, keys), on_device(workloads.build(op, keys))
    gate = Gate(there, {})
    first = len(driver.launches)
    assert first and gate.problem_of_rule(Gate(here, {}).results()) == ""
    assert gate.problem({}) == ""
    assert [launch.kernel for launch in driver.launches[first:]] == [
        launch.kernel for launch in driver.launches[:first]
    ]


@pytest.mark.parametrize("op", workloads.OPERATORS)
def test_bits_are_those_of_the_emulator(driver, op):
    here, there = workloads.build(op, workloads.tiny(op)), on_device(workloads.build(op, workloads.tiny(op)))
    with ptxsim.emulate(arch="sm_90a", sm_count=132):
        here.run()
    there.run()
    for name, value in there.results().items():
        same_bits(value.cpu(), here.results()[name], name)


@pytest.mark.parametrize("op", workloads.OPERATORS)
def test_calls_follow_their_tensors_to_another_device(driver, op):
    """The second device has another architecture and another number of SMs."""
    here = workloads.build(op, workloads.tiny(op))
    expected = Gate(here, {}).results()
    for current in (0, 1):
        for device in (1, 0):
            driver.device = current
            there = on_device(workloads.build(op, workloads.tiny(op)), device)
            assert Gate(there, {}).problem_of_rule(expected) == ""
            assert {launch.device for launch in driver.launches} == {device}
            assert driver.device == current
            driver.launches.clear()


@pytest.mark.parametrize("op", workloads.OPERATORS)
def test_streams_and_graphs_of_the_second_device(driver, op):
    there = on_device(workloads.build(op, workloads.tiny(op)), 1)
    gate = Gate(there, {})
    stream, graph = torch.cuda.Stream(device=1), torch.cuda.CUDAGraph()
    gate.restore()
    driver.launches.clear()
    with torch.cuda.graph(graph, stream=stream):
        there.run()
    assert {(launch.stream, launch.captured) for launch in driver.launches} == {(stream.cuda_stream, True)}
    graph.replay()
    for name, value in there.results().items():
        same_bits(value, gate.expected[name], name)


@pytest.mark.parametrize("op", workloads.OPERATORS)
def test_launches_are_accepted_however_a_driver_counts_shared_memory(driver, op):
    """Once as a driver counts the kernel's shared memory alone, once with the driver's own kilobyte; nothing runs."""
    driver.execute = False
    for driver.reported_shared in (0, 1024):
        call = on_device(workloads.build(op, workloads.tiny(op)))
        call.run()
    assert driver.launches
