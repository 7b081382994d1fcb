"""Lists of cases: what parametrised tests have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TypeVar

Case = TypeVar("Case")


class Named:
    """A dataclass whose text, the id of a test, is what differs from its defaults: ``state=bf16-dim=80``, or base."""

    def __str__(self) -> str:
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return "-".join(f"{f.name}={getattr(self, f.name)}".replace("torch.", "") for f in changed) or "base"


def vary(base: Case, **factors: Iterable[object]) -> list[Case]:
    """Copies of `base` that differ from it in one field each: ``vary(BASE, dim=(8, 80), io=("f16",))`` are three."""
    return [dataclasses.replace(base, **{name: value}) for name, values in factors.items() for value in values]
