"""From a spec to a function that runs it: compile once, keep in memory and on disk, load everywhere else."""

from __future__ import annotations

from cute_ssm.runtime.emulation import emulated as emulated
from cute_ssm.runtime.emulation import emulator as emulator
from cute_ssm.runtime.lookup import compile_to as compile_to
from cute_ssm.runtime.lookup import forget as forget
from cute_ssm.runtime.lookup import get as get
from cute_ssm.runtime.lookup import target as target

__all__ = ["compile_to", "emulated", "emulator", "forget", "get", "target"]
