"""Emulated kernels on disk: what a second process starts with, and every way an entry can be damaged."""

from __future__ import annotations

import hashlib
import json
import logging

import pytest
import step_cases
import torch
from bits import equal
from processes import finish, wait_for
from tiny_spec import TinyConfig, TinySpec

import cute_ssm
import ptxsim
from cute_ssm import arch, runtime
from cute_ssm.__main__ import main
from cute_ssm.runtime import store, toolchain

SOURCES_CHANGED = toolchain.sources_changed


@pytest.fixture
def cache(settings, tmp_path, monkeypatch):
    """An empty cache folder, and nothing in memory; nobody edits the sources meanwhile."""
    monkeypatch.setattr(toolchain, "sources_changed", lambda: False)
    settings(CACHE_DIR=tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def compiled(monkeypatch):
    """Kernels that have been compiled for the emulator, in order."""
    done = []
    real = ptxsim.compile

    def counting(kernel, *fakes, **options):
        done.append(kernel)
        return real(kernel, *fakes, **options)

    monkeypatch.setattr(ptxsim, "compile", counting)
    return done


def entries(folder):
    return sorted(folder.rglob(f"*{store.EMULATED}"))


def works(kernel, factor=2.0):
    """Whether a tiny kernel computes, checks its arguments, and knows PTX and registers."""
    x, out = torch.arange(300.0), torch.zeros(300)
    with ptxsim.emulate(arch=kernel.arch, racecheck=True, initcheck=True) as session:
        kernel(x, out)
        with pytest.raises(TypeError, match=r"x: expected dtype Float32, got torch\.float64"):
            kernel(x.double(), out)
        with pytest.raises(ValueError, match=r"out\.shape\[0\] is 299, but must equal x\.shape\[0\], which is 300"):
            kernel(x, out[1:])
    equal(out, factor * x)
    assert session.launches[-1].grid == (3, 1, 1)
    assert ".entry" in kernel.ptx and kernel.kernels[0].registers > 0
    return True


def test_memory_then_disk(cache, compiled):
    first = runtime.emulated(TinySpec(), arch=arch.SM_90A)
    assert works(first) and runtime.emulated(TinySpec(), TinyConfig(), arch.SM_90A) is first
    runtime.forget()
    again = runtime.emulated(TinySpec(), arch=arch.SM_90A)
    assert again is not first and works(again)
    assert (again.ptx, again.kernels) == (first.ptx, first.kernels)
    assert len(compiled) == 1, "the second one came from disk"
    assert works(runtime.emulated(TinySpec(factor=3.0), arch=arch.SM_90A), 3.0)
    assert works(runtime.emulated(TinySpec(), TinyConfig(128), arch.SM_100A))
    assert len(compiled) == len(entries(cache)) == 3, "specs and targets have entries of their own"


def test_the_disk_can_be_switched_off(cache, settings, compiled):
    settings(CACHE="0")
    for _ in range(2):
        runtime.forget()
        assert works(runtime.emulated(TinySpec(), arch=arch.SM_90A))
    assert len(compiled) == 2
    assert not cache.exists()


DAMAGES = ["garbage", "truncated", "empty", "another pickle", "no record", "bad record", "bad folder", "no folder"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_named_and_compiled_again(cache, compiled, warnings, damage):
    runtime.emulated(TinySpec(), arch=arch.SM_90A)
    (path,) = entries(cache)
    good, record, meta = path.read_bytes(), store.record_path(path), path.with_name(store.META)
    if damage == "no record":
        record.unlink()
    elif damage == "bad record":
        record.write_text("{")
    elif damage == "bad folder":
        meta.write_text("no json")
    elif damage == "no folder":
        meta.unlink()
    elif damage == "another pickle":
        import pickle
        import zlib

        bad = zlib.compress(pickle.dumps([1]))
        path.write_bytes(bad)
        record.write_text(json.dumps({"sha256": hashlib.sha256(bad).hexdigest()}))
    else:
        path.write_bytes({"truncated": good[:200], "empty": b""}.get(damage, b"garbage"))
    for attempt in range(2):
        runtime.forget()
        assert works(runtime.emulated(TinySpec(), arch=arch.SM_90A))
        assert len(compiled) == 2, f"attempt {attempt}: it is compiled again, once"
    assert len(warnings()) == 1
    assert str(path) in warnings()[0] and "compiled again" in warnings()[0]
    assert len(list(path.parent.glob(".bad-*"))) == 1


def test_an_entry_for_gpus_and_one_for_the_emulator_stand_side_by_side(cache, compiled, warnings):
    runtime.get(TinySpec(), arch=arch.SM_90A)
    runtime.emulated(TinySpec(), arch=arch.SM_90A)
    runtime.forget()
    runtime.get(TinySpec(), arch=arch.SM_90A)
    assert works(runtime.emulated(TinySpec(), arch=arch.SM_90A))
    assert len(compiled) == 1 and warnings() == []


def test_another_emulator_has_entries_of_its_own(cache, compiled, monkeypatch):
    runtime.emulated(TinySpec(), arch=arch.SM_90A)
    monkeypatch.setattr(ptxsim, "image_format", lambda: "0123456789ab")
    runtime.forget()
    runtime.emulated(TinySpec(), arch=arch.SM_90A)
    assert len(compiled) == len(entries(cache)) == 2


def test_sources_that_are_newer_than_the_import_are_not_stored(cache, warnings, monkeypatch):
    monkeypatch.setattr(toolchain, "sources_changed", SOURCES_CHANGED)
    monkeypatch.setattr(cute_ssm, "_IMPORTED", 0.0)
    assert works(runtime.emulated(TinySpec(), arch=arch.SM_90A))
    assert entries(cache) == []
    assert ["sources of cute_ssm have changed" in text for text in warnings()] == [True]


def test_ls_and_clear_know_them(cache, capsys):
    runtime.get(TinySpec(), arch=arch.SM_90A)
    runtime.emulated(TinySpec(), arch=arch.SM_90A)
    main(["cache", "ls"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "2 kernels" in lines[-1]
    assert sum(line.endswith(" (emulator)") for line in lines) == 1
    main(["cache", "ls", "--json"])
    assert len(json.loads(capsys.readouterr().out)) == 1, "one spec, to warm up once"
    assert main(["cache", "clear"]) == 0
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_calls_are_logged_on_every_way(cache, settings, caplog):
    log = logging.getLogger("cute_ssm")
    level = log.level
    call = step_cases.arguments(step_cases.Case())
    try:
        settings(LOG="calls", CACHE_DIR=cache)
        cute_ssm.selective_state_update(**call)
        reference = caplog.text
        caplog.clear()
        with ptxsim.emulate(arch="sm_90a"):
            cute_ssm.selective_state_update(**call)
    finally:
        log.setLevel(level)
    assert "no kernel for selective_state_update" in reference and "reference: selective_state_update" in reference
    assert "float32[" in reference or "bfloat16[" in reference
    assert "for the emulator of sm_90a in" in caplog.text
    assert "emulator sm_90a: selective_state_update" in caplog.text


# ------------------------------------------------------------------------------------------------------- two processes
PROCESS = """
import hashlib, os, time
from pathlib import Path
import torch, ptxsim, step_cases, cute_ssm
import cutlass.cute as cute
from cute_ssm import runtime
folder, how = Path(sys.argv[2]), sys.argv[3]
if how == "never":
    def never(*_, **__):
        raise SystemExit("compiled although the kernel was on disk")
    cute.compile = ptxsim.compile = never
elif how == "race":
    real = ptxsim.compile
    def slow(*args, **options):
        (folder / f"compiling-{os.getpid()}").touch()
        time.sleep(0.5)
        return real(*args, **options)
    ptxsim.compile = slow
    (folder / f"ready-{os.getpid()}").touch()
    while not (folder / "go").exists():
        time.sleep(0.001)
call = step_cases.arguments(step_cases.Case())
with ptxsim.emulate(arch="sm_90a", racecheck=True) as session:
    cute_ssm.selective_state_update(**call)
launch = session.launches[-1]
digest = hashlib.sha256(call["state"].contiguous().view(torch.uint8).numpy().tobytes())
digest.update(call["out"].contiguous().view(torch.uint8).numpy().tobytes())
print(launch.grid, launch.block, launch.smem_total, session.functions[0].kernels, digest.hexdigest())
"""


@pytest.mark.wide
def test_processes_that_race_compile_once_and_a_later_one_never(spawn, tmp_path):
    racers = [spawn(PROCESS, tmp_path, "race") for _ in range(2)]
    wait_for(tmp_path, "ready-*", 2)
    (tmp_path / "go").touch()
    (first, log), (second, other) = map(finish, racers)
    assert first == second, "launch, registers and results are the same"
    assert len(list(tmp_path.glob("compiling-*"))) == 1
    assert (log + other).count("loaded ") == 1
    third, log = finish(spawn(PROCESS, tmp_path, "never"))
    assert third == first
    assert "compiled" not in log and "loaded " in log
