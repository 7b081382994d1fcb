"""One cache folder, several real processes."""

from __future__ import annotations

import signal
import time

import pytest
from processes import DEADLINE_S, finish, wait_for
from tiny_spec import TinyConfig, TinySpec

from cute_ssm import arch, runtime
from cute_ssm.runtime.store import Key, Store

PROLOGUE = """
import os, time
from pathlib import Path
from tiny_spec import TinySpec
import tiny_kernel
from cute_ssm import arch, runtime
from cute_ssm.runtime import compiler
real = compiler.compile_kernel
folder = Path(sys.argv[2])

def slow(*key):
    (folder / f"compiling-{os.getpid()}").touch()
    time.sleep(float(sys.argv[3]))
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
def python(spawn, tmp_path):
    """Start ``python(script, seconds by which each compile is drawn out)``."""
    return lambda script, compile_s=0.0: spawn(PROLOGUE + script, tmp_path, compile_s)


def log_of(process):
    out, log = finish(process)
    assert out == "callable\n", log
    return log


@pytest.mark.wide
def test_two_processes_racing_for_one_kernel(python, tmp_path):
    racers = [python(RACE, 0.5) for _ in range(2)]
    wait_for(tmp_path, "ready-*", 2)
    (tmp_path / "go").touch()
    logs = "".join(map(log_of, racers))
    assert len(list((tmp_path / "cache").rglob("*.o"))) == 1
    assert len(list(tmp_path.glob("compiling-*"))) == 1, "compiled once"
    assert logs.count("compiled tiny-float32") == 1
    assert logs.count("loaded ") == 1
    left = [path.name for path in (tmp_path / "cache").rglob(".*")]
    assert left == [], "neither temporary nor quarantined files"


def test_a_second_process_loads_without_compiling(python, tmp_path):
    runtime.get(TinySpec(), arch=arch.SM_90A)
    logs = log_of(python("compiler.compile_kernel = never\ncheck(runtime.get(TinySpec(), arch=arch.SM_90A))"))
    assert "loaded " in logs


def test_a_process_killed_while_compiling_does_not_block_the_next(python, tmp_path):
    victim = python("check(runtime.get(TinySpec(), arch=arch.SM_90A))", 3 * DEADLINE_S)
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
