"""Support for serving engines around the operators that defer state writes: state pools, cursors, lists of work.

Everything that changes between steps of a model is on the device, and no function that belongs to a step synchronises
with it: steps can be captured in a CUDA graph.
"""

from __future__ import annotations

from cute_ssm.ops.build_work_items.operator import build_work_items as build_work_items
from cute_ssm.ops.commit.operator import commit as commit
from cute_ssm.ops.materialize.operator import materialize as materialize
from cute_ssm.ops.materialize_gated_delta.operator import materialize_gated_delta as materialize_gated_delta
from cute_ssm.ops.materialize_layers.operator import materialize_layers as materialize_layers
from cute_ssm.serving.pool import StatePool as StatePool

__all__ = ["StatePool", "build_work_items", "commit", "materialize", "materialize_gated_delta", "materialize_layers"]
