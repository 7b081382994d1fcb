"""The shared library of this package, built by the C compiler at hand and kept by the digest of its sources."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("cudart.c")
ARCHIVE, RUNTIME = "libcuda_dialect_runtime_static.a", "libcute_dsl_runtime.so"
FLAVOURS = ("cu12", "cu13")


@functools.cache
def installed(name: str) -> Path:
    """Return the path of a file of the installed compiler's libraries."""
    for flavour in FLAVOURS:
        try:
            distribution = importlib.metadata.distribution(f"nvidia-cutlass-dsl-libs-{flavour}")
        except importlib.metadata.PackageNotFoundError:
            continue
        files = [file for file in distribution.files or () if file.name == name and "stubs" not in file.parts]
        if files:
            return Path(str(files[0].locate()))
    raise FileNotFoundError(f"gpushim needs {name} of nvidia-cutlass-dsl-libs-cu12: pip install nvidia-cutlass-dsl")


def runtime(folder: Path) -> Path:
    """Build NVIDIA's wrappers over the functions of ``cudart.c``; return the library."""
    archive = installed(ARCHIVE)
    parts = ["-Wl,--whole-archive", str(archive), "-Wl,--no-whole-archive", "-Wl,-z,defs"]
    return _built(folder, "libgpushim.so", [SOURCE, archive], ["-O1", "-fPIC", str(SOURCE), *parts])


def _built(folder: Path, name: str, sources: list[Path], arguments: list[str]) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("gpushim needs a C compiler: cc, gcc or clang on the PATH")
    hasher = hashlib.sha256(repr((arguments, compiler)).encode())
    for source in sources:
        hasher.update(source.read_bytes())
    target = folder.absolute() / hasher.hexdigest()[:16] / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            new = Path(scratch) / name
            done = subprocess.run(
                [compiler, "-shared", f"-Wl,-soname,{name}", "-o", str(new), *arguments], capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"{compiler} could not build {name}:\n{done.stderr.strip()}")
            os.replace(new, target)
    return target
