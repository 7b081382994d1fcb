"""What a kernel computes (spec) and how fast (config): frozen, hashable, free of torch and of the compiler.

Spec, config and target together are the only input of a compile, so they are the cache key by construction.  Batch,
slots and strides are in neither: they are dynamic.  The specs of all operators can be imported from here; each is
defined in the folder of its operator.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from cute_ssm.errors import UnsupportedSpecError, describe

if TYPE_CHECKING:
    from cute_ssm.arch import Arch

FLOATS = ("float32", "bfloat16", "float16")
QUANTISED = ("int16", "int8", "float8_e4m3fn")
ITEMSIZE = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int16": 2,
    "int8": 1,
    "float8_e4m3fn": 1,
    "int32": 4,
    "int64": 8,
}


ROW_ALIGNMENTS = (16, 8, 4, 2)  # bytes


def check_alignment(n_bytes: int) -> None:
    """Raise unless rows of inputs are aligned to one of `ROW_ALIGNMENTS`."""
    if n_bytes not in ROW_ALIGNMENTS:
        raise UnsupportedSpecError(describe("input_bytes", " or ".join(map(str, ROW_ALIGNMENTS)), n_bytes))


@dataclass(frozen=True)
class Spec:
    """Base of all specs.  A subclass names its operator and lists what its kernel is specialised on."""

    @property
    def op(self) -> str:
        """Name of the operator, as in ``cute_ssm.<op>``."""
        raise TypeError(f"{type(self).__name__} names no operator")

    def check(self) -> None:
        """Raise `UnsupportedSpecError` if no kernel implements this spec; compiles nothing."""

    def text(self) -> str:
        """Return a short readable name, a part of the names of cached files."""
        raise TypeError(f"{type(self).__name__} has no readable name")


@dataclass(frozen=True)
class Config:
    """Base of all configs: what may change a kernel's speed and nothing else.

    A subclass has a ``check``.  One whose operator has a workload can be tuned, and says how by the other members.

    Attributes
    ----------
    FREE : tuple of str
        Fields that change no bit of a result: those that tables and the tuner may set.
    KEY : tuple of str or None
        Fields of a spec that the best config depends on, which rows of tables name.  None: all.
    """

    FREE: ClassVar[tuple[str, ...]] = ()
    KEY: ClassVar[tuple[str, ...] | None] = None

    @property
    def launches(self) -> int:
        """Kernels that one call launches."""
        return 1

    def check(self, spec: Any, arch: Arch) -> None:
        """Raise `UnsupportedSpecError` if the kernel cannot run with this config."""
        raise TypeError(f"{type(self).__name__} has no check")

    def refuse(self, problems: Iterable[str], spec: Any, arch: Arch, reason: str = "") -> None:
        """Raise `UnsupportedSpecError` if there are problems, which name what does not fit."""
        if found := ", ".join(problems):
            raise UnsupportedSpecError(f"config: {found} of {self} do not fit {spec.text()} on {arch.name}{reason}")

    @classmethod
    def space(cls, spec: Any, arch: Arch) -> dict[str, tuple[int, ...]]:
        """Return the values that the tuner tries for each field of `FREE`; not all combinations are valid."""
        return {}

    def fits(self, spec: Any, arch: Arch) -> bool:
        """Whether the GPU can hold as many CTAs as the config promises."""
        return True

    def inert(self) -> tuple[str, ...]:
        """Return fields that mean nothing beside the others."""
        return ()


def digest(*parts: object, length: int = 12) -> str:
    """Return a hexadecimal digest of frozen dataclasses, strings and numbers that is stable between processes."""
    text = "|".join(
        f"{type(part).__qualname__}{sorted(dataclasses.asdict(part).items())!r}"
        if dataclasses.is_dataclass(part) and not isinstance(part, type)
        else repr(part)
        for part in parts
    )
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def __getattr__(name: str) -> type[Spec]:
    from cute_ssm.ops import operators

    for operator in operators():
        if operator.spec == name:
            return operator.spec_class
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
