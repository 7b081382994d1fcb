"""Bundles of shared libraries: built here, loaded where the compiler cannot be imported."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from paths import ROOT, SUPPORT
from tiny_spec import TinyConfig, TinySpec

from cute_ssm import arch, runtime
from cute_ssm.__main__ import main
from cute_ssm.errors import CuteSsmError, NotInBundleError
from cute_ssm.runtime import bundles, compiler, registry, shelves, toolchain
from cute_ssm.runtime.store import Key
from cute_ssm.workloads import plan

KEY = (TinySpec(), TinyConfig(), arch.SM_90A)

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("cutlass", "nvidia_cutlass_dsl", "tiny_kernel"):
            raise ImportError(f"{name} is not for this process")

sys.meta_path.insert(0, Blocked())
from tiny_spec import TinyConfig, TinySpec
from cute_ssm import arch, runtime
from cute_ssm.__main__ import main
from cute_ssm.runtime import registry
from cute_ssm.runtime import toolchain
toolchain.sources_digest = lambda: sys.argv[1]  # the same for all, even if somebody edits the sources meanwhile
registry.fingerprint = lambda spec: sys.argv[2]
function = runtime.get(TinySpec(), TinyConfig(), arch.SM_90A)
try:
    function()
except TypeError as error:
    assert "Expects 2 param" in str(error), error
    print("callable")
import torch
try:
    function(torch.zeros(4, dtype=torch.float64), torch.zeros(4))
except (TypeError, ValueError) as error:
    assert "argument #0" in str(error), error
    print("checks its arguments")
assert not {"cutlass", "tiny_kernel"} & set(sys.modules)
"""

needs_linker = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler to link with")


def build_aot():
    """The module tools/build_aot.py."""
    script = ROOT / "tools" / "build_aot.py"
    build = importlib.util.module_from_spec(found := importlib.util.spec_from_file_location("build_aot", script))
    found.loader.exec_module(build)
    return build


@pytest.fixture
def folder(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "sources_changed", lambda: False)
    settings(CACHE_DIR=tmp_path / "cache")
    return tmp_path / "bundle"


@pytest.fixture
def no_compile(monkeypatch):
    def refuse(*_):
        raise AssertionError("compiled although a bundle has the kernel")

    return lambda: monkeypatch.setattr(compiler, "compile_kernel", refuse)


def without_compiler(path: Path, variable: str = "CUTE_SSM_AOT_DIR", extra: tuple[str, ...] = ()):
    """Run `BLOCKED` in a process of its own."""
    from cute_ssm.runtime import registry

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*extra, str(SUPPORT), *sys.path]), variable: str(path)}
    arguments = [str(toolchain.description()["sources"]), registry.fingerprint(TinySpec())]
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )


def read_elf(option, path):
    return subprocess.run(["readelf", "-W", option, path], capture_output=True, text=True, check=True).stdout


def undefined(path):
    """Names of symbols that a library imports, without versions."""
    return set(re.findall(r" UND (\w+)", read_elf("--dyn-syms", path)))


def defined(path):
    return set(re.findall(r" (?:GLOBAL|WEAK) +DEFAULT +\d+ (\w+)", read_elf("--dyn-syms", path)))


@needs_linker
def test_a_bundle_loads_where_the_compiler_cannot_be_imported(folder):
    runtime.bundle_to(folder, *KEY)
    done = without_compiler(folder)
    assert done.stdout.split("\n")[:2] == ["callable", "checks its arguments"], done.stderr
    refused = without_compiler(folder / "empty")
    assert refused.returncode, "the process can compile: the test shows nothing"


@needs_linker
def test_the_library_holds_the_machine_code_of_the_object(folder, tmp_path):
    library = runtime.bundle_to(folder, *KEY).read_bytes()
    whole = runtime.compile_to(tmp_path / "object", *KEY).read_bytes()
    start = whole.index(b"\x7fELF", 4)  # the object's own header comes first
    code = whole[start : start + 2048]
    assert len(code) == 2048
    assert code in library


@needs_linker
def test_a_library_is_used_before_the_compiler_and_its_record_is_kept(folder, settings, no_compile):
    path = runtime.bundle_to(folder, *KEY)
    (item,) = shelves.listing(folder)
    assert item.path == path
    assert {part: item.record[part] for part in ("spec", "config", "arch")} == plan.as_entry(*KEY)
    no_compile()
    settings(AOT_DIR=folder)
    with pytest.raises(TypeError, match="Expects 2 param"):
        runtime.get(*KEY)()


