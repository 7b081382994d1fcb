"""Triton kernels of other projects, loaded file by file from installed packages.

Such packages need a GPU, or much else, to be imported whole; their kernels need Triton and PyTorch alone.  Everything
that a file imports besides those, and besides other files of kernels, is replaced by `Nothing`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path
from typing import Any


class Absent(Exception):
    """A package that is not installed, or has no such file."""


class Nothing:
    """Stands for what kernels do not use: any call of it, or attribute, is again nothing, and false."""

    def __call__(self, *args: object, **kwargs: object) -> Nothing:
        return self

    def __getattr__(self, name: str) -> Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __bool__(self) -> bool:
        return False

    def __or__(self, other: object) -> Nothing:
        return self

    __ror__ = __or__


class NothingModule(types.ModuleType):
    """A module that has every name."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return KNOWN[name] if name in KNOWN else Nothing()


def undecorated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Stands for a decorator."""
    return function


KNOWN = {  # constants that kernels take, and decorators of what launches them
    "NULL_BLOCK_ID": 0, "PAD_SLOT_ID": -1, "VLLM_TUNED_CONFIG_FOLDER": None,
    "dispatch": lambda *_: undecorated, "input_guard": undecorated,
}  # fmt: skip


class _Finder(MetaPathFinder, Loader):
    """Imports files of a package that ``wanted`` names, and nothing for its other modules."""

    def __init__(self, root: Path, package: str, wanted: Callable[[str], bool]):
        self.root, self.package, self.wanted = root, package, wanted

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name != self.package and not name.startswith(self.package + "."):
            return None
        file = self.root.joinpath(*name.split(".")).with_suffix(".py")
        if self.wanted(name) and file.exists():
            return importlib.util.spec_from_file_location(name, file)
        return importlib.util.spec_from_loader(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        if spec.name.endswith("triton_utils"):
            return _triton_utils(spec.name)
        return NothingModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _triton_utils(name: str) -> types.ModuleType:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

    module = types.ModuleType(name)
    vars(module).update(triton=triton, tl=tl, tldevice=libdevice, HAS_TRITON=True)
    vars(module).update(LOG2E=1.4426950408889634, LOGE2=0.6931471805599453)
    return module


_loaded: dict[tuple[str, str], types.ModuleType] = {}


def kernels_of(folder: Path, module: str, wanted: Callable[[str], bool]) -> types.ModuleType:
    """Return a module of an installed package, loaded alone.

    Parameters
    ----------
    folder : Path
        Has the package, as ``pip install --target`` makes it.
    module : str
        Dotted name.
    wanted : callable
        Says whether a module's own file is needed; the others are replaced.

    Raises
    ------
    Absent
        If the folder has no such file.
    """
    key = (str(folder), module)
    if key in _loaded:
        return _loaded[key]
    if not folder.joinpath(*module.split(".")).with_suffix(".py").exists():
        raise Absent(f"{folder}: has no {module}")
    package = module.split(".")[0]
    before = {n: m for n, m in sys.modules.items() if n == package or n.startswith(package + ".")}
    for name in before:
        del sys.modules[name]
    finder = _Finder(folder, package, wanted)
    sys.meta_path.insert(0, finder)
    try:
        _loaded[key] = importlib.import_module(module)
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
            del sys.modules[name]
        sys.modules.update(before)
    return _loaded[key]


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Let host code that selects a device run on CPU tensors."""
    import torch

    before = torch.accelerator.device_index
    torch.accelerator.device_index = lambda index: contextlib.nullcontext()
    try:
        yield
    finally:
        torch.accelerator.device_index = before
