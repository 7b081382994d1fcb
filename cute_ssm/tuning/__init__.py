"""Spec to config: which values of the performance knobs a call gets.  Free of torch and of the compiler.

The ``config.py`` of an operator has its config class (see `cute_ssm.spec.Config`), a rule, and ``choose``, which takes
what the rule says, asks `tables.tuned`, and applies overrides.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from cute_ssm.errors import describe
from cute_ssm.spec import Config

ConfigT = TypeVar("ConfigT", bound=Config)
_local = threading.local()  # .overrides: those that this thread has open
_lock = threading.Lock()
overrides_open = 0  # of all threads: where there are none, calls need not look at their own


@contextmanager
def override(**fields: int | str) -> Iterator[None]:
    """Replace fields of every config chosen inside the context, e.g. ``override(rows=16, stages=3)``.

    Holds for this thread.  A config that a kernel cannot run raises `UnsupportedSpecError`; one that has no such
    field raises TypeError.
    """
    global overrides_open
    opened = _local.__dict__.setdefault("overrides", [])
    opened.append(fields)
    with _lock:
        overrides_open += 1
    try:
        yield
    finally:
        with _lock:
            overrides_open -= 1
        opened.pop()


def overridden() -> bool:
    """Whether an `override` is open, so that memorised choices do not hold."""
    return bool(_local.__dict__.get("overrides"))


def apply_override(config: ConfigT) -> ConfigT:
    """Return the config with the fields of all open overrides replaced."""
    for fields in _local.__dict__.get("overrides", ()):
        known = [field.name for field in dataclasses.fields(config)]
        if unknown := [name for name in fields if name not in known]:
            expected = f"fields of {type(config).__name__} ({', '.join(known)})"
            raise TypeError(describe("override", expected, ", ".join(unknown)))
        config = dataclasses.replace(config, **fields)
    return config
