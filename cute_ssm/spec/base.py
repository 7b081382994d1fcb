"""What all specs and configs have in common, and the names of types."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

from cute_ssm.errors import UnsupportedSpecError, describe

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
    """Base of all configs: what may change a kernel's speed and nothing else."""

    @property
    def launches(self) -> int:
        """Kernels that one call launches."""
        return 1


def digest(*parts: object, length: int = 12) -> str:
    """Return a hexadecimal digest of frozen dataclasses, strings and numbers that is stable between processes."""
    text = "|".join(
        f"{type(part).__qualname__}{sorted(dataclasses.asdict(part).items())!r}"
        if dataclasses.is_dataclass(part) and not isinstance(part, type)
        else repr(part)
        for part in parts
    )
    return hashlib.sha256(text.encode()).hexdigest()[:length]
