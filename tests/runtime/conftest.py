"""What tests of the runtime share."""

from __future__ import annotations

import logging

import processes
import pytest

from cute_ssm.runtime import toolchain


@pytest.fixture
def warnings(caplog):
    """Return a function that lists the warnings that have been logged."""
    caplog.set_level(logging.INFO, logger="cute_ssm")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.fixture
def spawn(settings, tmp_path, monkeypatch):
    """Start a process on the cache folder of this test: ``spawn(script, *arguments)``; see `processes.start`."""
    settings(CACHE_DIR=tmp_path / "cache")
    monkeypatch.setattr(toolchain, "sources_changed", lambda: False)
    sources = str(toolchain.description()["sources"])
    running = []

    def start(script, *arguments):
        running.append(processes.start(script, sources, *arguments))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()
