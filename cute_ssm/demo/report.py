"""Output of the demo: streamed text with a progress bar, the final table, and a plot of the steps."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from cute_ssm.demo.loop import Step

__all__ = ["Screen", "pyplot", "save_plot", "table"]

_MARGIN = 100  # widest line of running text on a terminal
_BAR = 24
_ROOM_BELOW = "\x1bD\x1b[A"  # scrolls if the cursor is on the last line; it keeps its position in the text
_SAVE, _RESTORE, _BELOW, _ERASE = "\x1b7", "\x1b8", "\x1b[B\r", "\x1b[J"


class Screen:
    """Streams text to `out`, and shows a progress bar on `err` if that is a terminal.

    On a terminal lines are wrapped between words; otherwise text is written unchanged. If both are terminals, the bar
    is on the line below the text.

    Parameters
    ----------
    out, err : text file
        Files for the text and the bar.
    total : int
        Steps of a full bar.
    """

    def __init__(self, out: TextIO, err: TextIO, total: int) -> None:
        self._out, self._err, self._total = out, err, total
        self._wraps = out.isatty()
        self._has_bar = err.isatty()
        self._width = max(20, min(_MARGIN, shutil.get_terminal_size().columns - 1))
        self._column = self._indent = self._gap = 0
        self._word = ""
        self._bar = ""

    def text(self, text: str) -> None:
        """Stream a piece of text."""
        if not text:
            return
        self._erase()
        if self._wraps:
            for piece in re.findall(r"\S+|\n| +|[^\S\n ]", text):
                self._piece(piece)
        else:
            self._out.write(text)
        self._out.flush()
        self._draw()

    def progress(self, done: int, seconds: float) -> None:
        """Update the bar and the rate."""
        if not self._has_bar:
            return
        full = _BAR * done // self._total
        speed = f"{done / seconds:.1f} tokens/s" if seconds > 0 else ""
        self._erase()
        self._bar = f"[{'#' * full}{'.' * (_BAR - full)}] {done}/{self._total}  {speed}"[: self._width]
        self._draw()

    def close(self) -> None:
        """Finish the text with a line break and remove the bar."""
        self._erase()
        self._bar = ""
        self._flush_word()
        self._out.write("\n")
        self._out.flush()
        self._column = 0

    def _piece(self, piece: str) -> None:
        if piece == "\n":
            self._flush_word()
            self._out.write("\n")
            self._column = self._gap = self._indent = 0
        elif piece.isspace():
            self._flush_word()
            self._gap += len(piece)
        else:
            self._word += piece

    def _flush_word(self) -> None:
        if not self._word:
            return
        if self._column == 0:
            self._indent = self._gap = min(self._gap, self._width // 2)
        elif self._column + self._gap + len(self._word) > self._width:
            self._out.write("\n")
            self._column, self._gap = 0, self._indent
        room = self._width - self._column - self._gap
        self._out.write(" " * self._gap + self._word[:room])
        self._column += self._gap + len(self._word[:room])
        for start in range(room, len(self._word), self._width):
            part = self._word[start : start + self._width]
            self._out.write("\n" + part)
            self._column = len(part)
        self._gap, self._word = 0, ""

    def _draw(self) -> None:
        if self._bar:
            if self._wraps:
                self._err.write(f"{_ROOM_BELOW}{_SAVE}{_BELOW}{self._bar}{_RESTORE}")
            else:
                self._err.write(f"\r{self._bar}{_ERASE}")
            self._err.flush()

    def _erase(self) -> None:
        if self._bar:
            self._err.write(_ERASE if self._wraps else f"\r{_ERASE}")
            self._err.flush()


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Lay out names and values in two columns between two rules."""
    left = max(len(name) for name, _ in rows)
    right = max(len(value) for _, value in rows)
    rule = "-" * (left + 2 + right)
    return "\n".join([rule, *(f"{name:<{left}}  {value}" for name, value in rows), rule])


def pyplot(extra: str = "demo") -> Any:
    """Return matplotlib's pyplot with a backend that draws to files only.

    Parameters
    ----------
    extra : str
        Extra of this package that installs it.

    Raises
    ------
    ImportError
        If matplotlib is not installed; the message has the install command.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"plot: matplotlib is required: pip install 'cute-ssm[{extra}]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    return found


def save_plot(path: Path, steps: Sequence[Step], draft: int, state_bytes: int, title: str) -> None:
    """Plot accepted tokens and state writes per step, and the bytes written, into an image file.

    Parameters
    ----------
    path : Path
        Its suffix selects the format.
    steps : sequence of Step
    draft : int
        Drafted tokens per step; 0: generated token by token.
    state_bytes : int
        Bytes of one write of the states.
    title : str
        Title, which names model, backend and dtype of the states.
    """
    plt = pyplot()
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 5.8), sharex=True, layout="constrained")
    figure.suptitle(title, fontsize="medium")
    numbers = range(1, len(steps) + 1)
    colours = ["tab:orange" if step.wrote else "tab:blue" for step in steps]
    above.bar(numbers, [step.accepted for step in steps], width=0.9, color=colours)
    mean = sum(step.accepted for step in steps) / len(steps)
    above.axhline(mean, color="black", linewidth=0.8, linestyle="--", label=f"mean {mean:.2f}")
    handles = above.get_legend_handles_labels()[0]
    for colour, label in (("tab:orange", "step wrote the states"), ("tab:blue", "step did not")):
        handles.append(plt.Rectangle((0, 0), 1, 1, color=colour, label=label))
    above.set(
        ylabel="accepted tokens",
        ylim=(0, draft + 1.9),
        title=f"{draft} drafted tokens per step" if draft else "token by token",
    )
    above.legend(handles=handles, ncols=3, loc="upper left", fontsize="small")
    written, total = [], 0
    for step in steps:
        total += state_bytes * step.wrote
        written.append(total / 1e6)
    below.plot(numbers, [n * state_bytes / 1e6 for n in numbers], color="tab:gray", label="a write in every step")
    below.step(numbers, written, where="post", color="tab:orange", label="this run")
    below.set(xlabel="step", ylabel="states written, MB", ylim=(0, None))
    below.legend(loc="upper left", fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)
