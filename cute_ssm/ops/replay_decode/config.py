"""The config of `ReplayDecode`; results do not depend on it."""

from __future__ import annotations

from dataclasses import dataclass

from cute_ssm.arch import WARP, Arch
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.spec import Config, Spec
from cute_ssm.tuning import apply_override

MOST_TOKENS = 2 * WARP  # of a window; each lane of a warp computes the weights of two


@dataclass(frozen=True)
class ReplayDecodeConfig(Config):
    """Knobs of `ReplayDecode`.

    Attributes
    ----------
    warps : int
        Warps of a CTA; they work independently.
    """

    warps: int

    def check(self, spec: Spec, arch: Arch) -> None:
        """Raise `UnsupportedSpecError` if the kernel cannot run so."""
        if not 1 <= self.warps <= 8:
            raise UnsupportedSpecError(f"config: warps of {self} are not 1 to 8")


def choose_replay_decode() -> ReplayDecodeConfig:
    """Return the config of `ReplayDecode`."""
    return apply_override(ReplayDecodeConfig(warps=4))
