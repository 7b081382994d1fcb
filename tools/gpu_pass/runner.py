"""Carries out the steps of a pass within a time, each a process of its own, and packs what they wrote.

A process whose time is over gets SIGINT, alone, so that pytest and the steps write names, tracebacks and reports; its
group is ended some seconds later.  A step of items that crashes, hangs, or loses the device is started again behind the
item that did it.  If the pass itself is ended, by SIGTERM or in a way that it cannot notice, no step outlives it.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gpu_pass import records
from gpu_pass.plan import SECONDS, Step, located

RESERVE_S = 6.0  # for the summary and the last archive
GRACE_S = 12.0  # between SIGINT and the end of the group
POLL_S = 0.2
STARTING = 5  # times as long may pass before the first result: Python, PyTorch and CUDA are loaded
PART_S = 360.0  # that the caps of steps are meant for; with more time they are higher
ARCHIVE_BYTES = 15 << 20
HUNG = -1000  # in place of an exit code
# what tools say that may not look at this device
REFUSED = r"Device not supported|LibraryNotLoaded|ERR_NVGPUCTRPERM|No kernels were profiled"


@dataclass
class Done:
    """What became of a step.

    Attributes
    ----------
    status : str
        passed, failed, out of time, or left out.
    line : str
        The line of its log that tells most, or why it was left out.
    starts : int
        Processes that were started for it.
    """

    name: str
    status: str
    seconds: float
    line: str
    limit_s: float = 0.0
    log: str = ""
    returncode: int | None = None
    starts: int = 0


@dataclass(frozen=True)
class Limits:
    """When a process is ended: after ``seconds``, or when ``watched`` has not grown for ``stall_s``."""

    seconds: float
    watched: Path | None = None
    stall_s: float = float("inf")


Runner = Callable[[Sequence[str], Path, Limits, Mapping[str, str], Path], "int | None"]


def _as_a_step() -> None:
    """What a step's process does before it is one: a shell in the background ignores SIGINT, and its children would
    too; and it ends with the pass, lest it should take time from the next one on that GPU."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def run(command: Sequence[str], log: Path, limits: Limits, environment: Mapping[str, str], cwd: Path) -> int | None:
    """Run a command, its output appended to a log; return its code, None if its time was over, or `HUNG`."""
    with open(log, "a", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(
            command, cwd=cwd, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=dict(environment), start_new_session=True, preexec_fn=_as_a_step,
        )  # fmt: skip
        try:
            return _wait(process, limits)
        finally:
            _end(process)


def _wait(process: subprocess.Popen[bytes], limits: Limits) -> int | None:
    end = time.monotonic() + limits.seconds
    size, since = 0, time.monotonic()
    while True:
        try:
            return process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        if now >= end:
            return None
        if limits.watched is not None:
            current = limits.watched.stat().st_size if limits.watched.exists() else 0
            if current != size:
                size, since = current, now
            elif now - since > limits.stall_s * (1 if size else STARTING):
                return HUNG


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process: by SIGINT to itself, then with all that it has started."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass
    for number, wait_s in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)  # workers outlive a process that has ended, too
        except ProcessLookupError:
            break
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue


