"""Diagnosis of an installation for ``python -m cute_ssm env``: versions, GPUs, backends, problems."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import cute_ssm
from cute_ssm import arch as archs
from cute_ssm import env
from cute_ssm.errors import UnsupportedArchError
from cute_ssm.runtime import bundles, companions, shelves, toolchain

TORCH_RANGE = ((2, 11), (2, 14))
PIP = f"{sys.executable} -m pip install"
BINDINGS = "cuda-bindings"


@dataclass(frozen=True)
class Gpu:
    """A CUDA device; `arch` is None if no kernel is compiled for it."""

    name: str
    capability: str
    arch: str | None


@dataclass(frozen=True)
class Problem:
    """A problem and the command that fixes it.  `broken`: the reference or the compiler does not work."""

    broken: bool
    what: str
    fix: str


@dataclass
class Facts:
    """What `problems` examines; the version of something not installed is None."""

    python: str = field(default_factory=platform.python_version)
    torch: str | None = None
    torch_cuda: str | None = None
    dsl: dict[str, str] = field(default_factory=dict)
    cuda_python: str | None = None
    cuda_bindings: str | None = None
    tvm_ffi: str | None = None
    compiler_error: str = ""
    compiler_cuda: str = ""
    driver_cuda: str | None = None
    gpus: list[Gpu] = field(default_factory=list)
    ptxsim: bool = False
    settings_error: str = ""
    cache_dir: Path | None = None
    cache_writable: bool = False
    bundles: dict[str, int] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)


def gather() -> Facts:
    """Examine the installation.  Imports torch and the compiler; changes no file."""
    facts = Facts(
        torch=toolchain.installed("torch"),
        dsl=toolchain.dsl_distributions(),
        cuda_python=toolchain.installed("cuda-python"),
        cuda_bindings=toolchain.installed(BINDINGS),
        tvm_ffi=toolchain.installed(toolchain.TVM_FFI),
        driver_cuda=driver_cuda(),
        ptxsim=not companions.missing("ptxsim"),
        variables=env.present(),
    )
    try:
        facts.cache_dir = env.settings().cache_dir
    except ValueError as error:
        facts.settings_error = str(error)
    if not facts.settings_error:
        facts.bundles = {str(folder): len(shelves.listing(folder)) for folder in bundles.folders()}
    facts.cache_writable = facts.cache_dir is not None and writable(facts.cache_dir)
    if facts.torch is not None:
        facts.torch_cuda, facts.gpus = _gpus()
    try:
        import_module("cutlass.cute")
        facts.compiler_cuda = toolchain.cuda_flavor()
    except Exception as error:  # any error of the import is reported
        facts.compiler_error = f"{type(error).__name__}: {error}"
    return facts


def bundled(facts: Facts) -> bool:
    """Return whether there is no compiler, by intent: kernels come from bundles alone."""
    return toolchain.DSL not in facts.dsl and any(facts.bundles.values())


def problems(facts: Facts) -> list[Problem]:
    """Return the problems, broken parts first."""
    found = [*_python_problems(facts), *_compiler_problems(facts), *_cuda_problems(facts), *_setting_problems(facts)]
    if not facts.ptxsim:
        fix = companions.how_to_install("ptxsim")
        found.append(Problem(False, "the emulator ptxsim is not importable: no kernel runs without a GPU", fix))
    return sorted(found, key=lambda problem: not problem.broken)


def backends(facts: Facts) -> dict[str, str]:
    """Return for each backend where it runs, or why it does not."""
    compiles = not facts.compiler_error
    ready = [f"cuda:{i} ({gpu.arch})" for i, gpu in enumerate(facts.gpus) if gpu.arch]
    if ready:
        found = f"yes: {', '.join(ready)}"
        cuda = found if compiles else "no: the compiler does not work"
        if bundled(facts):
            cuda = f"{found}, kernels of bundles only: there is no compiler"
    elif facts.gpus:
        cuda = "no: no kernels for this GPU"
    else:
        cuda = "no: no GPU" if facts.driver_cuda is None else "no: torch sees no GPU"
    emulate = "yes: CPU tensors inside `with ptxsim.emulate():`"
    if not (facts.ptxsim and compiles):
        emulate = "no: ptxsim is not installed" if compiles else "no: the compiler does not work"
    reference = "yes: CPU tensors" if facts.torch else "no: torch is not installed"
    return {"cuda": cuda, "emulate": emulate, "reference": reference}


def driver_cuda() -> str | None:
    """Return the newest CUDA version that the NVIDIA driver supports, or None without a driver."""
    try:
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def writable(folder: Path) -> bool:
    """Return whether files can be created in a folder, or the folder itself; creates neither."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def as_dict(facts: Facts) -> dict[str, object]:
    """Return the report as data for JSON."""
    shelf = shelves.listing(facts.cache_dir)
    return {
        "versions": versions(facts),
        "driver_cuda": facts.driver_cuda,
        "gpus": [vars(gpu) for gpu in facts.gpus],
        "backends": backends(facts),
        "cache": {
            "folder": None if facts.cache_dir is None else str(facts.cache_dir),
            "writable": facts.cache_writable,
            "objects": len(shelf),
            "bytes": sum(item.size for item in shelf),
        },
        "bundles": facts.bundles,
        "environment": facts.variables,
        "problems": [vars(problem) for problem in problems(facts)],
    }


