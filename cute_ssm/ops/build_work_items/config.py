"""The choice of the config of `BuildWorkItems`."""

from __future__ import annotations

from cute_ssm.arch import WARP
from cute_ssm.ops._cursors.config import FEW_ROWS, MOST_WARPS, CursorConfig
from cute_ssm.tuning import apply_override


def choose_work_items(batch: int) -> CursorConfig:
    """Return the config of `BuildWorkItems`, which runs in one CTA: a small CTA for small batches, else the largest."""
    return apply_override(CursorConfig(warps=FEW_ROWS // WARP if batch <= FEW_ROWS else MOST_WARPS))