class Pass:
    """Carries out steps.

    Parameters
    ----------
    out : Path
        Folder of the results.
    archive : Path
        The tar file that holds them, written anew after each step.
    stall_s : float
        Time without a new item after which a step of items counts as hung.
    """

    def __init__(
        self, out: Path, archive: Path, environment: Mapping[str, str], cwd: Path, stall_s: float = 60.0,
        runner: Runner = run, clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self.out, self.archive, self.environment, self.cwd = out, archive, environment, cwd
        self.stall_s, self.runner, self.clock = stall_s, runner, clock
        self.done: list[Done] = []
        self.scale = 1.0

    def carry_out(self, steps: Sequence[Step], seconds: float) -> list[Done]:
        """Run the steps in order within a time; the summary and the archive are written after each."""
        self.out.mkdir(parents=True, exist_ok=True)
        end = self.clock() + seconds - RESERVE_S
        self.scale = max(1.0, seconds / PART_S / len({step.part for step in steps}))
        for i, step in enumerate(steps):
            left = [step, *(later for later in steps[i + 1 :] if not missing(later))]
            self.done.append(self._step(step, left, end - self.clock()))
            write_summary(self.done, self.out, self.archive)
            pack(self.out, self.archive)
        return self.done

    def end(self, number: int, _: object) -> None:
        """Of SIGTERM: pack what is there, then end, and the step's process with this one; SIGKILL may follow."""
        if self.done:
            write_summary(self.done, self.out, self.archive)
        pack(self.out, self.archive)
        sys.exit(128 + number)

    def _step(self, step: Step, left: Sequence[Step], seconds: float) -> Done:
        if reason := missing(step):
            return Done(step.name, "left out", 0.0, reason)
        command = [located(step.needs) or word if word == step.needs else word for word in step.command]
        if seconds < step.least_s:
            return Done(step.name, "left out", 0.0, f"needs {step.least_s:.0f} s, {max(seconds, 0):.0f} s are left")
        limit, start, starts, code = allotted(step, left, seconds, self.scale), self.clock(), 0, None
        log = self.out / (re.sub(r"\W+", "-", step.name) + ".log")
        watched = self.out / f"items-{step.items}.jsonl" if step.items else None
        while True:
            rest = limit - (self.clock() - start)
            begun = unfinished(watched)
            starts += 1
            words = [word.replace(SECONDS, f"{rest:.1f}") for word in command]
            try:
                code = self.runner(words, log, Limits(rest, watched, self.stall_s), self.environment, self.cwd)
            except OSError as error:
                return Done(step.name, "failed", self.clock() - start, str(error), limit, log.name, None, starts)
            died = code is not None and code not in (0, records.FAILED, records.LATE)
            if watched is None or not died:
                break
            culprit = unfinished(watched)
            if code != records.STICKY and culprit is not None:
                how = f"no end after {self.stall_s:.0f} s" if code == HUNG else f"the process ended with code {code}"
                records.fail(self.out, step.items, culprit, how, tail(log))
                records.append(watched, {"item": culprit, "state": "failed", "error": how})
            moved = code == records.STICKY or culprit != begun
            if not moved or limit - (self.clock() - start) < min(step.least_s, limit / 2):
                break
        return self._done(step, code, self.clock() - start, limit, log, starts)

    def _done(self, step: Step, code: int | None, seconds: float, limit: float, log: Path, starts: int) -> Done:
        status = {None: "out of time", 0: "passed", records.LATE: "out of time"}.get(code, "failed")
        line = last_line(log, step.last)
        refusal = last_line(log, REFUSED) if step.needs and code else ""
        if refusal:
            return Done(step.name, "left out", seconds, refusal, limit, log.name, code, starts)
        if step.items:
            lines = records.read(self.out / f"items-{step.items}.jsonl")
            own = last_line(log, rf"^{re.escape(step.items)}: \d+ \w+").partition(": ")[2]  # knows what was not reached
            if not own or code not in (0, records.FAILED, records.LATE):
                own = records.told(lines)
            line = own + (f"; {line}" if line and step.last != r"\S" else "")
            if any(one["state"] == "failed" for one in lines):
                status = "failed"
        names = {step.name, step.items}
        if status == "failed" and not any(one["step"] in names for one in records.read(self.out / records.FAILURES)):
            how = f"no end after {self.stall_s:.0f} s" if code == HUNG else f"the process ended with code {code}"
            records.fail(self.out, step.name, "the step as a whole", how, tail(log))  # a sanitizer's errors, say
        return Done(step.name, status, seconds, line, limit, log.name, code, starts)


def allotted(step: Step, left: Sequence[Step], seconds: float, scale: float = 1.0) -> float:
    """Return the seconds that a step may take of those that are left.

    Its share by weight beside the steps after it, and half as much again, because many end early, as long as that
    leaves them what they need; but so much at least that it is worth its start, and at most its cap times ``scale``.
    """
    share = seconds * step.weight / sum(later.weight for later in left) * 1.5
    reserved = step.least_s
    for later in left[1:]:
        if reserved + later.least_s <= seconds:
            reserved += later.least_s
    room = seconds - (reserved - step.least_s)
    return min(max(min(share, room), step.least_s), step.most_s * scale, seconds)


def missing(step: Step) -> str:
    """Return what a step needs and is not there, in words."""
    if step.needs and located(step.needs) is None:
        return f"{step.needs} is not installed"
    if step.file is not None and not step.file.is_file():
        return f"{step.file.name} is missing"
    return ""


def unfinished(path: Path | None) -> str | None:
    """Return the item that began last, unless it passed or failed."""
    lines = records.read(path) if path is not None else []
    return lines[-1]["item"] if lines and lines[-1]["state"] in ("begun", "interrupted") else None


def tail(log: Path, n_bytes: int = 4000) -> str:
    """Return the end of a log."""
    try:
        return log.read_bytes()[-n_bytes:].decode("utf-8", "replace")
    except OSError:
        return ""


def last_line(log: Path, pattern: str) -> str:
    """Return the last line of a log that matches."""
    lines = tail(log, 1 << 20).splitlines()
    return next((line.strip() for line in reversed(lines) if re.search(pattern, line)), "")


def write_summary(done: Sequence[Done], out: Path, archive: Path) -> str:
    """Write what was done so far, for programs and for people; return the latter."""
    (out / "summary.json").write_text(json.dumps([asdict(one) for one in done], indent=1) + "\n")
    width = max(len(one.name) for one in done)
    lines = [f"{one.status:11} {one.seconds:6.1f} s  {one.name:{width}}  {one.line}"[:160] for one in done]
    counts: dict[str, int] = {}
    for one in done:
        counts[one.status] = counts.get(one.status, 0) + 1
    failures = len(records.read(out / records.FAILURES))
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines.append(f"{said}; {failures} failures in {records.FAILURES}; everything is in {archive.name}")
    text = "\n".join(lines) + "\n"
    (out / "summary.txt").write_text(text)
    return text


def pack(out: Path, archive: Path, limit: int = ARCHIVE_BYTES) -> list[str]:
    """Write the archive, small files first; return, and list in it, what does not fit into ``limit`` bytes."""
    files = sorted((path for path in out.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    kernels = out / "kernels"
    temporary = archive.with_name(f".{archive.name}.part")
    archive.parent.mkdir(parents=True, exist_ok=True)
    left, total = [], 0
    with tarfile.open(temporary, "w:gz", compresslevel=6) as tar:
        for path in files:
            size = path.stat().st_size
            if kernels in path.parents:
                continue  # the cache of compiled kernels
            total += size
            name = path.relative_to(out).as_posix()
            if total > limit:
                left.append(f"{name} ({size} bytes)")
            elif name != "left_out.txt":
                tar.add(path, name, recursive=False)
        if left:
            (out / "left_out.txt").write_text("\n".join(left) + "\n")
            tar.add(out / "left_out.txt", "left_out.txt")
    shutil.move(temporary, archive)
    return left
