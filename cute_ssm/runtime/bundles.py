"""Bundles: kernels compiled ahead of time to shared libraries, which load without the compiler.

A bundle has the layout of the cache (`runtime.store`), with ``.so`` files instead of objects.  A library is valid for
one version of this package, its sources, and one target.  It imports functions of ``apache-tvm-ffi`` and of
``libcute_dsl_runtime.so`` alone, so the Python, the compiler and the CUDA flavour that built it do not matter.  The
latter is part of the compiler's distribution and loads without the compiler; it may also be copied to the bundle's
root.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cute_ssm
from cute_ssm.env import logger, settings
from cute_ssm.errors import CuteSsmError, describe
from cute_ssm.runtime import toolchain
from cute_ssm.runtime.compiler import Function
from cute_ssm.runtime.store import META, Key

PACKAGE = "cute_ssm_aot"  # package in the wheels that tools/build_aot.py builds
RUNTIME = "libcute_dsl_runtime.so"
FLAVOURS = tuple(f"{toolchain.DSL}-libs-{cuda}" for cuda in ("cu12", "cu13"))
_libraries: list[ctypes.CDLL] = []  # keeps the libraries loaded


def folders() -> list[Path]:
    """Return the bundles to search: those of CUTE_SSM_AOT_DIR, then that of an installed wheel."""
    return [*settings().aot_dirs, *_installed()]


def find(key: Key) -> Function | None:
    """Return the kernel from the first bundle with a usable library; log why others cannot be used."""
    for root, meta, path in _libraries_of(key):
        problem = _problem(root, meta, path)
        if problem is None:
            try:
                return _load(root, _read(meta), path, key.function)
            except Exception as error:  # a damaged file can raise anything
                problem = f"loading it failed: {error}"
        logger().warning("%s cannot be used: %s", path, problem)
    return None


def has(key: Key) -> bool:
    """Return whether a bundle has a usable library of the kernel; loads none."""
    return any(_problem(root, meta, path) is None for root, meta, path in _libraries_of(key))


def link(objects: bytes) -> bytes:
    """Link an object file into a shared library and return its bytes.

    Raises
    ------
    CuteSsmError
        If there is no C compiler to link with, or linking fails.
    """
    linker = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if linker is None:
        raise CuteSsmError(
            describe("linker", "cc, gcc or clang", "none of them on the PATH", "install one to build bundles")
        )
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        source.write_bytes(objects)
        done = subprocess.run([linker, "-shared", "-s", "-o", target, source], capture_output=True, text=True)
        if done.returncode:
            raise CuteSsmError(f"linking with {linker} failed:\n{done.stderr.strip()}")
        return target.read_bytes()


def runtime_library(root: Path, description: dict[str, Any]) -> Path | None:
    """Return the runtime library for a bundle's kernels, in the bundle or in an installed distribution; None: missing.

    An installed one must have the version that the kernels were compiled with.  Its CUDA flavour may be another.
    """
    own = root / RUNTIME
    if own.is_file():
        return own
    versions = description.get("dsl", {})
    for name in sorted(FLAVOURS, key=lambda name: name not in versions):
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if distribution.version != versions.get(toolchain.DSL):
            continue
        files = [file for file in distribution.files or [] if file.name == RUNTIME and "stubs" not in file.parts]
        if files:
            return Path(str(files[0].locate()))
    return None


def _libraries_of(key: Key) -> Iterator[tuple[Path, Path, Path]]:
    """Yield root, ``meta.json`` and path of every library of a kernel, usable or not."""
    for root in folders():
        for meta in sorted(root.glob(f"{cute_ssm.__version__}/{key.arch.name}/*/{META}")):
            path = meta.with_name(f"{key.name}.so")
            if path.exists():
                yield root, meta, path


def _problem(root: Path, meta: Path, path: Path) -> str | None:
    """Return why a library of a bundle cannot be used, or None if it can."""
    try:
        description = _read(meta)
        record = _read(path.with_suffix(".json"))
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        return f"unreadable: {error}"
    for name, wanted in toolchain.light_description().items():
        if description.get(name) != wanted:
            return f"{name}: expected {wanted}, got {description.get(name)}"
    if record.get("sha256") != hashlib.sha256(data).hexdigest():
        return "its SHA-256 is not the one in its record"
    installed = toolchain.installed(toolchain.TVM_FFI)
    if installed is None or not toolchain.within(installed, toolchain.TVM_FFI_RANGE):
        wanted = toolchain.requirement(toolchain.TVM_FFI, toolchain.TVM_FFI_RANGE)
        return f"it needs {wanted}, got {installed or 'none installed'}"
    if runtime_library(root, description) is None:
        version = description.get("dsl", {}).get(toolchain.DSL)
        return f"it needs {RUNTIME} of {' or '.join(FLAVOURS)} {version}: install one, or copy the file to {root}"
    return None


def _load(root: Path, description: dict[str, Any], path: Path, name: str) -> Function:
    import tvm_ffi

    library = runtime_library(root, description)
    _open(str(library))
    function: Function = tvm_ffi.load_module(str(path))[name]
    logger().info("loaded %s", path)
    return function


@functools.cache
def _open(path: str) -> None:
    _libraries.append(ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL))


def _read(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return value


@functools.cache
def _installed() -> tuple[Path, ...]:
    found = find_spec(PACKAGE)
    locations = list(found.submodule_search_locations or []) if found is not None else []
    return tuple(Path(location) / "kernels" for location in locations)
