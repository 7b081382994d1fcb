"""The config of the kernels over the cursors of a batch; results do not depend on it."""

from __future__ import annotations

from dataclasses import dataclass

from cute_ssm.arch import Arch
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.spec import Config, Spec

MOST_TOKENS = 1 << 20  # new tokens of a row; larger differences of offsets are taken for invalid offsets
MOST_WARPS = 32  # of a CTA
FEW_ROWS = 128  # largest batch for which a small CTA is enough


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