def versions(facts: Facts) -> dict[str, str]:
    """Return names and versions of Python, torch and the parts of the compiler."""
    return {
        "python": facts.python,
        "cute_ssm": cute_ssm.__version__,
        "torch": facts.torch or "missing",
        **(facts.dsl or {toolchain.DSL: "missing"}),
        "cuda-python": facts.cuda_python or "missing",
        BINDINGS: facts.cuda_bindings or "missing",
        toolchain.TVM_FFI: facts.tvm_ffi or "missing",
        "compiler built for": facts.compiler_cuda or "unknown",
    }


def _gpus() -> tuple[str | None, list[Gpu]]:
    try:
        import torch
    except Exception:  # reported by _python_problems and as the compiler's error
        return None, []
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        try:
            name: str | None = archs.of_device(device).name
        except UnsupportedArchError:
            name = None
        major, minor = torch.cuda.get_device_capability(device)
        found.append(Gpu(torch.cuda.get_device_name(device), f"{major}.{minor}", name))
    return torch.version.cuda, found


def _python_problems(facts: Facts) -> list[Problem]:
    found = []
    if toolchain.numbers(facts.python) < (3, 10):
        found.append(Problem(True, f"Python {facts.python} is older than 3.10", "use a newer Python"))
    wanted = toolchain.requirement("torch", TORCH_RANGE)
    if facts.torch is None:
        found.append(Problem(True, "torch is not installed", f"{PIP} '{wanted}'"))
    elif not toolchain.within(facts.torch, TORCH_RANGE):
        found.append(Problem(False, f"torch {facts.torch} is outside the tested {wanted}", f"{PIP} '{wanted}'"))
    return found


def _compiler_problems(facts: Facts) -> list[Problem]:
    found = []
    accepted = (
        (toolchain.DSL, facts.dsl.get(toolchain.DSL), toolchain.DSL_RANGE),
        (toolchain.TVM_FFI, facts.tvm_ffi, toolchain.TVM_FFI_RANGE),
    )
    for name, version, bounds in accepted:
        wanted = toolchain.requirement(name, bounds)
        if version is None:
            unneeded = name == toolchain.DSL and bundled(facts)
            found.append(Problem(not unneeded, f"{name} is not installed", f"{PIP} '{wanted}'"))
        elif not toolchain.within(version, bounds):
            found.append(Problem(True, f"{name} {version} is not {wanted}", f"{PIP} '{wanted}'"))
    if len(set(facts.dsl.values())) > 1:
        parts = ", ".join(f"{name} {version}" for name, version in facts.dsl.items())
        wanted = toolchain.requirement(toolchain.DSL, toolchain.DSL_RANGE)
        found.append(
            Problem(
                True, f"parts of the compiler have different versions: {parts}", f"{PIP} --force-reinstall '{wanted}'"
            )
        )
    if facts.compiler_error and not found:
        wanted = toolchain.requirement(toolchain.DSL, toolchain.DSL_RANGE)
        what = f"importing the compiler fails: {facts.compiler_error}"
        found.append(Problem(True, what, f"{PIP} --force-reinstall '{wanted}'"))
    return found


