"""`runtime.get`: memory, disk, bundle, compiler; and every way a disk can fail."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import threading

import pytest
from bits import equal
from tiny_spec import TinyConfig, TinySpec

import cute_ssm
from cute_ssm import arch, runtime
from cute_ssm.errors import CompileError, CuteSsmError, UnsupportedArchError, UnsupportedSpecError
from cute_ssm.runtime import compiler, store, toolchain

SM_90A = arch.SM_90A
SOURCES_CHANGED = toolchain.sources_changed


@pytest.fixture
def cache(settings, tmp_path, monkeypatch):
    """An empty cache folder, and nothing in memory; nobody edits the sources meanwhile."""
    monkeypatch.setattr(toolchain, "sources_changed", lambda: False)
    folder = tmp_path / "cache"
    settings(CACHE_DIR=folder)
    return folder


@pytest.fixture
def compiled(monkeypatch):
    """What has been compiled, in order."""
    done = []
    real = compiler.compile_kernel

    def counting(spec, config, target):
        done.append((spec, config, target.name))
        return real(spec, config, target)

    monkeypatch.setattr(compiler, "compile_kernel", counting)
    return done


def callable_(function):
    """Whether a function is the tiny kernel: it refuses a wrong call by its own argument names, without a GPU."""
    with pytest.raises(TypeError, match=r"Expects 2 param.*x: Tensor\(\[n0\], float32\), out: Tensor"):
        function()
    return True


def objects(folder):
    return sorted(folder.rglob("*.o"))


def test_memory_then_disk(cache, compiled):
    import torch
    import tvm_ffi

    function = runtime.get(TinySpec(), arch=SM_90A)
    assert type(function) is tvm_ffi.Function
    assert callable_(function)
    with pytest.raises((TypeError, ValueError), match="argument #0"):
        function(torch.zeros(4, dtype=torch.float64), torch.zeros(4))
    assert runtime.get(TinySpec(), arch=SM_90A) is function
    assert runtime.get(TinySpec(), TinyConfig(), SM_90A) is function, "the default config is one key with its value"
    assert compiled == [(TinySpec(), TinyConfig(), "sm_90a")]

    runtime.forget()
    again = runtime.get(TinySpec(), arch=SM_90A)
    assert again is not function
    assert type(again) is tvm_ffi.Function
    assert callable_(again)
    assert len(compiled) == 1, "the second one came from disk"


def test_specs_configs_and_targets_have_objects_of_their_own(cache, compiled):
    runtime.get(TinySpec(), arch=SM_90A)
    runtime.get(TinySpec(factor=3.0), arch=SM_90A)
    runtime.get(TinySpec(), TinyConfig(64), SM_90A)
    runtime.get(TinySpec(), arch=arch.SM_100A)
    assert len(compiled) == len(objects(cache)) == 4


def test_layout_and_records(cache):
    runtime.get(TinySpec(factor=5.0), arch=SM_90A)
    (path,) = objects(cache)
    key = store.Key(TinySpec(factor=5.0), TinyConfig(), SM_90A)
    import cute_ssm

    assert path.relative_to(cache).parts == (
        *(cute_ssm.__version__, "sm_90a", toolchain.stack(), f"tiny-float32-{key.digest}.o"),
    )
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["spec"] == {"type": "TinySpec", "dtype": "float32", "factor": 5.0}
    assert record["config"] == {"type": "TinyConfig", "threads": 128}
    assert (record["arch"], record["size"]) == ("sm_90a", path.stat().st_size)
    meta = json.loads((path.parent / "meta.json").read_text())
    assert meta["dsl"]["nvidia-cutlass-dsl"].startswith("4.8.")
    assert meta == toolchain.description()


def test_the_disk_can_be_switched_off(cache, settings, compiled):
    settings(CACHE="0")
    assert callable_(runtime.get(TinySpec(), arch=SM_90A))
    runtime.forget()
    runtime.get(TinySpec(), arch=SM_90A)
    assert len(compiled) == 2
    assert not cache.exists()


def bit_rot(data):
    """The object with one bit changed in the machine code of the GPU, which still loads."""
    middle = (data.rindex(b"\x7fELF") + len(data)) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage", ["garbage", "truncated", "empty", "bit rot", "recorded garbage", "no record", "bad record"]
)
def test_a_damaged_object_is_replaced(cache, compiled, warnings, damage):
    runtime.get(TinySpec(), arch=SM_90A)
    (path,) = objects(cache)
    good = path.read_bytes()
    record = path.with_suffix(".json")
    if damage == "no record":
        record.unlink()
    elif damage == "bad record":
        record.write_text("{")
    else:
        bad = {"truncated": good[:2000], "empty": b"", "bit rot": bit_rot(good)}.get(damage, b"garbage" * 100)
        path.write_bytes(bad)
        if damage == "recorded garbage":
            record.write_text(json.dumps({"sha256": hashlib.sha256(bad).hexdigest()}))
    for attempt in range(2):
        runtime.forget()
        assert callable_(runtime.get(TinySpec(), arch=SM_90A))
        assert len(compiled) == 2, f"attempt {attempt}: it is compiled again, once"
    assert path.read_bytes() == good
    quarantined = list(path.parent.glob(".bad-*"))
    assert len(warnings()) == 1
    assert str(path) in warnings()[0] and "is compiled again" in warnings()[0]
    assert [each.name for each in quarantined] == [f".bad-{path.name}"]


@pytest.mark.parametrize("how", ["prepare", "no lock"])
def test_a_damaged_object_is_named_on_every_way_to_it(cache, compiled, warnings, monkeypatch, how):
    runtime.get(TinySpec(), arch=SM_90A)
    (path,) = objects(cache)
    path.write_bytes(b"garbage")
    runtime.forget()
    if how == "prepare":
        assert runtime.prepare(TinySpec(), TinyConfig(), SM_90A)
    else:
        monkeypatch.setattr(store.Store, "_locked", lambda *_: None)
        assert callable_(runtime.get(TinySpec(), arch=SM_90A))
    assert len(compiled) == 2
    assert [str(path) in text and "is compiled again" in text for text in warnings()] == [True]


def test_an_object_under_a_wrong_name_is_not_used(cache, compiled, warnings):
    runtime.get(TinySpec(), arch=SM_90A)
    runtime.get(TinySpec(factor=3.0), arch=SM_90A)
    first, second = objects(cache)
    for suffix in (".o", ".json"):
        second.with_suffix(suffix).write_bytes(first.with_suffix(suffix).read_bytes())
    runtime.forget()
    runtime.get(TinySpec(), arch=SM_90A)
    runtime.get(TinySpec(factor=3.0), arch=SM_90A)
    assert len(compiled) == 3
    assert len(warnings()) == 1


@pytest.mark.parametrize("content", ['{"cute_ssm": "0.0.1"}', "[]", "no json", None])
def test_a_folder_that_is_not_described_is_not_trusted(cache, compiled, warnings, content):
    runtime.get(TinySpec(), arch=SM_90A)
    (path,) = objects(cache)
    meta = path.parent / "meta.json"
    if content is None:
        meta.unlink()
    else:
        meta.write_text(content)
    runtime.forget()
    assert callable_(runtime.get(TinySpec(), arch=SM_90A))
    assert len(compiled) == 2
    assert json.loads(meta.read_text()) == toolchain.description()
    assert [str(path) in text and "meta.json" in text for text in warnings()] == [True]


def test_another_toolchain_has_a_folder_of_its_own(cache, compiled, monkeypatch):
    runtime.get(TinySpec(), arch=SM_90A)
    monkeypatch.setattr(toolchain, "dsl_distributions", lambda: {"nvidia-cutlass-dsl": "4.8.2"})
    toolchain.description.cache_clear()
    toolchain.stack.cache_clear()
    try:
        runtime.forget()
        runtime.get(TinySpec(), arch=SM_90A)
    finally:
        monkeypatch.undo()
        toolchain.description.cache_clear()
        toolchain.stack.cache_clear()
    assert len({path.parent for path in objects(cache)}) == 2


def test_edited_sources_are_not_stored_under_the_digest_of_the_old_ones(cache, compiled, warnings, monkeypatch):
    monkeypatch.setattr(toolchain, "sources_changed", SOURCES_CHANGED)
    digest = toolchain.sources_digest()
    monkeypatch.setattr(toolchain, "_hash_sources", lambda: digest)
    runtime.get(TinySpec(), arch=SM_90A)
    monkeypatch.setattr(toolchain, "_hash_sources", lambda: "of the edited sources")
    runtime.forget()
    for factor in (3.0, 4.0):
        assert callable_(runtime.get(TinySpec(factor=factor), arch=SM_90A))
    assert len(objects(cache)) == 1
    assert len(warnings()) == 1
    assert "the sources of cute_ssm have changed" in warnings()[0]


def test_a_time_in_the_future_is_no_edit_until_it_changes(tmp_path, monkeypatch):
    file = tmp_path / "kernel.py"
    file.touch()
    monkeypatch.setattr(toolchain, "sources_changed", SOURCES_CHANGED)
    digest = toolchain.sources_digest()
    monkeypatch.setattr(toolchain, "_hash_sources", lambda: digest)
    monkeypatch.setattr(toolchain, "_sources", lambda: [file])
    for ahead, edited in ((-3600, False), (3600, True)):  # of the import: read later, and perhaps edited since
        os.utime(file, (0, cute_ssm._IMPORTED + ahead))
        monkeypatch.setattr(toolchain, "_AHEAD", {})
        assert toolchain.sources_changed() == edited
    monkeypatch.setattr(toolchain, "_AHEAD", toolchain._ahead())
    assert not toolchain.sources_changed()
    file.write_text("# edited")
    assert toolchain.sources_changed()


def refuse(code):
    def refusing(*_, **__):
        raise OSError(code, os.strerror(code))

    return refusing


@pytest.mark.parametrize(
    ("owner", "name", "code"),
    [
        (os, "fsync", errno.ENOSPC),
        (os, "replace", errno.EROFS),
        (os, "replace", errno.ENOSPC),
        ("fcntl", "flock", errno.ENOLCK),
    ],
    ids=["full on write", "read-only", "full on rename", "no locks"],
)
def test_a_failing_disk_costs_one_warning(cache, compiled, warnings, monkeypatch, owner, name, code):
    import fcntl

    monkeypatch.setattr(fcntl if owner == "fcntl" else owner, name, refuse(code))
    for factor in (2.0, 3.0):
        assert callable_(runtime.get(TinySpec(factor=factor), arch=SM_90A))
    assert callable_(runtime.get(TinySpec(), arch=SM_90A))
    assert len(compiled) == 2
    assert len(warnings()) == 1
    assert str(cache) in warnings()[0]
    assert os.strerror(code) in warnings()[0]
    left = [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == [], "no half-written file stays"


def test_an_unreadable_cache_costs_one_warning(cache, compiled, warnings, monkeypatch):
    toolchain.stack()  # this and the fingerprint read sources, which stay readable
    monkeypatch.setattr(store.registry, "fingerprint", lambda spec: "tiny")
    monkeypatch.setattr(store.Path, "read_bytes", refuse(errno.EACCES))
    for factor in (2.0, 3.0):
        assert callable_(runtime.get(TinySpec(factor=factor), arch=SM_90A))
    assert len(compiled) == 2
    assert len(warnings()) == 1


@pytest.mark.parametrize("depth", [0, 1], ids=["the folder", "a parent"])
def test_a_file_where_the_folder_should_be(settings, tmp_path, compiled, warnings, depth):
    (tmp_path / "file").write_text("precious")
    settings(CACHE_DIR=tmp_path / "file" if depth == 0 else tmp_path / "file" / "cache")
    assert callable_(runtime.get(TinySpec(), arch=SM_90A))
    assert len(warnings()) == len(compiled) == 1
    assert (tmp_path / "file").read_text() == "precious"


def test_a_read_only_cache_is_still_read(cache, compiled, warnings, monkeypatch):
    runtime.get(TinySpec(), arch=SM_90A)
    runtime.forget()
    monkeypatch.setattr(store.Store, "_locked", refuse(errno.EROFS))
    assert callable_(runtime.get(TinySpec(), arch=SM_90A))
    assert len(compiled) == 1
    assert warnings() == []


def test_a_lock_held_for_ever_is_given_up(cache, compiled, warnings, monkeypatch):
    import fcntl

    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0.1)
    path = store.Store(cache).path(store.Key(TinySpec(), TinyConfig(), SM_90A)).with_suffix(".lock")
    path.parent.mkdir(parents=True)
    with open(path, "w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert callable_(runtime.get(TinySpec(), arch=SM_90A))
    assert len(compiled) == len(warnings()) == 1
    assert objects(cache) == []


def test_a_bundle_is_used_before_the_compiler(cache, settings, tmp_path, compiled):
    path = runtime.compile_to(tmp_path / "bundle", TinySpec(), arch=SM_90A)
    assert path.is_file()
    assert len(compiled) == 1
    settings(AOT_DIR=f"{tmp_path / 'missing'}:{tmp_path / 'bundle'}", CACHE_DIR=cache)
    before = sorted((each, each.stat().st_mtime_ns) for each in (tmp_path / "bundle").rglob("*"))
    assert callable_(runtime.get(TinySpec(), arch=SM_90A))
    assert len(compiled) == 1
    assert not cache.exists()
    assert before == sorted((each, each.stat().st_mtime_ns) for each in (tmp_path / "bundle").rglob("*"))


@pytest.mark.parametrize("damage", ["garbage", "other toolchain"])
def test_a_bad_bundle_is_a_miss(cache, settings, tmp_path, compiled, warnings, caplog, damage):
    path = runtime.compile_to(tmp_path / "bundle", TinySpec(), arch=SM_90A)
    settings(AOT_DIR=tmp_path / "bundle")
    victim = path if damage == "garbage" else path.with_name("meta.json")
    victim.write_bytes(b"{}")
    assert callable_(runtime.get(TinySpec(), arch=SM_90A))
    assert len(compiled) == 2
    assert [str(path) in text for text in warnings()] == [True]
    assert str(tmp_path / "bundle") in caplog.text
    assert victim.read_bytes() == b"{}", "a bundle is never written"
    assert len(objects(cache)) == 1


def test_compiling_into_an_unwritable_folder_is_an_error(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CuteSsmError, match="folder: expected a folder that can be written"):
        runtime.compile_to(tmp_path / "file", TinySpec(), arch=SM_90A)


def test_threads_racing_for_one_kernel(cache, compiled):
    found = []
    start = threading.Barrier(6)

    def work():
        start.wait()
        found.append(runtime.get(TinySpec(), arch=SM_90A))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len({id(function) for function in found}) == len(compiled) == 1
    assert callable_(found[0])


def test_threads_racing_for_different_kernels(cache, compiled):
    found = {}
    start = threading.Barrier(4)

    def work(factor):
        start.wait()
        found[factor] = runtime.get(TinySpec(factor=factor), arch=SM_90A)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(callable_(function) for function in found.values())
    assert len(found) == len(compiled) == len(objects(cache)) == 4


def test_a_compile_error_says_what_was_compiled(cache):
    with pytest.raises(CompileError) as caught:
        runtime.get(TinySpec(factor="two"), TinyConfig(96), SM_90A)
    message = str(caught.value)
    for part in ("tiny_kernel:Tiny", "sm_90a", "factor='two'", "TinyConfig(threads=96)", "conversion is not supported"):
        assert part in message
    assert "\x1b" not in message
    assert objects(cache) == []


def test_an_illegal_spec_is_refused_before_anything_is_compiled(cache, compiled):
    with pytest.raises(UnsupportedSpecError, match="dtype: expected float32 or float16"):
        runtime.get(TinySpec("int4"), arch=SM_90A)
    assert not compiled
    assert not cache.exists()


@pytest.mark.parametrize("version", ["4.7.9", "4.9.0", "5.0", None])
def test_a_wrong_compiler_is_named_with_the_command_that_mends_it(cache, monkeypatch, version):
    monkeypatch.setattr(toolchain, "installed", lambda _: version)
    toolchain.check.cache_clear()
    with pytest.raises(CompileError, match=r"nvidia-cutlass-dsl: expected .*>=4\.8\.0,<4\.9, got .*; run: .* -m pip"):
        runtime.get(TinySpec(), arch=SM_90A)


def test_a_first_call_during_a_capture_is_refused_before_anything_is_compiled(cache, compiled, monkeypatch):
    """A kernel that is in memory is used: CUDA has loaded it."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(CuteSsmError, match=r"CUDA graph: .*make each call once before the capture"):
        runtime.get(TinySpec(), TinyConfig(), arch.SM_90A)
    assert compiled == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    function = runtime.get(TinySpec(), TinyConfig(), arch.SM_90A)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert runtime.get(TinySpec(), TinyConfig(), arch.SM_90A) is function


