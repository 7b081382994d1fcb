"""Which kernel class implements a spec.  Classes, and with them the compiler, are imported on first use."""

from __future__ import annotations

import hashlib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.ops import operators
from cute_ssm.spec import Config, Spec

if TYPE_CHECKING:
    from cute_ssm.arch import Arch


class Kernel(Protocol):
    """The interface of a kernel class; its ``__call__`` is a ``cute.jit`` function of the fakes."""

    def __init__(self, spec: Any, config: Any, arch: Arch) -> None: ...

    @staticmethod
    def default_config(spec: Any, arch: Arch, units: int | None = None) -> Config:
        """Return the config of a spec, for `units` units of work if known."""
        ...

    def fakes(self) -> tuple[Any, ...]:
        """Return fake arguments of ``__call__`` for the compiler, the stream last."""
        ...

    def __call__(self, *arguments: Any) -> None: ...


KERNELS: dict[type[Spec], str] = {operator.spec_class: operator.kernel_path for operator in operators()}
_resolved: dict[str, type[Kernel]] = {}


def register(spec_type: type[Spec], path: str) -> None:
    """Register the kernel class ``"module:Class"`` as the implementation of a type of spec.

    Raises
    ------
    ValueError
        If the path does not have that form, or another class is registered for this type.
    """
    module, _, name = path.partition(":")
    if not (module and name.isidentifier()):
        raise ValueError(f"path: expected 'module:Class', got {path!r}; name the class, not an instance")
    known = KERNELS.setdefault(spec_type, path)
    if known != path:
        raise ValueError(f"spec_type: expected a type without a kernel, got {spec_type.__name__}, which has {known}")


def kernel_path(spec: Spec) -> str:
    """Return the ``"module:Class"`` that implements a spec; imports nothing.

    Raises
    ------
    UnsupportedSpecError
        If no kernel is registered for its type.
    """
    try:
        return KERNELS[type(spec)]
    except KeyError:
        known = ", ".join(spec_type.__name__ for spec_type in KERNELS)
        raise UnsupportedSpecError(f"spec: expected one of {known}, got {type(spec).__name__}") from None


def kernel_class(spec: Spec) -> type[Kernel]:
    """Return the class that implements a spec, importing it on first use."""
    path = kernel_path(spec)
    if path not in _resolved:
        module, _, name = path.partition(":")
        _resolved[path] = getattr(import_module(module), name)
    return _resolved[path]


def default_config(spec: Spec, arch: Arch, units: int | None = None) -> Config:
    """Return the config of a spec if the caller gives none."""
    return kernel_class(spec).default_config(spec, arch, units)


def fingerprint(spec: Spec) -> str:
    """Return a string that identifies the code of a spec's kernel, in addition to this package's sources.

    It is the path of the class; for a class outside this package also the contents of its file.
    """
    path = kernel_path(spec)
    module = path.partition(":")[0]
    if module.partition(".")[0] == "cute_ssm":
        return path
    found = find_spec(module)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"no module {module!r}, registered as the kernel of {type(spec).__name__}")
    return f"{path}#{hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()[:12]}"
