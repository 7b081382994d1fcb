"""A plugin of pytest: failures are written as they happen, and a worker whose device is lost ends.

A test that asks for the compiler is skipped where there is none.

    pytest -p gpu_pass.pytest_records --pass-out FOLDER

What failed is known then even if the machine is taken away in the middle of a run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gpu_pass import records

STEP = "tests"
COMPILER = "cutlass"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the option."""
    parser.addoption("--pass-out", metavar="FOLDER", help="write failures there as they happen")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    """Write a failure; end a worker that can go on no more, for which xdist starts another."""
    report = yield
    error = call.excinfo.value if report.failed and call.excinfo is not None else None
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == COMPILER:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1], f"no compiler here: {error}")
    folder = item.config.getoption("--pass-out")
    if report.failed and folder and call.excinfo is not None:
        words = f"{call.excinfo.typename}: {call.excinfo.value}"[:2000]
        trace = f"{report.longreprtext}\n" + "\n".join("\n".join(part) for part in report.sections)
        records.fail(Path(folder), STEP, item.nodeid, words, trace[-8000:], when=call.when)
        if not records.device_is_alive():
            records.fail(Path(folder), STEP, item.nodeid, "the device is lost to this process: it ends")
            if hasattr(item.config, "workerinput"):
                os._exit(records.STICKY)
            pytest.exit("the device is lost to this process", records.STICKY)
    return report
