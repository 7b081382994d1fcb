"""`cute_ssm.serving.materialize_layers`."""

from __future__ import annotations

from cute_ssm.ops._operator import Operator

OPERATOR = Operator(
    package=__name__,
    functions=("materialize_layers",),
    spec="MaterializeLayersSpec",
    config="cute_ssm.ops.materialize.config:MaterializeConfig",
    kernel="MaterializeLayers",
    home="cute_ssm.serving",
    workload=False,
)
