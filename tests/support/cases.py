"""Lists of cases: what parametrised tests have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TypeVar

Case = TypeVar("Case")


def vary(base: Case, **factors: Iterable[object]) -> list[Case]:
    """Copies of `base` that differ from it in one field each: ``vary(BASE, dim=(8, 80), io=("f16",))`` are three."""
    return [dataclasses.replace(base, **{name: value}) for name, values in factors.items() for value in values]