@needs_linker
@pytest.mark.parametrize("damage", ["library", "record", "sources", "version", "runtime"])
def test_a_library_that_does_not_fit_is_a_miss_that_says_why(folder, settings, damage, caplog, monkeypatch):
    path = runtime.bundle_to(folder, *KEY)
    meta = json.loads(path.with_name("meta.json").read_text())
    if damage == "library":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "record":
        path.with_suffix(".json").write_text("[]")
    elif damage == "sources":
        path.with_name("meta.json").write_text(json.dumps({**meta, "sources": "others"}))
    elif damage == "version":
        monkeypatch.setattr(toolchain, "TVM_FFI_RANGE", ((9,), (10,)))
    else:
        path.with_name("meta.json").write_text(json.dumps({**meta, "dsl": {toolchain.DSL: "4.7.0"}}))
    settings(AOT_DIR=folder, CACHE="0")
    assert bundles.find(Key(*KEY)) is None
    expected = {
        "library": "its SHA-256 is not the one in its record",
        "record": "is not a JSON object",
        "sources": "sources: expected",
        "version": "it needs apache-tvm-ffi",
        "runtime": f"it needs {bundles.RUNTIME} of nvidia-cutlass-dsl-libs-cu12 or nvidia-cutlass-dsl-libs-cu13 4.7.0",
    }[damage]
    assert expected in caplog.text


@needs_linker
def test_a_runtime_library_in_the_bundle_serves_too(folder):
    path = runtime.bundle_to(folder, *KEY)
    meta = {**json.loads(path.with_name("meta.json").read_text()), "dsl": {toolchain.DSL: "4.7.0"}}
    assert bundles.runtime_library(folder, meta) is None
    (folder / bundles.RUNTIME).write_bytes(b"")
    assert bundles.runtime_library(folder, meta) == folder / bundles.RUNTIME


IMPORTED = re.compile(r"TVMFFI\w+|CuteDSLRT_\w+|_cuda\w+|_cuKernel\w+|cuda_dialect_\w+")
OF_THE_LINKER = {"__cxa_finalize", "__gmon_start__", "_ITM_registerTMCloneTable", "_ITM_deregisterTMCloneTable"}


@needs_linker
def test_a_library_imports_nothing_of_python_compiler_or_cuda(folder):
    """So it is valid whatever built it: what it imports is TVM-FFI's, and of the runtime library beside it."""
    path = runtime.bundle_to(folder, *KEY)
    assert read_elf("--dynamic", path).count("(NEEDED)") == 0
    imported = undefined(path) - OF_THE_LINKER
    assert {"TVMFFIEnvGetStream", "_cudaLaunchKernelEx"} <= imported
    assert [name for name in imported if not IMPORTED.fullmatch(name)] == []
    library = bundles.runtime_library(folder, toolchain.description())
    runtime_of = {name for name in imported if not name.startswith("TVMFFI")}
    assert runtime_of <= defined(library)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", read_elf("--dynamic", library)))
    assert {name.partition(".so")[0] for name in needed} <= {
        "libc", "libm", "libdl", "librt", "libpthread", "libgcc_s", "libstdc++", "ld-linux-x86-64",
    }  # fmt: skip


@needs_linker
@pytest.mark.parametrize("field", ["python", "cuda", toolchain.TVM_FFI, "options"])
def test_a_bundle_of_another_build_is_used(folder, settings, field):
    path = runtime.bundle_to(folder, *KEY)
    meta = json.loads(path.with_name("meta.json").read_text())
    path.with_name("meta.json").write_text(json.dumps({**meta, field: "another"}))
    path.parent.rename(path.parent.with_name("0123456789ab"))
    settings(AOT_DIR=folder, CACHE="0")
    assert bundles.find(Key(*KEY)) is not None


@needs_linker
def test_a_library_of_another_flavour_of_cuda_serves_too(folder, monkeypatch):
    meta = toolchain.description()
    (installed,) = [name for name in bundles.FLAVOURS if name in meta["dsl"]]
    other = {name: version for name, version in meta["dsl"].items() if name != installed}
    assert bundles.runtime_library(folder, {**meta, "dsl": other}) is not None
    assert bundles.runtime_library(folder, {**meta, "dsl": {toolchain.DSL: "4.7.0"}}) is None


