"""A journal of measurements: lines of JSON, appended as they are made and read when a search is taken up again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True)
class Measurement:
    """What a config costs.

    Attributes
    ----------
    us : float or None
        Microseconds; None: it cannot run, or its results are wrong.
    reference_us : float
        Those of the rule's config, measured by the same worker at the same time.
    error : str
        Why there is no time.
    """

    us: float | None
    reference_us: float = 0.0
    error: str = ""


class Journal:
    """Measurements by case, config and objective.

    Parameters
    ----------
    path : Path or None
        File; None: nothing is kept.
    objective : str
        What measurements depend on besides: objective, device, sources.  Those of others are left alone.
    """

    def __init__(self, path: Path | None, objective: str):
        self.path, self.objective = path, objective
        self.known: dict[tuple[str, str], Measurement] = {}
        self._file: IO[str] | None = None
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._read(line)

    def get(self, case: str, fields: dict[str, int | str]) -> Measurement | None:
        """Return the measurement of a config, if there is one."""
        return self.known.get((case, _text(fields)))

    def put(self, case: str, fields: dict[str, int | str], measurement: Measurement, what: str = "") -> None:
        """Keep a measurement; on disk at once."""
        self.known[case, _text(fields)] = measurement
        if self.path is None:
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a", encoding="utf-8")  # closed by close()
        line = {"case": case, "what": what, "objective": self.objective, "fields": fields, **asdict(measurement)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, line: str) -> None:
        try:
            entry: dict[str, Any] = json.loads(line)
            if entry["objective"] == self.objective:
                measurement = Measurement(entry["us"], entry["reference_us"], entry["error"])
                self.known[entry["case"], _text(entry["fields"])] = measurement
        except (ValueError, KeyError, TypeError):
            pass  # the line that was being written when the process was stopped


def _text(fields: dict[str, int | str]) -> str:
    return json.dumps(fields, sort_keys=True)
