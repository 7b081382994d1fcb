"""`cute_ssm.serving.build_work_items`."""

from __future__ import annotations

from cute_ssm.ops._operator import Operator

OPERATOR = Operator(
    package=__name__,
    functions=("build_work_items",),
    spec="WorkItemsSpec",
    config="CursorConfig",
    kernel="BuildWorkItems",
    home="cute_ssm.serving",
    workload=False,
)
