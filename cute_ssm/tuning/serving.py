"""Configs of the kernels of `cute_ssm.serving`; none of their bits depend on them."""

from __future__ import annotations

from dataclasses import dataclass

from cute_ssm.arch import Arch
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.spec import Config, Spec
from cute_ssm.tuning import apply_override

WARP = 32
MOST_PENDING = 2 * WARP  # tokens that a lane of a warp holds two of
MOST_TOKENS = 1 << 20  # new tokens of a row: more are offsets that hold something else
MOST_WARPS = 32  # of a CTA
FEW_ROWS = 128  # of a batch, for which a small CTA is enough


@dataclass(frozen=True)
class CursorConfig(Config):
    """Knobs of `CommitCursors` and `BuildWorkItems`.

    Attributes
    ----------
    warps : int
        Warps of a CTA.
    """

    warps: int

    def check(self, spec: Spec, arch: Arch) -> None:
        """Raise `UnsupportedSpecError` if the kernel cannot run so."""
        if not 1 <= self.warps <= MOST_WARPS:
            raise UnsupportedSpecError(f"config: warps of {self} are not 1 to {MOST_WARPS}")


def choose_commit() -> CursorConfig:
    """Return the config of `CommitCursors`: CTAs of 128 rows of the batch."""
    return apply_override(CursorConfig(warps=4))


def choose_work_items(batch: int) -> CursorConfig:
    """Return the config of `BuildWorkItems`, whose only CTA walks over the batch: large, unless there is little."""
    return apply_override(CursorConfig(warps=FEW_ROWS // WARP if batch <= FEW_ROWS else MOST_WARPS))


@dataclass(frozen=True)
class MaterializeConfig(Config):
    """Knobs of `MaterializeState`.

    Attributes
    ----------
    warps : int
        Warps of a CTA, which have nothing in common.
    """

    warps: int

    def check(self, spec: Spec, arch: Arch) -> None:
        """Raise `UnsupportedSpecError` if the kernel cannot run so."""
        if not 1 <= self.warps <= 8:
            raise UnsupportedSpecError(f"config: warps of {self} are not 1 to 8")


def choose_materialize() -> MaterializeConfig:
    """Return the config of `MaterializeState`."""
    return apply_override(MaterializeConfig(warps=4))
