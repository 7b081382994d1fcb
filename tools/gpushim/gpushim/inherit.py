"""CUDA devices of a command and of all Python processes that it starts: they inherit them by the environment."""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ptxsim

from . import build
from .checks import Device

VARIABLE = "GPUSHIM"
STARTUP = Path(__file__).with_name("startup")


def environment(devices: Sequence[Device], folder: Path) -> dict[str, str]:
    """Return the variables that give devices to a process and to those below it."""
    libraries = [str(build.runtime(folder / "lib")), str(build.installed(build.RUNTIME))]
    packages = {name: str(Path(file).parent) for name, file in (("gpushim", __file__), ("ptxsim", ptxsim.__file__))}
    told = {"devices": devices, "folder": str(folder), "libraries": libraries, "packages": packages}
    path = os.pathsep.join(filter(None, [str(STARTUP), os.environ.get("PYTHONPATH")]))
    return {VARIABLE: json.dumps(told), "PYTHONPATH": path}


def inherited() -> dict[str, Any] | None:
    """Return what the variable says, or None where it is not set."""
    return json.loads(os.environ[VARIABLE]) if VARIABLE in os.environ else None


def notes(folder: Path) -> Path:
    """Return the folder where a process that ends leaves its problems and faults."""
    return folder / "notes"


def note_at_exit(driver: Any, folder: Path) -> None:
    """Leave what is wrong with this process's launches, when it ends, for the command that started it."""

    def write() -> None:
        found = [*driver.problems, *(f"{type(fault).__name__}: {fault}" for fault in driver.faults)]
        if found:
            notes(folder).mkdir(exist_ok=True)
            text = "\n".join([" ".join(sys.argv), *(f"  {line}" for line in found), ""])
            (notes(folder) / str(os.getpid())).write_text(text)

    atexit.register(write)
