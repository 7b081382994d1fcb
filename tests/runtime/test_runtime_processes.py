"""One cache folder, several real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from paths import SUPPORT
from tiny_spec import TinyConfig, TinySpec

from cute_ssm import arch, runtime
from cute_ssm.runtime import toolchain
from cute_ssm.runtime.store import Key, Store

DEADLINE_S = 120

PROLOGUE = """
import os, sys, time
from pathlib import Path
from tiny_spec import TinySpec
import tiny_kernel
from cute_ssm import arch, runtime
from cute_ssm.runtime import compiler, toolchain
toolchain.sources_digest = lambda: sys.argv[3]  # the same for all, even if somebody edits the sources meanwhile
toolchain.sources_changed = lambda: False
real = compiler.compile_kernel
folder = Path(sys.argv[1])

def slow(*key):
    (folder / f"compiling-{os.getpid()}").touch()
    time.sleep(float(sys.argv[2]))
    return real(*key)

def never(*key):
    raise SystemExit("compiled although the object was on disk")

compiler.compile_kernel = slow

def check(function):
    try:
        function()
    except TypeError as error:
        assert "Expects 2 param" in str(error), error
        print("callable")
"""

RACE = """
(folder / f"ready-{os.getpid()}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
check(runtime.get(TinySpec(), arch=arch.SM_90A))
"""


@pytest.fixture
def spawn(settings, tmp_path, monkeypatch):
    """Start ``spawn(script, seconds a compile is drawn out)`` on the cache of this test."""
    settings(CACHE_DIR=tmp_path / "cache")
    monkeypatch.setattr(toolchain, "sources_changed", lambda: False)
    sources = str(toolchain.description()["sources"])
    running = []

    def start(script, compile_s=0.0):
        path = os.pathsep.join([str(SUPPORT), *sys.path])
        process = subprocess.Popen(
            [sys.executable, "-c", PROLOGUE + script, str(tmp_path), str(compile_s), sources],
            env={**os.environ, "PYTHONPATH": path, "CUTE_SSM_LOG": "compile"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def wait_for(folder, pattern, count):
    deadline = time.monotonic() + DEADLINE_S
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"{pattern} did not appear"
        time.sleep(0.01)


def finish(process):
    out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out) == (0, "callable\n"), err
    return err


@pytest.mark.wide
def test_two_processes_racing_for_one_kernel(spawn, tmp_path):
    racers = [spawn(RACE, 0.5) for _ in range(2)]
    wait_for(tmp_path, "ready-*", 2)
    (tmp_path / "go").touch()
    logs = "".join(map(finish, racers))
    assert len(list((tmp_path / "cache").rglob("*.o"))) == 1
    assert len(list(tmp_path.glob("compiling-*"))) == 1, "compiled once"
    assert logs.count("compiled tiny-float32") == 1
    assert logs.count("loaded ") == 1
    left = [path.name for path in (tmp_path / "cache").rglob(".*")]
    assert left == [], "neither temporary nor quarantined files"


def test_a_second_process_loads_without_compiling(spawn, tmp_path):
    runtime.get(TinySpec(), arch=arch.SM_90A)
    logs = finish(spawn("compiler.compile_kernel = never\ncheck(runtime.get(TinySpec(), arch=arch.SM_90A))"))
    assert "loaded " in logs


def test_a_process_killed_while_compiling_does_not_block_the_next(spawn, tmp_path):
    victim = spawn("check(runtime.get(TinySpec(), arch=arch.SM_90A))", 3 * DEADLINE_S)
    wait_for(tmp_path, "compiling-*", 1)
    path = Store(tmp_path / "cache").path(Key(TinySpec(), TinyConfig(), arch.SM_90A))
    assert locked(path.with_suffix(".lock")), "the victim holds the lock"
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    start = time.monotonic()
    runtime.get(TinySpec(), arch=arch.SM_90A)
    assert time.monotonic() - start < DEADLINE_S / 2
    assert path.is_file()


def locked(path):
    import fcntl

    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
