"""What a config costs: on a GPU, by the machine model, or by counters alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from cute_ssm import arch as archs
from cute_ssm import tuning, workloads
from cute_ssm.errors import CuteSsmError, describe
from cute_ssm.runtime.companions import how_to_install, missing, require
from cute_ssm.tuner.gate import Gate
from cute_ssm.tuner.journal import Measurement
from cute_ssm.tuner.problems import Case

Fields = Mapping[str, "int | str"]
GATE_REQUESTS = 2  # of an emulated call whose results are compared
# Of boards with 132, 148 and 148 SMs: bytes a second that a copy reaches, clocks a second, seconds to launch a kernel.
# Published figures; they weigh instructions against bytes in `Counters` and claim no more.
BOARDS = {"sm_90a": (4.3e12, 1.75e9, 4e-6), "sm_100a": (6.9e12, 1.85e9, 4e-6), "sm_103a": (6.9e12, 1.9e9, 4e-6)}
SCHEDULERS = 4
SM_SHARE = 1.5  # an SM reaches this many times its share of the bandwidth while others idle


class Objective(Protocol):
    """Costs of configs.

    Attributes
    ----------
    how : str
        "measured" or "modelled".
    noise : float
        Part of a cost that means nothing.
    error : float
        By how much costs are known to be wrong, relatively: a smaller gain is none.
    """

    how: str
    noise: float
    error: float

    def on(self) -> dict[str, Any]:
        """What the costs hold for: machine, versions."""
        ...

    def measure(self, case: Case, fields: Fields, rule: Fields, rounds: int) -> Measurement:
        """Return the cost of a config; what it raises counts as a failure of the config."""
        ...


class _Emulated(ABC):
    """Base of the objectives that need no GPU: the gate, and the rule's cost once."""

    how = "modelled"
    noise = 0.0
    error = 0.0

    def __init__(self) -> None:
        self._gates: dict[Case, Gate] = {}
        self._passed: dict[tuple[Any, ...], str] = {}
        self._costs: dict[tuple[Any, ...], float] = {}
        self._spills = ""  # of the last kernels that ran

    def measure(self, case: Case, fields: Fields, rule: Fields, rounds: int) -> Measurement:
        problem = self._gate(case, fields, rule)
        if problem:
            return Measurement(None, error=problem)
        return Measurement(self._cost(case, fields), self._cost(case, rule))

    @abstractmethod
    def microseconds(self, case: Case, fields: Fields) -> float:
        """Return the cost of a config."""

    @contextmanager
    def _emulate(self, arch: str) -> Iterator[None]:
        """Run kernels on one SM of the emulator, and note whether their registers spill."""
        with require("ptxsim").emulate(arch=arch, sm_count=1) as session:
            yield
        bytes_ = sum(kernel.spill_bytes for function in session.functions for kernel in function.kernels)
        self._spills = f"{bytes_} bytes of registers are spilled" if bytes_ else ""

    def _cost(self, case: Case, fields: Fields) -> float:
        key = (case, tuple(sorted(fields.items())))
        if key not in self._costs:
            self._costs[key] = self.microseconds(case, fields)
        return self._costs[key]

    def _gate(self, case: Case, fields: Fields, rule: Fields) -> str:
        """Compare results of few requests, on one SM so that it loops; calls that differ in requests share this."""
        small = _with_requests(case, GATE_REQUESTS)
        key = (small, tuple(sorted(fields.items())))
        if key not in self._passed:
            if small not in self._gates:
                gate = Gate(workloads.build(small.op, dict(small.keys)), rule, lambda: self._emulate(case.arch))
                problem = gate.problem_of_rule(gate.results())
                if problem:
                    raise CuteSsmError(f"{small.text()}: {problem}")
                self._gates = {small: gate}  # one at a time: they keep tensors
            self._passed[key] = self._gates[small].problem(fields) or self._spills
        return self._passed[key]


class Model(_Emulated):
    """The machine model `gpumodel`: a modelled time of the busiest SM, with the error that its validation found."""

    def __init__(self) -> None:
        super().__init__()
        require("gpumodel")
        from gpumodel import validated

        self.error = validated.error()

    def on(self) -> dict[str, Any]:
        return {"objective": "model", "fitted": bool(require("gpumodel").H200.fitted)}

    def microseconds(self, case: Case, fields: Fields) -> float:
        from cute_ssm.tuner import modelled

        return float(modelled.time_op(case.op, dict(case.keys), case.arch, dict(fields)).us)


class Counters(_Emulated):
    """Instructions of the SM with most CTAs, or bytes, whichever takes longer; nothing overlaps, nothing waits."""

    def on(self) -> dict[str, Any]:
        return {"objective": "counters"}

    def microseconds(self, case: Case, fields: Fields) -> float:
        emulate = require("ptxsim").emulate
        call = workloads.build(case.op, dict(case.keys))
        with emulate(arch=case.arch, counters=True) as session, tuning.override(**fields):
            call.run()
        bandwidth, clock, launch_s = BOARDS[case.arch]
        sms, seconds = archs.by_name(case.arch).sm_count, 0.0
        for launch in session.launches:
            counted = launch.counters.as_dict()
            ctas = launch.grid[0] * launch.grid[1] * launch.grid[2]
            issue = -(-ctas // sms) * counted["instructions"]["total"] / ctas / SCHEDULERS / clock
            share = min(1.0, SM_SHARE * min(ctas, sms) / sms)
            n_bytes = counted["dram_read_bytes"] + counted["dram_write_bytes"]
            seconds += max(issue, n_bytes / bandwidth / share) + launch_s
        return seconds * 1e6


def create(name: str, device: int = 0) -> Objective:
    """Return an objective by its name: ``gpu``, ``model``, ``counters``, or ``auto``, the first of these that works.

    Raises
    ------
    ValueError
        If there is no such objective, or it cannot work here.
    """
    import torch

    chosen = name
    if name == "auto":
        chosen = "gpu" if torch.cuda.is_available() else "counters" if missing("gpumodel") else "model"
    if chosen == "gpu":
        if not torch.cuda.is_available():
            raise ValueError(describe("--objective", "model or counters", "gpu", "there is no GPU here"))
        from cute_ssm.tuner.gpu import Gpu

        return Gpu(device)
    if chosen not in ("model", "counters"):
        raise ValueError(describe("--objective", "auto, gpu, model or counters", repr(name)))
    package = "gpumodel" if chosen == "model" else "ptxsim"
    if absent := missing(package):
        needed = f"{chosen}, which needs {' and '.join(absent)}"
        raise ValueError(describe("--objective", needed, "none", how_to_install(package)))
    return Model() if chosen == "model" else Counters()


def _with_requests(case: Case, count: int) -> Case:
    key = workloads.batch_key(case.op)
    keys = {**dict(case.keys), key: min(count, int(dict(case.keys).get(key, count)))}
    return Case(case.op, tuple(sorted(keys.items())), case.arch)
