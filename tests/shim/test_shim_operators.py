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

BASE = {
    "selective_state_update": {"batch": 3, "nheads": 4},
    "checkpointing_ssu": {"batch": 3, "nheads": 4},
    "selective_scan": {"batch": 2, "dim": 64, "length": 40},
    "gated_delta_rule_mtp": {"B": 2, "H": 2, "HV": 4},
    "gated_delta_rule_replay": {"B": 2, "H": 2, "HV": 4},
}
STATES = ("bfloat16", "float32", "int16", "int8", "float8_e4m3fn")  # float16 is the default
MODES = {
    "selective_state_update": [
        {},
        *({"state_dtype": dtype} for dtype in STATES),
        {"input_dtype": "float16"},
        {"input_dtype": "float32", "state_dtype": "float32"},
        {"layout": "dense", "dstate": 16},
        {"z": 1},
        {"update": 0},
        {"rounding": "stochastic"},
        {"rounding": "stochastic", "state_dtype": "int8"},
        {"T": 4},
        {"T": 6, "intermediates": 1},
        {"T": 3, "varlen": 1, "ngroups": 2},
    ],
    "checkpointing_ssu": [
        {},
        *({"state_dtype": dtype} for dtype in STATES),
        {"input_dtype": "float16"},
        {"rounding": "stochastic"},
        {"z": 1},
        {"items": 1},
        {"fused": 1},
        {"T": 1, "W": 4, "ngroups": 2},
        {"pnat": 16},
    ],
    "selective_scan": [
        {},
        {"input_dtype": "float16"},
        {"input_dtype": "float32"},
        {"state_dtype": "bfloat16"},
        {"z": 0},
        {"varlen": 1},
        {"length": 700},
    ],
    "gated_delta_rule_mtp": [
        {},
        {"verify": 0, "state_dtype": "bfloat16"},
        {"state_dtype": "float16"},
        {"input_dtype": "float16"},
        {"T": 1},
        {"T": 8, "buffer": 1},
    ],
    "gated_delta_rule_replay": [{}, {"state_dtype": "bfloat16"}, {"input_dtype": "float16"}, {"T": 1, "pnat": 16}],
}
CALLS = [(op, BASE[op] | mode) for op, modes in MODES.items() for mode in modes]
NAMES = [f"{op}-{mode or 'plain'}" for op, modes in MODES.items() for mode in modes]


def test_every_operator_is_called():
    assert MODES.keys() == set(workloads.OPERATORS)


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


@pytest.mark.parametrize("op", BASE)
def test_bits_are_those_of_the_emulator(driver, op):
    here, there = workloads.build(op, BASE[op]), on_device(workloads.build(op, BASE[op]))
    with ptxsim.emulate(arch="sm_90a", sm_count=132):
        here.run()
    there.run()
    for name, value in there.results().items():
        same_bits(value.cpu(), here.results()[name], name)


@pytest.mark.parametrize("op", BASE)
def test_calls_follow_their_tensors_to_another_device(driver, op):
    """The second device has another architecture and another number of SMs."""
    here = workloads.build(op, BASE[op])
    expected = Gate(here, {}).results()
    for current in (0, 1):
        for device in (1, 0):
            driver.device = current
            there = on_device(workloads.build(op, BASE[op]), device)
            assert Gate(there, {}).problem_of_rule(expected) == ""
            assert {launch.device for launch in driver.launches} == {device}
            assert driver.device == current
            driver.launches.clear()


@pytest.mark.parametrize("op", BASE)
def test_streams_and_graphs_of_the_second_device(driver, op):
    there = on_device(workloads.build(op, BASE[op]), 1)
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


@pytest.mark.parametrize("op", BASE)
def test_launches_are_accepted_however_a_driver_counts_shared_memory(driver, op):
    """Once as a driver counts the kernel's shared memory alone, once with the driver's own kilobyte; nothing runs."""
    driver.execute = False
    for driver.reported_shared in (0, 1024):
        call = on_device(workloads.build(op, BASE[op]))
        call.run()
    assert driver.launches
