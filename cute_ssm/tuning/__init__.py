"""Spec to config: which values of the performance knobs a call gets.  Free of torch and of the compiler.

The module of a config has its class, whose ``check(spec, arch)`` raises `UnsupportedSpecError` if the kernel cannot
run so; a rule; and ``choose``, which takes what the rule says, asks `tables.tuned`, and applies overrides.  For the
tuner it also has ``FREE``, the fields that change no bit of a result; ``space(spec, arch)``, the values to try for each
of them; ``KEY``, the fields of a spec that the best config depends on, which rows of tables name; and, where they say
something, ``inert(config)``, the fields that mean nothing beside the others, and ``fits(config, spec, arch)``, whether
the GPU can do what the config promises.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from cute_ssm.spec import Config

ConfigT = TypeVar("ConfigT", bound=Config)
_local = threading.local()  # .overrides: those that this thread has open


@contextmanager
def override(**fields: int | str) -> Iterator[None]:
    """Replace fields of every config chosen inside the context, e.g. ``override(rows=16, stages=3)``.

    Holds for this thread.  A config that a kernel cannot run raises `UnsupportedSpecError`; one that has no such
    field raises TypeError.
    """
    opened = _local.__dict__.setdefault("overrides", [])
    opened.append(fields)
    try:
        yield
    finally:
        opened.pop()


def overridden() -> bool:
    """Whether an `override` is open, so that memorised choices do not hold."""
    return bool(_local.__dict__.get("overrides"))


def apply_override(config: ConfigT) -> ConfigT:
    """Return the config with the fields of all open overrides replaced."""
    for fields in _local.__dict__.get("overrides", ()):
        config = dataclasses.replace(config, **fields)
    return config
