"""`cute_ssm.selective_state_update`."""

from __future__ import annotations

from cute_ssm.ops._operator import Operator
from cute_ssm.ops.selective_state_update.config import SelectiveStepConfig
from cute_ssm.ops.selective_state_update.spec import SelectiveStateUpdateSpec

OPERATOR = Operator(
    package=__name__,
    functions=("selective_state_update",),
    spec=SelectiveStateUpdateSpec,
    config=SelectiveStepConfig,
    kernel="SelectiveStep",
)
