"""Times on a GPU: CUDA graphs over rotated arguments that no cache holds, the rule's config interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cute_ssm import tuning, workloads
from cute_ssm.errors import CuteSsmError
from cute_ssm.tuner.gate import Gate
from cute_ssm.tuner.journal import Measurement
from cute_ssm.tuner.problems import Case
from cute_ssm.workloads import Call
from cute_ssm.workloads.maker import moved

Fields = Mapping[str, "int | str"]
TIMES_L2 = 3  # what a pass over the rotated arguments moves, at least
MOST_SETS, LEAST_SETS = 128, 4
MEMORY_SHARE = 0.4  # of what is free
WARM_UP, REPLAYS = 3, 15


@dataclass
class _Bench:
    """A case on the GPU: sets of its arguments, the gate, and the graph of the rule's config."""

    case: Case
    calls: list[Call]
    gate: Gate
    rule: torch.cuda.CUDAGraph


class Gpu:
    """Objective of one GPU.

    Parameters
    ----------
    device : int
        Index of the GPU.
    """

    how = "measured"
    noise = 0.01

    def __init__(self, device: int = 0):
        self.device = torch.device("cuda", device)
        torch.cuda.set_device(self.device)
        self._bench: _Bench | None = None

    def on(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name(self.device)
        return {"objective": "gpu", "device": name, "torch": torch.__version__, "cuda": torch.version.cuda}

    def measure(self, case: Case, fields: Fields, rule: Fields, rounds: int) -> Measurement:
        bench = self._prepare(case, rule)
        problem = bench.gate.problem(fields)
        if problem:
            return Measurement(None, error=problem)
        graph = bench.rule if dict(fields) == dict(rule) else capture(bench.calls, fields)
        own, other = interleaved([graph, bench.rule], len(bench.calls), rounds * REPLAYS)
        return Measurement(own, other)

    def _prepare(self, case: Case, rule: Fields) -> _Bench:
        if self._bench is None or self._bench.case != case:
            self._bench = None  # frees its memory before the next one takes more
            self._check_rule(case, rule)
            first = workloads.build(case.op, dict(case.keys), self.device)
            gate = Gate(first, rule)
            calls = [first, *self._more(case, first)]
            self._bench = _Bench(case, calls, gate, capture(calls, rule))
        return self._bench

    def _more(self, case: Case, first: Call) -> list[Call]:
        """Further sets of arguments, so that a pass over all of them moves more than caches hold."""
        properties = torch.cuda.get_device_properties(self.device)
        cache = getattr(properties, "L2_cache_size", 64 << 20)
        size = sum(v.untyped_storage().nbytes() for v in first.arguments.values() if isinstance(v, torch.Tensor))
        wanted = max(LEAST_SETS, -(-TIMES_L2 * cache // first.floor_bytes))
        fitting = int(MEMORY_SHARE * torch.cuda.mem_get_info(self.device)[0] // size)
        count = max(2, min(MOST_SETS, wanted, fitting))
        return [workloads.build(case.op, dict(case.keys), self.device, seed=i) for i in range(1, count)]

    def _check_rule(self, case: Case, rule: Fields) -> None:
        """Compare the rule's results with those of the reference, on few requests."""
        key = workloads.batch_key(case.op)
        keys = {**dict(case.keys), key: min(2, int(dict(case.keys).get(key, 2)))}
        here = workloads.build(case.op, keys)
        there = workloads.build(case.op, keys)
        there.arguments = {
            name: moved(value, self.device) if isinstance(value, torch.Tensor) else value
            for name, value in here.arguments.items()
        }
        problem = Gate(there, rule).problem_of_rule(Gate(here, rule).results())
        if problem:
            raise CuteSsmError(f"{case.text()}: {problem}")


def capture(calls: Sequence[Call], fields: Fields) -> torch.cuda.CUDAGraph:
    """Return the graph of a pass over the calls with a config; what must be compiled is compiled before."""
    with tuning.override(**fields):
        calls[0].run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call.run()
    return graph


def interleaved(graphs: Sequence[torch.cuda.CUDAGraph], calls: int, replays: int) -> list[float]:
    """Return the median microseconds of a call in each graph; the graphs take turns."""
    times: list[list[float]] = [[] for _ in graphs]
    for i in range(WARM_UP + replays):
        for graph, found in zip(graphs, times):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= WARM_UP:
                found.append(start.elapsed_time(end) * 1e3 / calls)
    return [statistics.median(found) for found in times]
