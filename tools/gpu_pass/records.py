"""What a step writes while it runs: one line per item, and failures at once, so that a process may die at any time.

``items-STEP.jsonl`` has a line when an item begins and one when it is done; ``failures.jsonl`` has every failure of all
steps, with its traceback and, where values were compared, the largest error.  A step that is started again leaves out
what has begun before.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAILED, LATE, STICKY = 1, 3, 86  # exit codes: an item failed; items were not reached; the device must be opened anew
FAILURES = "failures.jsonl"


class Wrong(Exception):
    """A result that is wrong.

    Parameters
    ----------
    what : str
    data
        Figures, such as ``max_error``; written with the failure.
    """

    def __init__(self, what: str, **data: Any):
        super().__init__(what)
        self.data = data


@dataclass(frozen=True)
class Item:
    """Something small that a step does; ``run`` returns what is written of it."""

    name: str
    run: Callable[[], dict[str, Any]]


def device_is_alive() -> bool:
    """Whether CUDA still works in this process: after an illegal access, say, every call fails."""
    if "torch" not in sys.modules:
        return True
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.zeros(1, device="cuda").add_(1).item()
    except Exception:
        return False
    return True


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a line that is on disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, none if it does not exist; a line that was cut short is left out."""
    return parsed(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else []


def parsed(text: str) -> list[dict[str, Any]]:
    """Return lines of JSON, without those that were cut short."""
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def fail(out: Path, step: str, name: str, error: str, trace: str = "", **data: Any) -> None:
    """Write a failure."""
    append(out / FAILURES, {"step": step, "name": name, "error": error, "traceback": trace, **data})


class Records:
    """Runs items and writes what becomes of them.

    Parameters
    ----------
    out : Path
        Folder of the results.
    step : str
    seconds : float
        After which no further item begins.
    alive : callable
        Asked after a failure: False ends the process, because nothing after it could pass.
    """

    def __init__(
        self, out: Path, step: str, seconds: float, alive: Callable[[], bool] = device_is_alive,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self.out, self.step, self.alive, self.clock = out, step, alive, clock
        self.end = clock() + seconds
        self.path = out / f"items-{step}.jsonl"

    def run(self, items: Sequence[Item] | Iterable[Item]) -> int:
        """Run items in order, except those that have begun before; return the exit code of the step."""
        items = list(items)
        lines = read(self.path)
        begun = {line["item"] for line in lines}
        late, code = 0, FAILED if any(line["state"] == "failed" for line in lines) else 0
        for item in items:
            if item.name in begun:
                continue
            if self.clock() >= self.end:
                late += 1
                continue
            append(self.path, {"item": item.name, "state": "begun"})
            start = self.clock()
            try:
                data = item.run()
            except KeyboardInterrupt:
                self._done(item, "interrupted", start, {})
                late += 1
                break
            except Exception as error:
                code = FAILED
                self._failed(item, start, error)
                if not self.alive():
                    fail(self.out, self.step, item.name, "the device is lost to this process: it starts again")
                    return STICKY
            else:
                self._done(item, "passed", start, data)
        self._tell(items)
        return code or (LATE if late else 0)

    def _failed(self, item: Item, start: float, error: Exception) -> None:
        data = error.data if isinstance(error, Wrong) else {}
        words = f"{type(error).__name__}: {error}"[:2000]
        fail(self.out, self.step, item.name, words, traceback.format_exc()[-8000:], **data)
        self._done(item, "failed", start, {"error": words[:300], **data})
        print(f"{self.step}: {item.name}: {words[:300]}", file=sys.stderr, flush=True)

    def _done(self, item: Item, state: str, start: float, data: dict[str, Any]) -> None:
        append(self.path, {"item": item.name, "state": state, "seconds": round(self.clock() - start, 3), **data})

    def _tell(self, items: Sequence[Item]) -> None:
        print(f"{self.step}: {told(read(self.path), len(items))}", flush=True)


def told(lines: Iterable[dict[str, Any]], total: int | None = None) -> str:
    """Return how many items passed, failed and were not reached, in words."""
    states: dict[str, str] = {}
    for line in lines:
        states[line["item"]] = line["state"]
    names = {"begun": "cut short"}
    counts: dict[str, int] = {}
    for state in states.values():
        counts[names.get(state, state)] = counts.get(names.get(state, state), 0) + 1
    if total is not None and total > len(states):
        counts["not reached"] = total - len(states)
    return ", ".join(f"{count} {state}" for state, count in counts.items()) or "nothing was begun"
