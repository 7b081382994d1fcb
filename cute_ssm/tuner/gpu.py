"""`Gpu`: configs timed on a GPU, the rule's interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cute_ssm import tuning, workloads
from cute_ssm.errors import CuteSsmError
from cute_ssm.tuner import timing
from cute_ssm.tuner.gate import Gate
from cute_ssm.tuner.journal import Measurement
from cute_ssm.tuner.problems import Case
from cute_ssm.workloads import Call
from cute_ssm.workloads.maker import moved

Fields = Mapping[str, "int | str"]
REPLAYS = 15


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
    replays : int
        Samples of a round.
    sets : int
        Of arguments that are rotated, at most.
    """

    how = "measured"
    noise = 0.01
    error = 0.0

    def __init__(self, device: int = 0, replays: int = REPLAYS, sets: int = timing.MOST_SETS):
        self.device = torch.device("cuda", device)
        torch.cuda.set_device(self.device)
        self.replays, self.sets = replays, sets
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
        passes = {"own": (graph, len(bench.calls)), "rule": (bench.rule, len(bench.calls))}
        times = timing.alternate(passes, rounds * self.replays)
        return Measurement(statistics.median(times["own"]), statistics.median(times["rule"]))

    def _prepare(self, case: Case, rule: Fields) -> _Bench:
        if self._bench is None or self._bench.case != case:
            self._bench = None  # frees its memory before the next one takes more
            self._check_rule(case, rule)
            calls = timing.rotated(case.op, dict(case.keys), self.device, self.sets)
            self._bench = _Bench(case, calls, Gate(calls[0], rule), capture(calls, rule))
        return self._bench

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
    """Return the graph of a pass over the calls with a config."""
    with tuning.override(**fields):
        return timing.capture([call.run for call in calls])
