"""`cute_ssm.serving.materialize_gated_delta`."""

from __future__ import annotations

from cute_ssm.ops._operator import Operator

OPERATOR = Operator(
    package=__name__,
    functions=("materialize_gated_delta",),
    spec="MaterializeGatedDeltaSpec",
    config="cute_ssm.ops._gated_delta.config:GatedDeltaRuleConfig",
    kernel="MaterializeGatedDelta",
    home="cute_ssm.serving",
    workload=False,
)
