"""Packages of this repository that are installed separately: the emulator and the machine model."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

NEEDS = {"ptxsim": ("ptxsim",), "gpumodel": ("ptxsim", "gpumodel")}  # required packages of each, itself included


def missing(name: str) -> list[str]:
    """Return the packages to install before one can be imported; a folder of that name does not count."""
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
        If it or a package it requires is not installed; the message has the install command.
    """
    if absent := missing(name):
        raise ImportError(f"not installed: {' and '.join(absent)}; {how_to_install(name)}", name=absent[0])
    return import_module(name)
