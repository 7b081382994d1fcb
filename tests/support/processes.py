"""Processes that share the cache folder of a test."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from paths import SUPPORT

DEADLINE_S = 120
SAME_SOURCES = """
import sys
from cute_ssm.runtime import toolchain
toolchain.sources_digest = lambda: sys.argv[1]  # the same for all, even if somebody edits the sources meanwhile
toolchain.sources_changed = lambda: False
"""


def start(script: str, sources: str, *arguments: object) -> subprocess.Popen[str]:
    """Start Python on a script that takes `sources` for the digest of the toolchain; arguments: ``sys.argv[2:]``."""
    return subprocess.Popen(
        [sys.executable, "-c", SAME_SOURCES + script, sources, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path]), "CUTE_SSM_LOG": "compile"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Wait for a process that must succeed; its output and its log."""
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, err
    return out, err


def wait_for(folder: Path, pattern: str, count: int) -> None:
    """Wait until a folder has so many files."""
    deadline = time.monotonic() + DEADLINE_S
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"{pattern} did not appear"
        time.sleep(0.01)
