"""Seeded faults: each is put into a copy of the project, whose tests must then fail.

``python tools/faults.py [--only TEXT] [--jobs N]`` runs the faults of ``tests/faults``: it copies the project, sees
that the tests named by them pass, applies one fault after the other, and runs the tests that must catch it.  The exit
status is 1 if fewer than 95 % are caught, and 2 if a fault does not apply or its tests do not pass without it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "faults"
COPIED = (
    "cute_ssm",
    "tools",
    "tests",
    "pyproject.toml",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs",
    "examples",
    "mkdocs.yml",
    ".ci",
)
LEFT_OUT = ("__pycache__", ".pytest_cache")
ENOUGH = 0.95
TIMEOUT_S = 600  # of the tests of one fault
TEST_S = 60  # of one test, where there are many
TESTS_FAILED = 1  # pytest's exit status


class Fault(NamedTuple):
    """One change of one file that tests must notice.

    ``old``, which occurs once in ``file``, or once behind the first ``after``, becomes ``new``.  ``tests``: node ids of
    pytest, of which one must fail, all of them cheap.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    after: str = ""


class Applied(Exception):
    """A fault that does not apply."""


class Outcome(NamedTuple):
    """What became of a fault: "caught", "survived", or why its tests say nothing."""

    fault: Fault
    result: str
    seconds: float
    output: str


