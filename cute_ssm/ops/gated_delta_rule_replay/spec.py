"""The spec of `cute_ssm.gated_delta_rule_replay`."""

from __future__ import annotations

from dataclasses import dataclass

from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.ops._gated_delta.spec import WINDOW_BUCKETS, GatedDeltaSpec


@dataclass(frozen=True)
class GatedDeltaRuleReplaySpec(GatedDeltaSpec):
    """Up to 16 tokens per request of `cute_ssm.gated_delta_rule_replay`, after up to 64 pending ones.

    Attributes
    ----------
    window : int
        Largest number of pending tokens, one of `WINDOW_BUCKETS`; the window itself is dynamic.
    """

    window: int

    @property
    def op(self) -> str:
        return "gated_delta_rule_replay"

    @property
    def pending_tokens(self) -> int:
        return self.window

    def text(self) -> str:
        return f"{super().text()}-{self.window}"

    def check(self) -> None:
        super().check()
        if self.window not in WINDOW_BUCKETS:
            raise UnsupportedSpecError(describe("window", f"one of {WINDOW_BUCKETS}", self.window))
