"""`cute_ssm.serving.materialize`."""

from __future__ import annotations

from cute_ssm.ops._operator import Operator

OPERATOR = Operator(
    package=__name__,
    functions=("materialize",),
    spec="MaterializeSpec",
    config="MaterializeConfig",
    kernel="MaterializeState",
    home="cute_ssm.serving",
    workload=False,
)
