"""`cute_ssm.serving.build_work_items`."""

from __future__ import annotations

from cute_ssm.ops._cursors.config import CursorConfig
from cute_ssm.ops._operator import Operator
from cute_ssm.ops.build_work_items.spec import WorkItemsSpec

OPERATOR = Operator(
    package=__name__,
    functions=("build_work_items",),
    spec=WorkItemsSpec,
    config=CursorConfig,
    kernel="BuildWorkItems",
    home="cute_ssm.serving",
    workload=False,
)
