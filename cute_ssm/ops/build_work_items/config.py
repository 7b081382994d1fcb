"""The choice of the config of `BuildWorkItems`."""

from __future__ import annotations

from cute_ssm.arch import WARP
from cute_ssm.ops._cursors.config import FEW_ROWS, MOST_WARPS, CursorConfig
from cute_ssm.tuning import apply_override


def choose_work_items(batch: int) -> CursorConfig:
    """Return the config of `BuildWorkItems`, whose only CTA walks over the batch: large, unless there is little."""
    return apply_override(CursorConfig(warps=FEW_ROWS // WARP if batch <= FEW_ROWS else MOST_WARPS))
