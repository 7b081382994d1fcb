"""The plugin of pytest that runs one suite over `cute_ssm.compat`, in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import signal
import sys
import traceback
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cute_ssm import arch as archs
from peer_suites import sources, stand_ins
from peer_suites.outcomes import (
    FAILED,
    LEFT_OUT,
    NO_KERNEL,
    NOT_APPLICABLE,
    PASSED,
    SKIPPED,
    STALE,
    TOO_LARGE,
    TOO_LONG,
)
from peer_suites.suites import KERNEL, SUITES, Rule

OWN_FAILS = "the project's own kernel fails the same check, with the CPU's random numbers"


class TookTooLong(BaseException):
    """A case took longer than it may; nothing that a test catches."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", choices=sorted(SUITES), required=True)
    parser.addoption("--backend", required=True)
    parser.addoption("--arch", required=True)
    parser.addoption("--seconds", type=int, required=True, help="processor time of a case")
    parser.addoption("--report", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Run(config), "peer-suite")


class Run:
    """One run of a suite: what became of each case."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.getoption
        self.suite, self.backend, self.seconds = SUITES[option("--suite")], option("--backend"), option("--seconds")
        self.arch, self.report_file = archs.by_name(option("--arch")), option("--report")
        self.cases: dict[str, dict[str, Any]] = {}
        self.stack = contextlib.ExitStack()

    def pytest_sessionstart(self) -> None:
        self.suite.prepare(sources.FOLDER / self.suite.peer, self.arch)
        self.stack.enter_context(stand_ins.pretended_gpu(self.arch, sources.FOLDER))
        if importlib.util.find_spec("triton"):  # what the suite's own oracle may be written in
            from ptxsim.triton_hook import emulate_triton

            self.stack.enter_context(emulate_triton(int(self.arch.name[3:-1])))

    def pytest_sessionfinish(self) -> None:
        self.stack.close()
        self.write()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        every, seen = self.suite.every.get(self.backend, 1), defaultdict[str, int](int)
        light = {
            item: self.suite.light is not None and bool(re.search(self.suite.light, item.nodeid)) for item in items
        }
        has_light = {_test(item) for item in items if light[item]} if every > 1 else set()
        kept = []
        for item in items:
            rule = self.rule(item)
            if rule is not None and rule.error is None:
                self.note(item, NOT_APPLICABLE, rule.reason)
                continue
            test = _test(item)
            if test in has_light and not light[item]:
                self.note(item, LEFT_OUT, "lighter cases of the test are run")
                continue
            if seen[test] % every == 0:
                kept.append(item)
            else:
                self.note(item, LEFT_OUT, f"every {every}th case of a test is run")
            seen[test] += 1
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def rule(self, item: pytest.Item) -> Rule | None:
        return next((rule for rule in self.suite.rules if rule.of(item.nodeid)), None)

    def note(self, item: pytest.Item, outcome: str, reason: str = "", launches: int = 0) -> None:
        case = {"outcome": outcome, "reason": reason, "launches": launches}
        self.cases[item.nodeid.partition("::")[2]] = case
        if outcome not in (LEFT_OUT, NOT_APPLICABLE):
            self.write()

    def write(self) -> None:
        self.report_file.write_text(json.dumps(self.cases, indent=1))

    @contextlib.contextmanager
    def bounded(self) -> Iterator[None]:
        def stop(*_: Any) -> None:
            raise TookTooLong

        before = signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, self.seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        import ptxsim

        rule, launches = self.rule(item), 0
        try:
            with self.bounded(), contextlib.ExitStack() as stack:
                if self.suite.no_grad:
                    stack.enter_context(torch.no_grad())
                session = stack.enter_context(ptxsim.emulate(arch=self.arch.name)) if self.backend == KERNEL else None
                result = yield
                launches = len(session.launches) if session else 0
        except TookTooLong:
            self.note(item, TOO_LONG, f"{self.seconds} s")
            pytest.skip("took too long")
        except pytest.skip.Exception as skipped:
            self.note(item, SKIPPED, str(skipped.msg))
            raise
        except Exception as error:
            if isinstance(error, MemoryError) or "allocate memory" in str(error):
                self.note(item, TOO_LARGE)
                pytest.skip("too large")
            if rule is None and self.fails_with_its_own(item, error):
                self.note(item, NOT_APPLICABLE, OWN_FAILS)
                pytest.skip(OWN_FAILS)
            if rule is None or not re.search(str(rule.error), f"{type(error).__name__}: {error}"):
                self.note(item, FAILED, f"{type(error).__name__}: {str(error)[:300]}")
                raise
            self.note(item, NOT_APPLICABLE, rule.reason)
            pytest.skip(rule.reason)
        if rule is not None:
            self.note(item, STALE, rule.reason)
            pytest.fail(f"passes now: remove the rule {rule.cases!r}")
        self.note(item, PASSED if launches or self.backend != KERNEL else NO_KERNEL, launches=launches)
        return result

    def fails_with_its_own(self, item: pytest.Item, error: Exception) -> bool:
        """Return whether a case fails at the same line when the project's own functions run."""
        if self.suite.own is None:
            return False
        assert isinstance(item, pytest.Function)
        try:
            with pytest.MonkeyPatch.context() as patch, self.bounded():
                for name, function in self.suite.own().items():
                    patch.setattr(item.module, name, function)
                item.runtest()
        except (Exception, TookTooLong) as again:
            return type(again) is type(error) and _line(again, item) == _line(error, item)
        return False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        if call.when == "setup" and not report.passed:
            reason = str(call.excinfo.value) if call.excinfo else ""
            self.note(item, SKIPPED if report.skipped else FAILED, reason)
        return report


def _line(error: BaseException, item: pytest.Item) -> int | None:
    """Return the line of a case's file at which it failed."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == str(item.path)), None)


def _test(item: pytest.Item) -> str:
    """Return the test of which an item is a case."""
    return item.nodeid.partition("[")[0]


if __name__ == "__main__":
    sys.exit("a plugin of pytest: see run.py")
