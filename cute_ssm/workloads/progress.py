"""One line on a terminal that says how far something is."""

from __future__ import annotations

import sys
import time
from typing import TextIO

WIDTH = 24


class Progress:
    """A bar on standard error if that is a terminal; else nothing.

    Parameters
    ----------
    total : int
        Steps until it is done; may be changed later.
    stream : file, optional
    """

    def __init__(self, total: int, stream: TextIO | None = None):
        self.total, self.done, self.stream = total, 0, stream or sys.stderr
        self.start = time.monotonic()
        self.shown = self.stream.isatty()

    def step(self, text: str = "", count: int = 1) -> None:
        """Count steps as done."""
        self.done += count
        if not self.shown:
            return
        part = min(1.0, self.done / self.total) if self.total else 1.0
        spent = time.monotonic() - self.start
        left = f", {spent / part * (1 - part):.0f} s left" if part else ""
        bar = "#" * round(WIDTH * part)
        line = f"[{bar:{WIDTH}}] {self.done}/{self.total}, {spent:.0f} s{left}  {text}"
        self.stream.write(f"\r\x1b[K{line[:118]}")
        self.stream.flush()

    def close(self) -> None:
        """Leave the line."""
        if self.shown:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
