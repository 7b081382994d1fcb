"""`cute_ssm.gated_delta_rule_replay`."""

from __future__ import annotations

from cute_ssm.ops._gated_delta.config import GatedDeltaRuleConfig
from cute_ssm.ops._operator import Operator
from cute_ssm.ops.gated_delta_rule_replay.spec import GatedDeltaRuleReplaySpec

OPERATOR = Operator(
    package=__name__,
    functions=("gated_delta_rule_replay",),
    spec=GatedDeltaRuleReplaySpec,
    config=GatedDeltaRuleConfig,
    kernel="GatedDeltaRuleReplay",
)
