"""Fit constants of the machine model to times that were observed.

    from gpumodel.fit import Observation, fit

    points = [Observation("copy of 64 MiB", us=41.2, modelled=lambda machine: ..., machine="H200"), ...]
    fitted = fit(points, gpumodel.H200, ["dram_efficiency", "l2_latency"])
    fitted.machine, fitted.changes, fitted.after["held out"].median_error

A point holds the observed time and a function that models it on a given machine.  The function is called once for every
set of constants that is tried, so it should replay a recording and not emulate.  Points whose ``half`` is not "fit" are
held out: they are modelled before and after, and have no part in the fit.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .constants import Machine, value_of, with_value

STEP = 0.08  # of a constant's range, for the differences that stand for derivatives: replays are not smooth
FAR = 0.25  # errors beyond this weigh as their size, not as its square
AT_ALL = "@"  # separates a constant from the machine that it is fitted for


class Bounds(NamedTuple):
    """The range in which a constant may be fitted, and where the range comes from."""

    low: float
    high: float
    source: str


# What published measurements allow; a constant without an entry needs bounds of its own in `fit`.
BOUNDS = {
    "dram_efficiency": Bounds(0.72, 0.95, "copies and streams on H100, H200, B200 and B300 reach 0.78 to 0.95"),
    "dram_latency": Bounds(480, 800, "idle DRAM 570-650 clocks on an H100; under load more"),
    "l2_latency": Bounds(200, 330, "near L2 260-300 clocks; a far partition is another constant"),
    "l2_share": Bounds(32, 80, "37-40 bytes a clock and SM on an H200, 70-77 on a B300"),
    "lines_per_clock": Bounds(0.5, 2, "one tag lookup of a 128-byte line a clock, at most two"),
    "cta_start": Bounds(50, 800, "no measurement; dispatch of 1000 CTAs takes 0.54 us on a B300"),
    "cta_ns": Bounds(0.3, 1.1, "0.54 on a B300; Hopper unknown"),
    "cta_ns@B200": Bounds(0.5, 0.6, "0.512 and 0.543 on a B300, two figures of one source; 0.6 at a B200's clocks"),
    "barrier": Bounds(15, 40, "22 + 2 a warp on a B300"),
    "branch": Bounds(4, 16, "no measurement"),
    "shared_latency": Bounds(23, 33, "28.6 clocks on an H100, 29 on a B300"),
    "store_latency": Bounds(100, 700, "no measurement"),
    "launch_us": Bounds(0.5, 2.2, "kernels in a CUDA graph, start to start: 0.56-0.82 empty on a B300, 1.3 on an H200"),
    "stream_launch_us": Bounds(1.5, 8, "2.0 on a B300; up to 7 between two events, by times of small batches"),
    "profiler_us": Bounds(0.7, 3, "from a launch in a graph to a launch by itself"),
    "pipes.int.occupancy": Bounds(1, 2, "64 results a clock on Hopper; 128 on a Blackwell of compute capability 10.3"),
    "pipes.convert.occupancy": Bounds(2, 12, "16 to 64 results a clock, by the pair of types"),
}  # fmt: skip


@dataclass(frozen=True)
class Observation:
    """A time that was observed, and how to model it.

    Attributes
    ----------
    name : str
    us : float
        The observed microseconds.
    modelled : callable
        Takes a `Machine`, and returns modelled microseconds.
    machine : str
        Name of the machine that it was observed on.  Empty: the only one of the fit.
    source : str
        Points of a source share its systematic errors: their bias is reported together.
    half : str
        ``"fit"``: the fit uses the point.  Anything else: held out.
    """

    name: str
    us: float
    modelled: Callable[[Machine], float]
    machine: str = ""
    source: str = ""
    half: str = "fit"


class Errors(NamedTuple):
    """How modelled times differ from observed ones.

    ``median_error``: of ``abs(modelled / observed - 1)``; ``bias``: the geometric mean of ``modelled / observed``.
    """

    n: int
    median_error: float
    bias: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Errors:
        """Return the errors of ratios of modelled and observed times."""
        if not ratios:
            return cls(0, math.nan, math.nan)
        bias = math.exp(statistics.fmean(map(math.log, ratios)))
        return cls(len(ratios), statistics.median(abs(ratio - 1) for ratio in ratios), bias)


class Change(NamedTuple):
    """A constant that was fitted."""

    before: float
    after: float
    bounds: Bounds


@dataclass
class Fit:
    """The result of `fit`.

    Attributes
    ----------
    machines : dict
        Fitted machines by name; their ``fitted`` is True.
    changes : dict
        `Change` of every constant, by the name that was passed.
    before, after : dict
        `Errors` of the halves "fit" and "held out", and of every source on all of its points.
    ratios : dict
        Modelled by observed time of every point, before and after, by name.
    """

    machines: dict[str, Machine]
    changes: dict[str, Change]
    before: dict[str, Errors]
    after: dict[str, Errors]
    ratios: dict[str, tuple[float, float]]

    @property
    def machine(self) -> Machine:
        """The fitted machine, of a fit of one."""
        (machine,) = self.machines.values()
        return machine

    def as_json(self) -> dict[str, Any]:
        """Return what was fitted and how well, in types of JSON."""
        return {
            "constants": {
                name: {"before": c.before, "after": c.after, "bounds": [c.bounds.low, c.bounds.high],
                       "source": c.bounds.source}
                for name, c in self.changes.items()
            },
            "errors": {
                key: {"n": found.n, "before": list(self.before[key][1:]), "after": list(found[1:])}
                for key, found in self.after.items()
            },
            "points": {name: list(pair) for name, pair in self.ratios.items()},
        }  # fmt: skip


def fit(
    points: Sequence[Observation],
    machine: Machine | Sequence[Machine],
    names: Sequence[str] | Mapping[str, tuple[float, float]],
    rounds: int = 4,
    report: Callable[[str], object] | None = None,
) -> Fit:
    """Fit constants of one or more machines to observed times.

    Parameters
    ----------
    points : sequence of Observation
    machine : Machine or sequence of Machine
        Where the fit starts.
    names : sequence of str, or mapping
        Constants to fit: a field of `Machine`, or ``"pipes.NAME.occupancy"`` or ``"pipes.NAME.latency"``.  A constant
        has one value on all machines, unless ``"@MACHINE"`` follows it.  A mapping gives the lowest and the highest
        value of each; without one, `BOUNDS` does.
    rounds : int
        Steps of the optimiser at most.  Each replays all points once per constant, and once more.
    report : callable, optional
        Receives a line of text per set of constants that is tried.

    Returns
    -------
    Fit

    Raises
    ------
    ValueError
        A constant or a point's machine is unknown, a constant has no bounds, or no point is to be fitted on.
    ImportError
        scipy is not installed.
    """
    try:
        from scipy.optimize import least_squares
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; a fit needs it: pip install 'gpumodel[fit]'", name="scipy") from error
    machines = {m.name: m for m in ([machine] if isinstance(machine, Machine) else machine)}
    constants = [Constant.of(name, names, machines) for name in names]
    for point in points:
        machine_of(point, machines)
    used = [point for point in points if point.half == "fit"]
    if not used:
        raise ValueError(f"points: expected at least one whose half is 'fit', got {len(points)} without")

    def times(tried: Sequence[float], which: Sequence[Observation]) -> list[float]:
        variants = varied(machines, constants, tried)
        return [point.modelled(machine_of(point, variants)) / point.us for point in which]

    def residuals(tried: np.ndarray) -> np.ndarray:
        ratios = times(tried, used)
        if report is not None:
            said = ", ".join(f"{c.name} {c.value(x):.4g}" for c, x in zip(constants, tried))
            found = Errors.of(ratios)
            report(f"{said}: median error {found.median_error:.1%}, bias {found.bias:.3f}")
        return np.log(ratios)

    start = np.array([c.position(c.current(machines)) for c in constants])
    found = least_squares(
        residuals, start, bounds=(0, 1), loss="soft_l1", f_scale=FAR, diff_step=STEP, x_scale=1.0,
        max_nfev=rounds,
    ).x  # fmt: skip
    fitted = varied(machines, constants, found)
    before, after = (np.array(times(x, points)) for x in (start, found))
    changes = {
        c.name: Change(c.current(machines), c.current(fitted), c.bounds) for c in constants
    }  # fmt: skip
    return Fit(
        {name: dataclasses.replace(m, fitted=True) for name, m in fitted.items()},
        changes,
        by_group(points, before.tolist()),
        by_group(points, after.tolist()),
        {point.name: (b, a) for point, b, a in zip(points, before.tolist(), after.tolist())},
    )


def machine_of(point: Observation, machines: Mapping[str, Machine]) -> Machine:
    """Return the machine of a point."""
    if not point.machine and len(machines) == 1:
        return next(iter(machines.values()))
    if point.machine not in machines:
        raise ValueError(f"point {point.name!r}: machine: expected one of {', '.join(machines)}, got {point.machine!r}")
    return machines[point.machine]


def by_group(points: Sequence[Observation], ratios: Sequence[float]) -> dict[str, Errors]:
    """Return the errors of the two halves, and of each source."""
    groups: dict[str, list[float]] = {"fit": [], "held out": []}
    for point, ratio in zip(points, ratios):
        groups["fit" if point.half == "fit" else "held out"].append(ratio)
        if point.source:
            groups.setdefault(point.source, []).append(ratio)
    return {name: Errors.of(group) for name, group in groups.items()}


@dataclass(frozen=True)
class Constant:
    """A constant to fit.  The optimiser sees its position between its bounds: 0 to 1, on a logarithmic scale."""

    name: str
    field: str
    machine: str | None  # None: all
    bounds: Bounds

    @classmethod
    def of(cls, name: str, names: Any, machines: Mapping[str, Machine]) -> Constant:
        """Return the constant of a name as `fit` takes it."""
        field, _, where = name.partition(AT_ALL)
        if where and where not in machines:
            raise ValueError(f"names: expected {AT_ALL} and one of {', '.join(machines)}, got {name!r}")
        try:
            for machine in machines.values():
                float(value_of(machine, field))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"names: expected numeric fields of Machine, got {name!r}") from None
        if isinstance(names, Mapping):
            bounds = Bounds(*names[name][:2], "given")
        elif name in BOUNDS or field in BOUNDS:
            bounds = BOUNDS.get(name) or BOUNDS[field]
        else:
            raise ValueError(f"names: {field!r} has no known bounds; pass a mapping of names to (lowest, highest)")
        if not 0 < bounds.low < bounds.high:
            raise ValueError(f"names: {name!r}: expected 0 < lowest < highest, got {tuple(bounds[:2])}")
        return cls(name, field, where or None, bounds)

    def current(self, machines: Mapping[str, Machine]) -> float:
        """Its value on the machine that it is fitted for, or on the first one."""
        return float(value_of(machines[self.machine or next(iter(machines))], self.field))

    def position(self, value: float) -> float:
        low, high, _ = self.bounds
        return min(1.0, max(0.0, math.log(value / low) / math.log(high / low)))

    def value(self, position: float) -> float:
        low, high, _ = self.bounds
        return low * (high / low) ** position


def varied(
    machines: Mapping[str, Machine], constants: Sequence[Constant], positions: Sequence[float]
) -> dict[str, Machine]:
    """Return machines with constants at positions between their bounds."""
    found = dict(machines)
    for constant, position in zip(constants, positions):
        for name in [constant.machine] if constant.machine else list(found):
            found[name] = with_value(found[name], constant.field, constant.value(position))
    return found
