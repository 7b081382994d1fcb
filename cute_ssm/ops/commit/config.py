"""The choice of the config of `CommitCursors`."""

from __future__ import annotations

from cute_ssm.ops._cursors.config import CursorConfig
from cute_ssm.tuning import apply_override


def choose_commit() -> CursorConfig:
    """Return the config of `CommitCursors`: CTAs of 128 rows of the batch."""
    return apply_override(CursorConfig(warps=4))
