"""Bundles: kernels compiled ahead of time to shared libraries, which load where no compiler is installed.

A bundle has the layout of the cache (`runtime.store`), with ``.so`` files in place of objects.  A library needs
``apache-tvm-ffi`` and ``libcute_dsl_runtime.so``, a part of the compiler's distribution that loads without the
compiler; a copy of it in the bundle's root serves too.
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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cute_ssm
from cute_ssm.env import logger, settings
from cute_ssm.errors import CuteSsmError, describe
from cute_ssm.runtime import toolchain
from cute_ssm.runtime.compiler import Function
from cute_ssm.runtime.store import META, Key

PACKAGE = "cute_ssm_aot"  # of the wheel that tools/build_aot.py makes
RUNTIME = "libcute_dsl_runtime.so"
_libraries: list[ctypes.CDLL] = []  # loaded for as long as the process lives


def folders() -> list[Path]:
    """Return the bundles to search: those that CUTE_SSM_AOT_DIR names, then that of an installed wheel."""
    return [*settings().aot_dirs, *_installed()]


def find(key: Key) -> Function | None:
    """Return the kernel of the first bundle that has a library of it for these sources; logs why one is passed by."""
    for root in folders():
        for meta in sorted(root.glob(f"{cute_ssm.__version__}/{key.arch.name}/*/{META}")):
            path = meta.with_name(f"{key.name}.so")
            if not path.exists():
                continue
            problem = _problem(root, meta, path)
            if problem is None:
                try:
                    return _load(root, _read(meta), path, key.function)
                except Exception as error:  # whatever a damaged file makes of it
                    problem = f"it does not load: {error}"
            logger().warning("%s cannot be used: %s", path, problem)
    return None


def link(objects: bytes) -> bytes:
    """Return an object file as a shared library.

    Raises
    ------
    CuteSsmError
        If there is no C compiler to link with, or it fails.
    """
    linker = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if linker is None:
        raise CuteSsmError(describe("linker", "cc, gcc or clang", "none of them on the PATH", "install one to build"))
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        source.write_bytes(objects)
        done = subprocess.run([linker, "-shared", "-s", "-o", target, source], capture_output=True, text=True)
        if done.returncode:
            raise CuteSsmError(f"linking with {linker} failed:\n{done.stderr.strip()}")
        return target.read_bytes()


def runtime_library(root: Path, description: dict[str, Any]) -> Path | None:
    """Return the library that a bundle's kernels need: the bundle's own, or that of an installed distribution.

    Of an installed one, version and CUDA flavour must be those the kernels were compiled with.
    """
    own = root / RUNTIME
    if own.is_file():
        return own
    name = f"{toolchain.DSL}-libs-{description.get('cuda')}"
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != description.get("dsl", {}).get(name):
        return None
    files = [file for file in distribution.files or [] if file.name == RUNTIME and "stubs" not in file.parts]
    return Path(str(files[0].locate())) if files else None


def _problem(root: Path, meta: Path, path: Path) -> str | None:
    """Return why a library of a bundle must not be used, or None."""
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
        return "the library is not the one its record describes"
    installed = toolchain.installed(toolchain.TVM_FFI)
    if installed is None or not toolchain.within(installed, toolchain.TVM_FFI_RANGE):
        wanted = toolchain.requirement(toolchain.TVM_FFI, toolchain.TVM_FFI_RANGE)
        return f"it needs {wanted}, got {installed or 'none installed'}"
    if runtime_library(root, description) is None:
        name = f"{toolchain.DSL}-libs-{description.get('cuda')}"
        version = description.get("dsl", {}).get(name)
        return f"it needs {RUNTIME} of {name} {version}: install that, or put the file into {root}"
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
        raise ValueError(f"{path.name} is no JSON object")
    return value


@functools.cache
def _installed() -> tuple[Path, ...]:
    found = find_spec(PACKAGE)
    places = list(found.submodule_search_locations or []) if found is not None else []
    return tuple(Path(place) / "kernels" for place in places)
