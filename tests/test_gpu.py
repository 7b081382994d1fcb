"""Operators on CUDA tensors: what the emulator cannot show.  Skipped without a GPU."""

from __future__ import annotations

import pytest
import torch
from bits import same_bits

from cute_ssm import tuning, workloads
from cute_ssm.tuner.gate import Gate
from cute_ssm.workloads.maker import moved

pytestmark = pytest.mark.gpu
CALLS = [(op, {**workloads.small(op), workloads.batch_key(op): 3}) for op in workloads.OPERATORS]
each_call = pytest.mark.parametrize(("op", "keys"), CALLS, ids=[op for op, _ in CALLS])


def on_gpu(op, keys):
    """A call on the GPU, and the same call on the CPU."""
    here, there = workloads.build(op, keys), workloads.build(op, keys)
    there.arguments = {
        name: moved(value, "cuda") if isinstance(value, torch.Tensor) else value
        for name, value in there.arguments.items()
    }
    return there, here


@each_call
def test_results_are_those_of_the_reference(op, keys):
    there, here = on_gpu(op, keys)
    gate = Gate(there, {})
    assert gate.problem_of_rule(Gate(here, {}).results()) == ""
    assert gate.problem({}) == "", "a second call has the same bits, and takes the memorised plan"


@each_call
def test_graphs_replay_what_was_captured(op, keys):
    there, _ = on_gpu(op, keys)
    gate = Gate(there, {})
    gate.restore()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        there.run()
    for _ in range(2):
        gate.restore()
        graph.replay()
        torch.cuda.synchronize()
        for name, value in there.results().items():
            same_bits(value, gate.expected[name], name)


@each_call
def test_another_stream_is_used(op, keys):
    there, _ = on_gpu(op, keys)
    gate = Gate(there, {})
    gate.restore()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        there.run()
    stream.synchronize()
    for name, value in there.results().items():
        same_bits(value, gate.expected[name], name)


@each_call
def test_a_call_in_steady_state_does_not_synchronise(op, keys):
    there, _ = on_gpu(op, keys)
    there.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert there.results()


@pytest.mark.timed
def test_times_of_configs_are_measured():
    from cute_ssm import runtime
    from cute_ssm.tuner import problems
    from cute_ssm.tuner.gpu import Gpu

    target = runtime.target()
    problem = problems.problem("selective_state_update", {"batch": 64}, target)
    rule = problem.rule()
    other = {**rule, "rows": 16 if rule["rows"] != 16 else 32}
    assert problem.valid(other)
    objective = Gpu()
    for fields in (rule, other):
        found = objective.measure(problem.case, fields, rule, 1)
        assert found.error == ""
        assert 0.1 < found.us < 10_000
        assert found.reference_us == pytest.approx(objective.measure(problem.case, rule, rule, 1).us, rel=0.5)
    assert not tuning.overridden()
