"""The config of `ReplayDecode`; results do not depend on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cute_ssm.arch import WARP, Arch
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.spec import Config, Spec
from cute_ssm.tuning import apply_override, tables

MOST_TOKENS = 2 * WARP  # of a window; each lane of a warp computes the weights of two
MOST_WARPS = 8


@dataclass(frozen=True)
class ReplayDecodeConfig(Config):
    """Knobs of `ReplayDecode`.

    Attributes
    ----------
    warps : int
        Warps of a CTA; they work independently.
    """

    FREE: ClassVar[tuple[str, ...]] = ("warps",)
    KEY: ClassVar[tuple[str, ...]] = ("state_dtype", "dim", "dstate")

    warps: int

    def check(self, spec: Spec, arch: Arch) -> None:
        """Raise `UnsupportedSpecError` if the kernel cannot run so."""
        if not 1 <= self.warps <= MOST_WARPS:
            raise UnsupportedSpecError(f"config: warps of {self} are not 1 to {MOST_WARPS}")

    @classmethod
    def space(cls, spec: Spec, arch: Arch) -> dict[str, tuple[int, ...]]:
        """Return the values that the tuner tries for each field of `FREE`."""
        return {"warps": tuple(range(1, MOST_WARPS + 1))}


def choose_replay_decode(spec: Spec, arch: Arch, heads: int) -> ReplayDecodeConfig:
    """Return the config for ``heads`` (sequence, head) pairs.

    A tuning table takes precedence over the rule, and `tuning.override` over both.
    """
    rule = ReplayDecodeConfig(warps=4)
    return apply_override(tables.tuned(rule, spec, arch, heads, ReplayDecodeConfig.FREE))
