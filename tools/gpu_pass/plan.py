"""The steps of a pass, most valuable first, and what each is worth of the time."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import gpu_calls

from cute_ssm import workloads

ROOT = Path(__file__).resolve().parents[2]
SECONDS = "{seconds}"  # in a command: what the step may take
PARTS = (1, 2)
EMULATED = Path(__file__).with_name("emulated.npz")  # made by `gpu_check.py emulate`, before
WHERE = ("usr/local/cuda*/bin/", "usr/local/cuda*/compute-sanitizer/", "opt/nvidia/nsight-compute/*/")
PROFILED = workloads.OPERATORS[:3]


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes
    ----------
    command : tuple of str
        A word may contain `SECONDS`.
    weight : float
        Share of the time that is left, beside the weights of the steps behind it.
    least_s, most_s : float
        With less time left it is skipped; more it never gets.
    needs : str
        A program without which it is left out; in the command it stands for its path.
    file : Path, optional
        A file without which it is left out.
    items : str
        Name of the file of items that it writes; such a step is started again behind an item that ended it.
    last : str
        Pattern of the line of its log that the summary shows.
    """

    name: str
    part: int
    command: tuple[str, ...]
    weight: float
    least_s: float = 3.0
    most_s: float = float("inf")
    needs: str = ""
    file: Path | None = None
    items: str = ""
    last: str = r"\S"


def located(program: str) -> str | None:
    """Return the path of a program, also of one that is installed beside CUDA and not on the path."""
    found = [
        shutil.which(program),
        *(str(path) for pattern in WHERE for path in sorted(Path("/").glob(pattern + program))),
    ]
    return next((path for path in reversed(found) if path and os.access(path, os.X_OK)), None)


def steps(out: Path, rehearse: bool = False, jobs: int = 4) -> list[Step]:
    """Return the steps of both parts.

    Parameters
    ----------
    out : Path
        Folder of the results.
    rehearse : bool
        Sizes and repeats are small; nothing else changes.
    jobs : int
        Processes of tests.
    """
    python = sys.executable
    own = (python, str(ROOT / "tools" / "gpu_check.py"), "step")
    more = ("--out", str(out), *(("--rehearse",) if rehearse else ()))

    def items(name: str, part: int, weight: float, least_s: float, most_s: float = float("inf")) -> Step:
        command = (*own, name, *more, "--seconds", SECONDS)
        return Step(name, part, command, weight, least_s, most_s, items=name)

    def around(program: str, tool: str, part: int, last: str) -> Step:
        command = (program, "--tool", tool, "--error-exitcode", "9", *own, "sanitized", *more, "--name", tool)
        step = Step(tool, part, (*command, "--seconds", SECONDS), 2.0, 30.0, 75.0, needs=program, items=tool, last=last)
        return step

    found = [
        Step("environment", 1, (python, "-m", "cute_ssm", "env"), 0.5, 30.0, last=r"nothing is wrong|BROKEN|note:"),
        Step("driver", 1, ("nvidia-smi", "-q"), 0.3, needs="nvidia-smi", last=r"Product Name"),
        items("smoke", 1, 4.0, 15.0, 90.0),
        items("launching", 1, 3.0, 15.0, 60.0),
        around("compute-sanitizer", "memcheck", 1, "ERROR SUMMARY"),
        replace(items("emulated", 1, 2.0, 12.0, 45.0), file=EMULATED),
        items("times", 1, 6.0, 25.0),
        items("arithmetic", 1, 2.0, 12.0, 45.0),
        *(profile(op, own, more) for op in PROFILED),
        Step("tests", 2, tests(out, rehearse, jobs), 5.0, 40.0, last=r"\d+ (passed|failed|error)"),
        items("tuning", 2, 3.0, 20.0),
        around("compute-sanitizer", "racecheck", 2, "RACECHECK SUMMARY"),
        around("compute-sanitizer", "initcheck", 2, "ERROR SUMMARY"),
        items("times-more", 2, 3.0, 25.0),
    ]
    return found


def profile(op: str, own: tuple[str, ...], more: tuple[str, ...]) -> Step:
    """Return the profile of one launch of an operator's kernel, whose log is the text."""
    options = ("--set", "full", "--page", "details", "--clock-control", "none", "--launch-count", "1")
    options += ("--kernel-name", "regex:cute_ssm|cutlass")
    command = ("ncu", *options, *own, "one", *more, "--name", op, "--seconds", SECONDS)
    return Step(f"ncu {op}", 2, command, 1.0, 15.0, 30.0, needs="ncu", last=r"Duration|==ERROR==|==WARNING==")


def tests(out: Path, rehearse: bool, jobs: int) -> tuple[str, ...]:
    """Return the command of the tests; a few of the first file to rehearse."""
    plugins = ("no:cacheprovider", "xdist", "hypothesispytest", "gpu_pass.pytest_records")
    command = [sys.executable, "-m", "pytest", "--gpu", "-q", *(word for name in plugins for word in ("-p", name))]
    command += ["--pass-out", str(out), f"--junitxml={out / 'tests.xml'}", "-n", str(jobs)]
    command += ["--max-worker-restart=40", "-o", "faulthandler_timeout=60"]  # the log names a test that hangs
    command += ["-k"]
    command += [f"results_are_those and {workloads.OPERATORS[0]}" if rehearse else gpu_calls.SELECTED]
    return (*command, *gpu_calls.tests()[: 1 if rehearse else None])


def of_parts(found: Iterable[Step], part: int | None) -> list[Step]:
    """Return the steps of a part, or all."""
    return [step for step in found if part is None or step.part == part]
