"""Packages of this repository that are installed by themselves: the emulator and the machine model."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

NEEDS = {"ptxsim": ("ptxsim",), "gpumodel": ("ptxsim", "gpumodel")}  # what each package needs, itself included


def missing(name: str) -> list[str]:
    """Return what has to be installed before a package can be imported; a folder of its name does not count."""
    return [needed for needed in NEEDS[name] if getattr(find_spec(needed), "origin", None) is None]


def how_to_install(name: str) -> str:
    """Return the command that installs a package of this repository."""
    folders = " ".join(f"./tools/{needed}" for needed in NEEDS[name])
    return f"in a checkout of this repository: pip install {folders}"


def require(name: str) -> ModuleType:
    """Import and return a package of this repository.

    Raises
    ------
    ImportError
        If it, or what it needs, is not installed; the message says how to install it.
    """
    if absent := missing(name):
        raise ImportError(f"not installed: {' and '.join(absent)}; {how_to_install(name)}", name=absent[0])
    return import_module(name)
