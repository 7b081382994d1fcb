"""`cute_ssm.selective_state_update`."""

from __future__ import annotations

from cute_ssm.ops._operator import Operator

OPERATOR = Operator(
    package=__name__,
    functions=("selective_state_update",),
    spec="SelectiveStateUpdateSpec",
    config="SelectiveStepConfig",
    kernel="SelectiveStep",
)
