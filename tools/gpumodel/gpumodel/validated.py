"""The error of the machine model, as the committed validation found it (`gpumodel.validate`)."""

from __future__ import annotations

import json
from pathlib import Path

from .fit import Errors

RESULT = Path(__file__).with_name("data") / "validation.json"


def error(path: Path = RESULT) -> float:
    """Return the median of ``abs(modelled / published - 1)``: of the held-out points, or of all if that is larger.

    Raises
    ------
    ValueError
        The file holds no point.
    """
    points = json.loads(path.read_text(encoding="utf-8"))["points"]
    if not points:
        raise ValueError(f"{path}: no point was modelled")
    held = [point["ratio"] for point in points if point["half"] == "held out"]
    halves = [ratios for ratios in ([point["ratio"] for point in points], held) if ratios]
    return max(Errors.of(ratios).median_error for ratios in halves)
