"""By how much the machine model is known to err: by the committed validation (`gpumodel.validate`), and by fits."""

from __future__ import annotations

import json
from pathlib import Path

from .constants import FITTED
from .fit import Errors

RESULT = Path(__file__).with_name("data") / "validation.json"


def error(path: Path = RESULT, fitted: Path = FITTED) -> float:
    """Return the largest of the median errors that are known.

    Of the points of a validation, the median of ``abs(modelled / published - 1)``: of those held out, and of all.  Of
    constants that were fitted to measured times, the error that was stored with them, see `constants.fitted`.

    Raises
    ------
    ValueError
        The validation has no point.
    """
    points = json.loads(path.read_text(encoding="utf-8"))["points"]
    if not points:
        raise ValueError(f"{path}: no point was modelled")
    held = [point["ratio"] for point in points if point["half"] == "held out"]
    halves = [ratios for ratios in ([point["ratio"] for point in points], held) if ratios]
    known = [Errors.of(ratios).median_error for ratios in halves]
    if fitted.exists():
        known += [one["error"] for one in json.loads(fitted.read_text(encoding="utf-8")).values()]
    return max(known)
