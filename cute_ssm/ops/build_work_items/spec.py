"""The spec of `cute_ssm.serving.build_work_items`."""

from __future__ import annotations

from dataclasses import dataclass

from cute_ssm.ops._cursors.spec import CursorSpec


@dataclass(frozen=True)
class WorkItemsSpec(CursorSpec):
    """A call of `cute_ssm.serving.build_work_items`."""

    @property
    def op(self) -> str:
        return "serving_build_work_items"
