"""`cute_ssm.gated_delta_rule_mtp`."""

from __future__ import annotations

from cute_ssm.ops._gated_delta.config import GatedDeltaRuleConfig
from cute_ssm.ops._operator import Operator
from cute_ssm.ops.gated_delta_rule_mtp.spec import GatedDeltaRuleSpec

OPERATOR = Operator(
    package=__name__,
    functions=("gated_delta_rule_mtp",),
    spec=GatedDeltaRuleSpec,
    config=GatedDeltaRuleConfig,
    kernel="GatedDeltaRule",
)