def test_the_target(settings, monkeypatch):
    import torch

    settings(ARCH="sm_103a")
    assert runtime.target() is runtime.target(torch.device("cuda", 0)) is arch.SM_103A
    settings(ARCH="")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedArchError, match="arch: expected a target or a CUDA device, got neither"):
        runtime.target()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0) if device.index else (9, 0))
    assert runtime.target() is runtime.target(torch.device("cuda", 0)) is SM_90A
    assert runtime.target(torch.device("cuda", 1)) is arch.SM_100A


def test_calls_are_logged_only_if_asked_for(cache, settings, caplog):
    import torch

    plain = runtime.get(TinySpec(), arch=SM_90A)
    log = logging.getLogger("cute_ssm")
    level = log.level
    try:
        settings(LOG="calls")
        function = runtime.get(TinySpec(), arch=SM_90A)
        assert type(function) is not type(plain)
        caplog.clear()
        with pytest.raises((TypeError, ValueError)):
            function(torch.zeros(2, 3, dtype=torch.float16), None)
    finally:
        log.setLevel(level)
    assert "float16[2, 3]:[3, 1]@0x" in caplog.text
    assert "None" in caplog.text


def test_emulated(cache):
    import torch

    ptxsim = pytest.importorskip("ptxsim")
    with ptxsim.emulate(arch="sm_90a") as session:
        assert runtime.emulator() is session
        kernel = runtime.emulated(TinySpec(factor=3.0))
        assert kernel is runtime.emulated(TinySpec(factor=3.0), TinyConfig(), SM_90A)
        x, out = torch.arange(300.0), torch.zeros(300)
        kernel(x, out)
    assert runtime.emulator() is None
    equal(out, 3 * x)
    with pytest.raises(CompileError, match="factor='two'"):
        runtime.emulated(TinySpec(factor="two"), arch=SM_90A)
