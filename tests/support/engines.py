"""Import serving engines' own modules where neither a GPU nor all of their packages are: what is absent is a stand-in.

A stand-in answers every attribute with a class that does nothing, so that imports succeed and uses fail.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

# What the engines import at the top of modules, and the tested paths do not use.
ABSENT = {
    "anthropic", "compressed_tensors", "cv2", "flashinfer", "gguf", "llguidance", "mistral_common", "numba", "openai",
    "openai_harmony", "opentelemetry", "outlines", "outlines_core", "ray", "sentencepiece", "sgl_kernel", "soundfile",
    "tiktoken", "torchao", "torchaudio", "torchvision", "xgrammar",
}  # fmt: skip
stood_in: set[str] = set()  # what was imported so


class _Anything(type):
    """Of classes whose attributes are such classes."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return anything(name)

    def __getitem__(cls, parameters: object) -> type:
        return cls


def anything(name: str) -> type:
    def schema(cls, source, handler):  # of fields of pydantic models
        return {"type": "any"}

    def subclassed(cls, **options):
        pass

    body = {"__init__": lambda self, *args, **kwargs: None, "__get_pydantic_core_schema__": classmethod(schema)}
    body["__init_subclass__"] = classmethod(subclassed)
    return _Anything(name, (), body)


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return anything(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last in line: finds the modules of absent packages."""

    def find_spec(self, name, path=None, target=None):
        caller = sys._getframe(1)
        while caller is not None and "importlib._bootstrap" in caller.f_code.co_filename:
            caller = caller.f_back
        asked = caller is not None and caller.f_globals.get("__name__") == "importlib.util"  # is it there: no
        if asked or name.partition(".")[0] not in ABSENT:
            return None
        stood_in.add(name)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


def available(package: str) -> bool:
    """Whether an engine's sources are on the path."""
    return importlib.util.find_spec(package) is not None


def installed(folder: Path) -> str:
    """Write what an installed package has of the project's entry points; return the folder, for ``sys.path``."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    groups = re.findall(r'^\[project\.entry-points\."(.*)"\]\ncute_ssm = "(.*)"$', text, re.M)
    info = folder / "cute_ssm_plugins-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cute-ssm-plugins\nVersion: 0\n")
    (info / "entry_points.txt").write_text("".join(f"[{group}]\ncute_ssm = {value}\n" for group, value in groups))
    return str(folder)


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Let absent packages be imported inside the context, and forget them after it."""
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Module)]:
            del sys.modules[name]