def catalogue(folder: Path = FOLDER) -> dict[str, list[Fault]]:
    """The faults by area: ``FAULTS`` of each module of the folder."""
    found = {}
    for path in sorted(folder.glob("[a-z]*.py")):
        if path.name.startswith("test_"):
            continue
        spec = importlib.util.spec_from_file_location(f"faults_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[path.stem] = [Fault(*fault) for fault in module.FAULTS]
    return found


def changed(fault: Fault, text: str) -> str:
    """The text of the fault's file with the fault in it.

    Raises
    ------
    Applied
        If the text to replace is not there, or not once.
    """
    start = 0
    if fault.after:
        start = text.find(fault.after)
        if start < 0:
            raise Applied(f"{fault.name}: {fault.file} has no {fault.after!r}")
        start += len(fault.after)
    count = text.count(fault.old, start)
    if count != 1 and not (fault.after and count):
        raise Applied(f"{fault.name}: {fault.file} has {count} times, not once, {fault.old!r}")
    if fault.old == fault.new:
        raise Applied(f"{fault.name} changes nothing")
    at = text.index(fault.old, start)
    return text[:at] + fault.new + text[at + len(fault.old) :]


@contextlib.contextmanager
def copy() -> Iterator[Path]:
    """A copy of the project in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        for entry in COPIED:
            source, target = ROOT / entry, folder / entry
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns(*LEFT_OUT))
            elif source.exists():
                shutil.copy2(source, target)
        yield folder


class Tester:
    """Runs pytest in copies, each time in a process forked from one that has imported what no fault changes."""

    def __init__(self) -> None:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("CUTE_SSM_", "PYTEST_"))
        }
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def __enter__(self) -> Tester:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # the end of its input ends it

    def run(self, folder: Path, tests: Iterable[str], first: bool) -> tuple[int, str]:
        """(exit status, output) of pytest on node ids in a copy; ``first``: stop at the first failure."""
        arguments = ["-q", "-p", "no:cacheprovider", "-m", "slow or not slow", "--tb=line", *(["-x"] if first else [])]
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the process that runs tests has no pipes")
        tests = list(tests)
        limit = TIMEOUT_S + TEST_S * len(tests)
        print(json.dumps([str(folder), [*arguments, *tests], limit]), file=self.process.stdin, flush=True)
        reply = self.process.stdout.readline()
        if not reply:
            raise RuntimeError("the process that runs tests has ended")
        status, output = json.loads(reply)
        return status, output


def serve() -> None:
    """Run the tests that standard input names, line by line; see `Tester`."""
    replies = os.fdopen(os.dup(1), "w")
    for module in ("numpy", "torch", "pytest", "cutlass.cute"):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    for line in sys.stdin:
        folder, arguments, limit = json.loads(line)
        with tempfile.TemporaryFile("w+") as file:
            child = os.fork()
            if child == 0:
                in_copy(folder, arguments, file.fileno())
            status = wait(child, limit)
            file.seek(0)
            try:
                print(json.dumps([status, file.read()]), file=replies, flush=True)
            except BrokenPipeError:  # nobody waits for it any more
                return


def in_copy(folder: str, arguments: list[str], output: int) -> NoReturn:
    """Run pytest in a copy, and end this process with its status."""
    status = 3
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        paths = [os.path.join(folder, path) for path in ("", "tools", "tools/ptxsim", "tools/gpumodel")]
        os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "CUTE_SSM_CACHE_DIR": os.path.join(folder, "kernels")}
        sys.path[:1] = paths  # in place of this file's folder
        status = int(sys.modules["pytest"].main(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def wait(child: int, limit: float) -> int:
    """The exit status of a process; -1 if it had to be ended after `limit` seconds."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def attempt(fault: Fault, folder: Path, tester: Tester) -> Outcome:
    """Put a fault into a copy, run its tests, and take it out again."""
    path, start = folder / fault.file, time.monotonic()
    before = path.read_text(encoding="utf-8")
    try:
        path.write_text(changed(fault, before), encoding="utf-8")
        status, output = tester.run(folder, fault.tests, first=True)
    finally:
        path.write_text(before, encoding="utf-8")
    result = {TESTS_FAILED: "caught", 0: "survived"}.get(status, f"pytest ended with status {status}")
    return Outcome(fault, result, time.monotonic() - start, output)


def attempts(faults: Sequence[Fault], jobs: int) -> Iterator[Outcome]:
    """The outcomes of all faults, as they come; every job has a copy of its own."""
    waiting: queue.SimpleQueue[Fault] = queue.SimpleQueue()
    ended: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
    for fault in faults:
        waiting.put(fault)

    def work() -> None:
        try:
            with copy() as folder, Tester() as tester, contextlib.suppress(queue.Empty):
                while True:
                    ended.put(attempt(waiting.get_nowait(), folder, tester))
        except BaseException as error:  # told by the main thread
            ended.put(error)

    for _ in range(min(jobs, len(faults))):
        threading.Thread(target=work, daemon=True).start()
    for _ in faults:
        outcome = ended.get()
        if isinstance(outcome, BaseException):
            raise outcome
        yield outcome


def passing(faults: Sequence[Fault]) -> str:
    """What is wrong with the tests of faults where there is no fault; nothing if they pass."""
    tests = dict.fromkeys(test for fault in faults for test in fault.tests)
    with copy() as folder, Tester() as tester:
        status, output = tester.run(folder, tests, first=False)
    if status == 0 and " skipped" not in output.splitlines()[-1]:
        return ""
    return f"without a fault, these tests do not all pass:\n{output[-4000:]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose area or name has this text")
    parser.add_argument("--jobs", type=int, default=1, help="copies that are worked on at once")
    parser.add_argument("--list", action="store_true", help="say what would run")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--unchecked", action="store_true", help="do not run the tests without a fault first")
    options = parser.parse_args(arguments)
    if options.serve:
        serve()
        return 0
    chosen = [
        fault._replace(name=f"{area}: {fault.name}")
        for area, faults in catalogue().items()
        for fault in faults
        if options.only in f"{area}: {fault.name}"
    ]
    if not chosen:
        print(f"no fault has {options.only!r} in its area or name", file=sys.stderr)
        return 2
    try:
        for fault in chosen:
            changed(fault, (ROOT / fault.file).read_text(encoding="utf-8"))
    except (Applied, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        for fault in chosen:
            print(f"{fault.name}  ({fault.file}; {' '.join(fault.tests)})")
        return 0
    problem = "" if options.unchecked else passing(chosen)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    caught, broken = 0, 0
    for outcome in attempts(chosen, max(1, options.jobs)):
        caught += outcome.result == "caught"
        broken += outcome.result not in ("caught", "survived")
        print(f"{outcome.result:<9} {outcome.seconds:6.1f} s  {outcome.fault.name}", flush=True)
        if outcome.result != "caught":
            print("\n".join(f"    {line}" for line in outcome.output.splitlines()[-8:]), flush=True)
    print(f"{caught} of {len(chosen)} caught ({caught / len(chosen):.0%})")
    return 2 if broken else int(caught < ENOUGH * len(chosen))


if __name__ == "__main__":
    sys.exit(main())
