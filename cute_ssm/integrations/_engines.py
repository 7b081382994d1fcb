"""What the integrations of serving engines have in common: checks of what they hook into, and calls with a way back."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from cute_ssm import env
from cute_ssm.errors import CompileError, CuteSsmError, UnsupportedArchError, describe

LASTING = (CompileError, UnsupportedArchError, ImportError)  # the next call would meet the same, and compile again
CALLER_ERRORS = (CuteSsmError, ValueError, TypeError, ImportError)  # raised before anything is written


class Hook(NamedTuple):
    """A function of an engine that an integration replaces, calls or implements, with the parameters it must have."""

    module: str
    name: str  # within the module; that of a method has its class
    parameters: str  # names, in order, with * before keyword-only ones and defaults as repr() prints them


class EngineError(CuteSsmError):
    """The installed engine is not one that an integration knows; the engine has not been changed."""


class Hooked(NamedTuple):
    """A module of an engine and an object in it."""

    module: ModuleType
    value: Any


def parameters(function: Callable[..., Any]) -> str:
    """Return the parameters of a function without their types: ``self, x, *, scale=1.0, **kwargs``."""
    words, keywords = [], False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not keywords:
            words.append("*")
        keywords = keywords or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        stars = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
        words.append(f"{stars}{p.name}" + ("" if p.default is p.empty else f"={p.default!r}"))
    return ", ".join(words)


def find(package: str, hook: Hook) -> Hooked:
    """Import what a hook names.

    Raises
    ------
    EngineError
        It is missing, or has other parameters; the message has the engine's version.
    """
    what = f"{hook.module}.{hook.name}"
    try:
        module = importlib.import_module(hook.module)
        value: Any = module
        for part in hook.name.split("."):
            value = getattr(value, part)
        found = parameters(value)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise EngineError(describe(what, f"to be there in {package} {version(package)}", f"{error!r}")) from error
    if found != hook.parameters:
        raise EngineError(describe(what, f"({hook.parameters})", f"({found}) in {package} {version(package)}"))
    return Hooked(module, value)


def find_all(package: str, hooks: tuple[Hook, ...]) -> list[Hooked]:
    """Import what several hooks name: all or none."""
    return [find(package, hook) for hook in hooks]


def version(package: str) -> str:
    """Return the installed version of an engine, or ``"(unknown version)"``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(unknown version)"


def rebind(name: str, original: Any, replacement: Any) -> list[ModuleType]:
    """Bind a name to a replacement in every loaded module where it is bound to the original; return the modules."""
    holders = [module for module in list(sys.modules.values()) if getattr(module, "__dict__", {}).get(name) is original]
    for module in holders:
        setattr(module, name, replacement)
    return holders


class Call:
    """Runs calls by this package, and those that it does not support by the engine; logs the first of these.

    After an error that every later call would meet too, because the kernel does not compile, the GPU is not
    supported or a package is missing, all calls go to the engine.

    Parameters
    ----------
    name : str
        What the log calls the engine's function.
    strict : bool
        Raise instead.
    """

    def __init__(self, name: str, strict: bool) -> None:
        self.name, self.strict = name, strict
        self.calls, self.reasons, self.off = 0, 0, False

    def __call__(self, ours: Callable[[], Any], theirs: Callable[[], Any]) -> Any:
        if self.off:
            return theirs()
        try:
            result = ours()
        except CALLER_ERRORS as error:
            if self.strict:
                raise
            self.off = isinstance(error, LASTING)
            self._log(error)
        else:
            self.calls += 1
            return result
        return theirs()

    def _log(self, reason: BaseException) -> None:
        self.reasons += 1
        if self.reasons == 1 or self.off:
            rest = "all calls run by the engine from now on" if self.off else "other such calls are not logged"
            env.logger().warning("%s runs by the engine, not by cute_ssm: %s (%s)", self.name, reason, rest)


def unless_other(package: str, part: str, install: Callable[[], str]) -> bool:
    """Run the installation of a part; if the engine is not as known, warn why, change nothing and return False."""
    try:
        done = install()
    except EngineError as error:
        env.logger().warning("cute_ssm is not used by %s for %s: %s", package, part, error)
        return False
    env.logger().info("%s", done)
    return True