@needs_linker
def test_a_library_whose_imports_are_missing_is_a_miss(folder, settings, caplog):
    """The loader looks all of them up at once, so that no call fails later."""
    path = runtime.bundle_to(folder, *KEY)
    data = path.read_bytes().replace(b"_cudaLaunchKernelEx\0", b"_cudaLaunchKernelEy\0")
    path.write_bytes(data)
    record = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**record, "sha256": hashlib.sha256(data).hexdigest()}))
    settings(AOT_DIR=folder, CACHE="0")
    assert bundles.find(Key(*KEY)) is None
    assert "undefined symbol: _cudaLaunchKernelEy" in caplog.text


def test_without_a_compiler_a_kernel_that_no_bundle_has_is_named(folder, settings, monkeypatch):
    settings(AOT_DIR=folder, CACHE="0")
    monkeypatch.setattr(toolchain, "installed", lambda name: None)
    with pytest.raises(NotInBundleError, match=rf"expected {Key(*KEY).name} for sm_90a in {folder}.*and no compiler"):
        runtime.get(*KEY)


def test_without_a_linker_nothing_is_built(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(CuteSsmError, match="linker: expected cc, gcc or clang"):
        bundles.link(b"")


@needs_linker
def test_bad_objects_do_not_link():
    with pytest.raises(CuteSsmError, match="failed"):
        bundles.link(b"no object")


@needs_linker
def test_build_aot_makes_a_bundle_and_a_wheel(folder, tmp_path, capsys):
    """From a file of specs, as the list of a cache is, to a wheel that is found without a variable."""
    specs = tmp_path / "specs.json"
    specs.write_text(json.dumps([plan.as_entry(*KEY)]))
    code = build_aot().main(
        ["--specs", str(specs), "--arch", "sm_90a", "--jobs", "1", "--wheel", "--out", str(tmp_path)]
    )
    assert code == 0, capsys.readouterr()
    assert "1 kernels, 1 compiled" in capsys.readouterr().out
    assert not list(folder.rglob("*.lock"))
    assert len(json.loads((folder / "manifest.json").read_text())) == 1
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        record = archive.read(next(name for name in names if name.endswith("RECORD"))).decode()
        assert sorted(line.split(",")[0] for line in record.splitlines()) == sorted(names)
        archive.extractall(site)
    done = without_compiler("", extra=(str(site),))
    assert done.stdout.startswith("callable"), done.stderr


LATE = """
from dataclasses import dataclass
from tiny_spec import TinySpec
from cute_ssm.runtime import registry

@dataclass(frozen=True)
class LateSpec(TinySpec):
    pass

def register():
    registry.register(LateSpec, "tiny_kernel:Tiny")
"""


@needs_linker
def test_build_aot_compiles_what_is_not_there_yet(folder, tmp_path, capsys, monkeypatch):
    """Here kernels of a class that no process knows until it is told, in two processes."""
    (tmp_path / "late_spec.py").write_text(LATE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "KERNELS", dict(registry.KERNELS))
    specs = tmp_path / "specs.json"
    entries = [plan.as_entry(TinySpec(factor=factor), *KEY[1:]) for factor in (3.0, 4.0)]
    specs.write_text(json.dumps([{**entry, "spec": {**entry["spec"], "type": "LateSpec"}} for entry in entries]))
    options = ["--specs", str(specs), "--register", "late_spec:register", "--arch", "sm_90a", "--out", str(folder)]
    assert build_aot().main([*options, "--jobs", "2"]) == 0, capsys.readouterr()
    assert "2 compiled, 0 there" in capsys.readouterr().out
    damaged, whole = sorted(folder.rglob("*.so"))
    damaged.write_bytes(b"")
    before = whole.stat()
    assert build_aot().main([*options, "--jobs", "1"]) == 0
    assert "1 compiled, 1 there" in capsys.readouterr().out
    assert damaged.stat().st_size > 0 and whole.stat().st_mtime_ns == before.st_mtime_ns


def test_env_lists_bundles_and_warns_of_empty_ones(folder, settings, capsys):
    settings(AOT_DIR=folder)
    main(["env"])
    printed = capsys.readouterr().out
    assert f"bundle  {folder}: 0 kernels" in printed
    assert f"note: the bundle {folder} contains no kernels" in printed
    runtime.compile_to(folder, *KEY)
    main(["env", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["bundles"] == {str(folder): 1}
    assert not any("bundle" in problem["what"] for problem in report["problems"])
