"""The spec of `cute_ssm.gated_delta_rule_replay`."""

from __future__ import annotations

from dataclasses import dataclass

from cute_ssm.ops._gated_delta.spec import GatedDeltaSpec, Sizes, check_window


@dataclass(frozen=True)
class GatedDeltaRuleReplaySpec(GatedDeltaSpec):
    """A call of `cute_ssm.gated_delta_rule_replay`: up to 16 tokens per request, after up to 64 pending ones.

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
    def sizes(self) -> Sizes:
        return super().sizes._replace(pending_tokens=self.window)

    def text(self) -> str:
        return f"{super().text()}-{self.window}"

    def check(self) -> None:
        super().check()
        check_window(self.window)
