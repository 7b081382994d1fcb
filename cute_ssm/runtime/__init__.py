"""From a spec to a callable kernel: compile once, cache in memory and on disk, load from there afterwards."""

from __future__ import annotations

from cute_ssm.runtime.emulation import emulated as emulated
from cute_ssm.runtime.emulation import emulator as emulator
from cute_ssm.runtime.emulation import forget as forget
from cute_ssm.runtime.emulation import planned as planned
from cute_ssm.runtime.lookup import LOADING as LOADING
from cute_ssm.runtime.lookup import bundle_to as bundle_to
from cute_ssm.runtime.lookup import by_reference as by_reference
from cute_ssm.runtime.lookup import compile_to as compile_to
from cute_ssm.runtime.lookup import get as get
from cute_ssm.runtime.lookup import prepare as prepare
from cute_ssm.runtime.lookup import target as target

__all__ = [
    "LOADING",
    "bundle_to",
    "by_reference",
    "compile_to",
    "emulated",
    "emulator",
    "forget",
    "get",
    "planned",
    "prepare",
    "target",
]
