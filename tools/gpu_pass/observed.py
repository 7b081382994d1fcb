"""Times of a pass as observations of the machine model, and the fit of its constants to them.

A line is several observations, one for each circumstance that it was timed in, of which `gpumodel.Conditions` has the
like.  A call is recorded in the emulator once, and replayed for every set of constants that is tried.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cute_ssm import tuning, workloads
from cute_ssm.tuner import modelled as by_model

VARIANTS = {  # of a line -> what a call meets: data, code, whether it follows a kernel that lets it start early
    "chained": ("cold", "warm", True),
    "dependent": ("cold", "warm", True),
    "apart": ("cold", "warm", False),
    "evicted": ("cold", "l2", False),
    "warm": ("warm", "warm", True),
}
CONSTANTS = ("dram_efficiency", "dram_latency", "l2_latency", "cta_start", "launch_us")
HELD_OUT = 4  # every so many lines are no part of the fit


class Recorded:
    """The modelled time of a call of any size, on any variant of a machine.

    Parameters
    ----------
    machine : Machine
        Whose number of SMs and target the recording has.
    """

    def __init__(self, op: str, keys: Mapping[str, Any], machine: Any):
        import gpumodel

        self.model, self.op, self.keys, self.base = gpumodel, op, dict(keys), machine
        self._sessions: dict[int, tuple[Any, int]] = {}

    def us(self, machine: Any, conditions: Any) -> float:
        """Return the modelled microseconds of a call on a machine."""

        def at(size: int | None, limit: int) -> Any:
            if size is None:
                size = min(
                    by_model.requests(self.op, self.keys)[1], by_model.largest(self.op, self.keys, machine, limit)
                )
            session, n_bytes = self._session(size)
            return self.model.time_session(session, machine, n_bytes, conditions=conditions)

        return by_model.scaled(at, self.op, self.keys, machine).us

    def _session(self, size: int) -> tuple[Any, int]:
        if size not in self._sessions:
            fields = by_model.chosen(self.op, self.keys, self.base)
            call = by_model.arguments(self.op, {**self.keys, workloads.batch_key(self.op): size})
            with tuning.override(**fields):
                self._sessions[size] = self.model.record(call.run, self.base), call.floor_bytes
        return self._sessions[size]


def is_short(line: Mapping[str, Any]) -> bool:
    """Whether a call is replayed whole or in a steady state of requests; long sequences are continued otherwise."""
    length = {**workloads.parameters(line["op"]), **line["keys"]}.get("length", 0)
    return int(length) <= by_model.EXACT_TOKENS


def machine_name(device: str) -> str:
    """Return the model's machine for the name of a device, such as ``"NVIDIA H200"``.

    Raises
    ------
    ValueError
        There is none.
    """
    import gpumodel

    for name in gpumodel.MACHINES:
        if name in device.upper().replace("-", " ").split():
            return name
    raise ValueError(f"device: expected one whose name has {' or '.join(gpumodel.MACHINES)}, got {device!r}")


def machine_like(arch: str, sms: int) -> str:
    """Return the name of a device that has a machine of the model, for a target and a number of SMs.

    Raises
    ------
    ValueError
        There is none.
    """
    import gpumodel

    for name, machine in gpumodel.MACHINES.items():
        if (machine.arch, machine.sms) == (arch, sms):
            return f"NVIDIA {name}"
    raise ValueError(f"device: expected one of the model's, got {arch} with {sms} SMs")


def observations(lines: Iterable[Mapping[str, Any]], variants: Sequence[str]) -> list[Any]:
    """Return the observations of lines, and of the copy that they were held against.

    A variant whose time is not above zero is none: what was subtracted from it was as long, within its noise.
    """
    import gpumodel
    from gpumodel.fit import Observation

    found, copies = [], {}
    for number, line in enumerate(line for line in lines if is_short(line)):
        name = machine_name(line["device"])
        if line.get("sms", gpumodel.MACHINES[name].sms) != gpumodel.MACHINES[name].sms:
            raise ValueError(
                f"sms: expected {gpumodel.MACHINES[name].sms}, those of the model's {name}, got {line['sms']} of "
                f"{line['device']}: another board, or a part of one (MIG)"
            )
        copies[name] = line["copy_gbs"]
        keys = {**line["keys"], workloads.batch_key(line["op"]): line["batch"]}
        recorded = Recorded(line["op"], keys, gpumodel.MACHINES[name])
        half = "held out" if number % HELD_OUT == HELD_OUT - 1 else "fit"
        for variant in variants:
            us = line.get("variants", {}).get(variant, {"median": 0.0})["median"]
            if us <= 0:
                continue
            data, code, follows = VARIANTS[variant]
            if variant in ("chained", "warm"):
                follows = line["pdl"] == "always"
            conditions = gpumodel.Conditions(data=data, code=code, follows=follows)
            found.append(Observation(
                f"{line['op']} {line['case']} batch {line['batch']}, {variant}", us,
                _modelled(recorded, conditions), name, variant, half,
            ))  # fmt: skip
    for name, gbs in copies.items():
        n_bytes = 1 << 30
        found.append(Observation(f"copy on {name}", n_bytes / gbs / 1e3, _copy(n_bytes), name, "copy"))
    return found


def _modelled(recorded: Recorded, conditions: Any) -> Callable[[Any], float]:
    return lambda machine: recorded.us(machine, conditions)


def _copy(n_bytes: int) -> Callable[[Any], float]:
    return lambda machine: machine.microseconds(n_bytes / machine.dram_rate)


def fit(
    lines: Iterable[Mapping[str, Any]], constants: Sequence[str] = CONSTANTS,
    variants: Sequence[str] = ("chained", "apart"), rounds: int = 4,
    report: Callable[[str], object] | None = None,
) -> Any:  # fmt: skip
    """Fit the model's constants to lines of one GPU; see ``gpumodel.fit.fit``.

    Raises
    ------
    ValueError
        There are no lines, or lines of several GPUs.
    """
    import gpumodel
    from gpumodel.fit import fit as fit_constants

    points = observations(lines, variants)
    names = {point.machine for point in points}
    if len(names) != 1:
        raise ValueError(f"lines: expected those of one GPU, got {', '.join(sorted(names)) or 'none'}")
    return fit_constants(points, gpumodel.MACHINES[names.pop()], list(constants), rounds, report)


def store(fitted: Any, path: Path, source: str) -> dict[str, Any]:
    """Write fitted constants and their error where the model reads them; return what is known of the fit.

    The error is that of the times held out, or of those of the fit where all are: see ``gpumodel.validated.error``.
    """
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    values = {name: change.after for name, change in fitted.changes.items()}
    held, used = fitted.after["held out"], fitted.after["fit"]
    error = held.median_error if held.n else used.median_error
    known[fitted.machine.name] = {"constants": values, "error": round(error, 4), "source": source}
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return {"machine": fitted.machine.name, **fitted.as_json()}
