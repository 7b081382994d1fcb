"""Spec to config: which values of the performance knobs a call gets.  Free of torch and of the compiler."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from cute_ssm.spec import Config

ConfigT = TypeVar("ConfigT", bound=Config)
_overrides: list[dict[str, int]] = []


@contextmanager
def override(**fields: int) -> Iterator[None]:
    """Replace fields of every config chosen inside the context, e.g. ``override(rows=16, stages=3)``.

    For measurements and tests.  A config that a kernel cannot run raises `UnsupportedSpecError`; one that has no such
    field raises TypeError.  Not for use from several threads at once.
    """
    _overrides.append(fields)
    try:
        yield
    finally:
        _overrides.pop()


def overridden() -> bool:
    """Whether an `override` is open, so that memorised choices do not hold."""
    return bool(_overrides)


def apply_override(config: ConfigT) -> ConfigT:
    """Return the config with the fields of all open overrides replaced."""
    for fields in _overrides:
        config = dataclasses.replace(config, **fields)
    return config
