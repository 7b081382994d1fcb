"""Published times, and the files that hold them.

A file of points is JSON: ``{"points": [...]}``.  A point:

======== ==========================================================================================================
name     unique
source   who published it: points of a source are summed up together
where    where the time and the protocol are written, for people
gpu      name of a machine, as in `gpumodel.MACHINES`
kernel   a name of `gpumodel.validate.kernels.KERNELS`
keys     what the kernel's call depends on; those that are left out have the values that ``KERNELS`` shows
protocol "data" and "launch", as `gpumodel.Conditions` has them
us       the published microseconds
half     "fit": constants may be fitted on it; "held out"
sweep    optional, a name: points of a sweep differ in launch configuration alone
======== ==========================================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..constants import MACHINES
from ..model import Conditions
from .kernels import KERNELS

PUBLISHED = Path(__file__).with_name("published.json")
HALVES = ("fit", "held out")


class Point(NamedTuple):
    """A published time."""

    name: str
    source: str
    where: str
    gpu: str
    kernel: str
    keys: Mapping[str, Any]
    conditions: Conditions
    us: float
    half: str = "held out"

    @property
    def recorded(self) -> dict[str, Any]:
        """What a recording depends on: the kernel, all keys, and the kind of GPU."""
        machine = MACHINES[self.gpu]
        return {"kernel": self.kernel, "keys": dict(self.keys), "arch": machine.arch, "sms": machine.sms}


class Refused(NamedTuple):
    """A point that cannot be modelled, and why."""

    name: str
    why: str


def read(path: Path = PUBLISHED) -> tuple[list[Point], list[Refused]]:
    """Return the points of a file, and those that name what is not known.

    Raises
    ------
    ValueError
        The file is no file of points.
    """
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["points"]
        given = [(str(item["name"]), item) for item in listed]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no file of points: {type(error).__name__}: {error}") from None
    points, refused, names = [], [], set()
    for name, item in given:
        try:
            if name in names:
                raise ValueError("the name is not unique")
            points.append(point_of(name, item))
        except (ValueError, TypeError, AttributeError) as error:
            refused.append(Refused(name, str(error)))
        names.add(name)
    return points, refused


def point_of(name: str, item: Mapping[str, Any]) -> Point:
    """Return the point of an entry.

    Raises
    ------
    ValueError
        If the entry lacks something, or names what is not known.
    """
    missing = [key for key in ("source", "gpu", "kernel", "us") if key not in item]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    chosen(item, "gpu", MACHINES)
    chosen(item, "kernel", KERNELS)
    known = KERNELS[item["kernel"]].keys
    keys = item.get("keys", {})
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise ValueError(f"keys: expected {', '.join(known)}, got {', '.join(unknown)}")
    us = item["us"]
    if not isinstance(us, (int, float)) or not us > 0:
        raise ValueError(f"us: expected microseconds, got {us!r}")
    half = item.get("half", "held out")
    chosen({"half": half}, "half", HALVES)
    return Point(
        name, item["source"], item.get("where", ""), item["gpu"], item["kernel"], {**known, **keys},
        Conditions(**item.get("protocol", {})), float(us), half,
    )  # fmt: skip


def chosen(item: Mapping[str, Any], key: str, values: Any) -> None:
    if item[key] not in values:
        raise ValueError(f"{key}: expected one of {', '.join(values)}, got {item[key]!r}")