def _cuda_problems(facts: Facts) -> list[Problem]:
    found = []
    if facts.torch is not None and facts.driver_cuda is not None and facts.torch_cuda is None:
        wanted = toolchain.requirement("torch", TORCH_RANGE)
        what = (
            f"there is an NVIDIA driver (CUDA {facts.driver_cuda}), but torch {facts.torch} is built for the CPU only"
        )
        found.append(Problem(False, what, f"{PIP} --force-reinstall '{wanted}'"))
    if (
        toolchain.DSL in facts.dsl
        and (facts.torch_cuda or "").startswith("13.")
        and f"{toolchain.DSL}-libs-cu13" not in facts.dsl
    ):
        what = f"torch is built for CUDA {facts.torch_cuda}, the compiler's libraries for CUDA 12"
        found.append(Problem(False, what, f"{PIP} 'cute-ssm[cu13]'"))
    found += _driver_problems(facts)
    for gpu in facts.gpus:
        if gpu.arch is None:
            known = ", ".join(archs.ARCHS)
            what = f"{gpu.name} ({gpu.capability}) cannot run the kernels, which are compiled for {known}"
            found.append(Problem(False, what, "use CPU tensors, which run the PyTorch reference"))
    return found


def _driver_problems(facts: Facts) -> list[Problem]:
    """Return what needs a newer driver than the installed one.  Calls of it fail with CUDA error 35."""
    driver = toolchain.numbers(facts.driver_cuda or "")
    if not driver:
        return []
    found = []
    bindings = toolchain.numbers(facts.cuda_bindings or "")
    if bindings and bindings[0] > driver[0]:
        what = f"{BINDINGS} {facts.cuda_bindings} needs a driver for CUDA {bindings[0]}, and this one is for CUDA "
        what += f"{facts.driver_cuda}: calls fail with CUDA error 35"
        fix = f"{PIP} 'cuda-python>=12.8,<{driver[0] + 1}', or update the driver"
        found.append(Problem(True, what, fix))
    flavor = toolchain.numbers(facts.compiler_cuda.removeprefix("cu"))
    if flavor and flavor[0] > driver[0]:
        what = f"the compiler's libraries are built for CUDA {flavor[0]}, the driver is for CUDA {facts.driver_cuda}: "
        what += "kernels do not load, with CUDA error 35"
        fix = f"{PIP} --force-reinstall '{toolchain.requirement(toolchain.DSL, toolchain.DSL_RANGE)}', after "
        fix += f"{sys.executable} -m pip uninstall {toolchain.DSL}-libs-cu{flavor[0]}; or update the driver"
        found.append(Problem(True, what, fix))
    return found


def _setting_problems(facts: Facts) -> list[Problem]:
    found = []
    if facts.settings_error:
        found.append(Problem(True, facts.settings_error, f"unset {facts.settings_error.partition(':')[0]}"))
    known = {variable.name for variable in env.VARIABLES}
    for name in facts.variables.keys() - known:
        found.append(Problem(False, f"{name} is not a variable of this package; is it misspelt?", f"unset {name}"))
    for folder, kernels in facts.bundles.items():
        if not kernels:
            what = f"the bundle {folder} contains no kernels"
            fix = f"python tools/build_aot.py --out {folder}, or name another folder in CUTE_SSM_AOT_DIR"
            found.append(Problem(False, what, fix))
    if facts.cache_dir is not None and not facts.cache_writable:
        what = f"the kernel cache {facts.cache_dir} cannot be written: every process compiles its kernels"
        found.append(Problem(False, what, "export CUTE_SSM_CACHE_DIR=<a writable folder>"))
    return found
