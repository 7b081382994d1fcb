"""`cute_ssm.gated_delta_rule_mtp`."""

from __future__ import annotations

from cute_ssm.ops._operator import Operator

OPERATOR = Operator(
    package=__name__,
    functions=("gated_delta_rule_mtp",),
    spec="GatedDeltaRuleSpec",
    config="cute_ssm.ops._gated_delta.config:GatedDeltaRuleConfig",
    kernel="GatedDeltaRule",
)
