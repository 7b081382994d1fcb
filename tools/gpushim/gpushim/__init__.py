"""CUDA devices for a process on a machine without a GPU.

    import gpushim

    driver = gpushim.install([gpushim.Device("sm_90a", 132)], ".gpushim")   # before torch.cuda or cutlass is used
    x = torch.randn(4, device="cuda")
    kernel(x)                             # an object compiled by CuTe DSL: its own host code launches it
    driver.launches[-1].grid, driver.refusals, driver.problems

The machine code that CuTe DSL compiles for the host checks arguments, loads the binary, sets attributes and launches,
as on a GPU.  What it calls is NVIDIA's own runtime wrappers, over functions of this package: they check each call as a
driver would, and run the kernel's PTX in `ptxsim`, on host memory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import build, cutedsl, inherit
from . import devices as torch_devices
from .checks import Attribute, Device, Error, Refusal
from .driver import Driver, Launch

__version__ = "0.1.0"
__all__ = ["Attribute", "Device", "Driver", "Error", "Launch", "Refusal", "driver", "install", "installed"]

_installed: Driver | None = None


def install(devices: Sequence[Device], folder: str | Path, **options: Any) -> Driver:
    """Give this process CUDA devices, for its whole life.

    Parameters
    ----------
    devices : sequence of Device
        One at least.
    folder : str or Path
        Keeps the runtime library, and the PTX of what is compiled.  An object that was compiled elsewhere cannot run:
        keep caches of objects beside it.
    options
        Options of ``ptxsim.emulate``, such as ``racecheck=True``.

    Returns
    -------
    Driver

    Raises
    ------
    RuntimeError
        If it is too late, or PyTorch has CUDA or internals that this package does not know.
    """
    if _installed is not None:
        raise RuntimeError("gpushim is installed already")
    if "cutlass" in sys.modules:
        raise RuntimeError("install gpushim before cutlass is imported: it reads CUTE_DSL_LIBS then")
    if not devices:
        raise ValueError("devices: expected one at least, got none")
    folder = Path(folder).absolute()
    return _install(devices, folder, [build.runtime(folder / "lib"), build.installed(build.RUNTIME)], options)


def _install(devices: Sequence[Device], folder: Path, libraries: Sequence[Path], options: dict[str, Any]) -> Driver:
    global _installed
    made = Driver(devices, folder, libraries[0], **options)
    # The loader of compiled objects looks symbols up in these libraries, in this order.
    os.environ["CUTE_DSL_LIBS"] = ":".join(map(str, libraries))
    made.tensors = torch_devices.install(made)
    cutedsl.install(made)
    _installed = made
    return made


def driver() -> Driver:
    """Return the driver of this process; raises `RuntimeError` if none is installed."""
    if _installed is None:
        raise RuntimeError("gpushim is not installed in this process")
    return _installed


def installed() -> bool:
    """Whether this process has devices of `install`, or of ``python -m gpushim``."""
    return _installed is not None


_told = inherit.inherited()
if _told is not None:
    _devices = [Device(*device) for device in _told["devices"]]
    _driver = _install(_devices, Path(_told["folder"]), [Path(path) for path in _told["libraries"]], {})
    inherit.note_at_exit(_driver, Path(_told["folder"]))
