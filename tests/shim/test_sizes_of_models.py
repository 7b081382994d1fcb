"""The declared calls of models, with their numbers of heads and requests: by their own host code, and computed."""

from __future__ import annotations

import pytest
from shim import on_device

from cute_ssm import workloads
from cute_ssm.tuner.gate import Gate

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
DECLARED = [workload for op in workloads.OPERATORS for workload in workloads.of_operator(op)]
each_workload = pytest.mark.parametrize("workload", DECLARED, ids=[workload.text() for workload in DECLARED])


@each_workload
@pytest.mark.parametrize("device", [0, 1])
def test_calls_at_all_batch_sizes_are_accepted(driver, workload, device):
    """Nothing runs, and memory that nothing touches costs nothing."""
    driver.execute = False
    for keys in workload.calls():
        workloads.build(workload.op, keys, f"cuda:{device}", fill=False).run()
        assert driver.launches and {launch.device for launch in driver.launches} == {device}
        driver.launches.clear()


@each_workload
def test_results_of_a_request_are_right(driver, workload):
    keys = workload.calls()[0]
    there = on_device(workloads.build(workload.op, keys))
    gate = Gate(there, {})
    assert driver.launches
    assert gate.problem_of_rule(Gate(workloads.build(workload.op, keys), {}).results()) == ""
