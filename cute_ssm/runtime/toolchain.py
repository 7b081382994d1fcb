"""The tool-chain of a kernel: versions, sources and options, whose digest names the folder of stored objects."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import re
import sys
import time
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import cute_ssm
from cute_ssm.errors import CompileError, describe
from cute_ssm.spec import digest

DSL = "nvidia-cutlass-dsl"
DSL_RANGE = ((4, 8, 0), (4, 9))
TVM_FFI = "apache-tvm-ffi"
TVM_FFI_RANGE = ((0, 1, 11), (0, 2))
OPTIONS = "--enable-tvm-ffi --gpu-arch {arch}"

# Everything that a kernel's module imports: what is traced, and the argument tables, whose alignments kernels are
# compiled for, with what they import.
_SOURCES = ("arch.py", "device", "ops", "reference", "spec.py", "tuning")
_HOST_FILES = ("operator.py", "reference.py", "workload.py")

Range = tuple[tuple[int, ...], tuple[int, ...]]


def installed(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: ``"4.8.1.dev0"`` is (4, 8, 1)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def within(version: str, accepted: Range) -> bool:
    """Return whether a version is in a half-open range."""
    return accepted[0] <= numbers(version) < accepted[1]


def requirement(distribution: str, accepted: Range) -> str:
    """Return a range as a pip requirement, e.g. ``"nvidia-cutlass-dsl>=4.8.0,<4.9"``."""
    low, high = (".".join(map(str, bound)) for bound in accepted)
    return f"{distribution}>={low},<{high}"


@functools.cache
def check() -> None:
    """Raise `CompileError` if the installed compiler is not supported by this version."""
    for name, accepted in ((DSL, DSL_RANGE), (TVM_FFI, TVM_FFI_RANGE)):
        version = installed(name)
        if version is None or not within(version, accepted):
            wanted = requirement(name, accepted)
            got = version or "none installed"
            raise CompileError(describe(name, wanted, got, f"run: {sys.executable} -m pip install '{wanted}'"))


def dsl_distributions() -> dict[str, str]:
    """Return the versions of all installed parts of the compiler; their names contain the CUDA version."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name.startswith(DSL):
            found[name] = distribution.version
    return dict(sorted(found.items()))


@functools.cache
def sources_digest() -> str:
    """Return a digest of the sources that a kernel is built from, as they are at the first call."""
    return _hash_sources()


def sources_changed() -> bool:
    """Return whether the sources may have changed, so that the digest does not describe what this process runs.

    Modules are read at import, the digest is computed later, and traced sources are read again.  A file newer than the
    import of this package may therefore have been read in different versions.  A file whose time was in the future at
    import, as with clocks that differ, counts only if its time has changed since.
    """
    times = ((file, file.stat().st_mtime) for file in _sources())
    newer = any(at > cute_ssm._IMPORTED and at != _AHEAD.get(file) for file, at in times)
    return newer or _hash_sources() != sources_digest()


def _sources() -> list[Path]:
    root = Path(cute_ssm.__file__).parent
    tops = [root / top for top in _SOURCES]
    files = [file for top in tops for file in ([top] if top.is_file() else sorted(top.rglob("*.py")))]
    return [file for file in files if file.name not in _HOST_FILES]


def _ahead() -> dict[Path, float]:
    """Return the modification times of sources that are in the future."""
    now = time.time()
    return {file: changed for file in _sources() if (changed := file.stat().st_mtime) > now}


_AHEAD = _ahead()


def _hash_sources() -> str:
    root = Path(cute_ssm.__file__).parent
    hasher = hashlib.sha256()
    for file in _sources():
        hasher.update(f"{file.relative_to(root).as_posix()}\0".encode())
        hasher.update(file.read_bytes() + b"\0")
    return hasher.hexdigest()[:16]


def cuda_flavor() -> str:
    """Return the CUDA version of the loaded compiler; if several are installed, the driver's version selects one."""
    import cutlass  # noqa: F401
    import tvm_ffi  # noqa: F401

    library = sys.modules.get("cutlass._mlir._mlir_libs._cutlass_ir")
    match = re.search(r"\.cu(\d+)\.", Path(getattr(library, "__file__", None) or "").name)
    return f"cu{match.group(1)}" if match else "unknown"


@functools.cache
def description() -> dict[str, object]:
    """Return the contents of ``meta.json``.  Imports the compiler."""
    return {
        **light_description(),
        "dsl": dsl_distributions(),
        "cuda": cuda_flavor(),
        TVM_FFI: installed(TVM_FFI),
        "python": EXTENSION_SUFFIXES[0],
        "options": OPTIONS,
    }


def light_description() -> dict[str, object]:
    """Return the part of ``meta.json`` that needs no compiler, which must match for libraries built elsewhere too."""
    return {
        "cute_ssm": cute_ssm.__version__,
        "sources": sources_digest(),
        "machine": f"{platform.system()}-{platform.machine()}",
    }


@functools.cache
def stack() -> str:
    """Return the digest of `description`, which names the folder of this tool-chain's kernels."""
    return digest(repr(sorted(description().items())))
