"""The operators, a folder each.  `OPERATORS` is the one list that names them.

A folder holds ``spec.py``, ``config.py``, ``reference.py`` (the mathematics), ``kernel.py`` and the files of its roles,
``operator.py`` (signature, docstring, checks), ``workload.py`` where it is warmed up and tuned, and, in
``__init__.py``, its descriptor.  Modules with a leading underscore are what several operators share.
"""

from __future__ import annotations

import functools
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cute_ssm.ops._operator import Operator

OPERATORS = (
    "selective_state_update",
    "checkpointing_ssu",
    "selective_scan",
    "gated_delta_rule_mtp",
    "gated_delta_rule_replay",
    "replay_decode",
    "commit",
    "build_work_items",
    "materialize",
    "materialize_layers",
    "materialize_gated_delta",
)


@functools.cache
def operators() -> tuple[Operator, ...]:
    """Return the descriptors of all operators; imports nothing but them."""
    return tuple(import_module(f"{__name__}.{name}").OPERATOR for name in OPERATORS)
