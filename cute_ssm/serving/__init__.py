"""What a serving engine needs around the operators with a history: pools of states, cursors, lists of work.

Everything that changes between steps of a model lies on the device, and no function that belongs to a step waits for
it: all of them can be captured in a CUDA graph.
"""

from __future__ import annotations

from cute_ssm.serving.cursors import build_work_items as build_work_items
from cute_ssm.serving.cursors import commit as commit
from cute_ssm.serving.gated_states import materialize_gated_delta as materialize_gated_delta
from cute_ssm.serving.pool import StatePool as StatePool
from cute_ssm.serving.states import materialize as materialize

__all__ = ["StatePool", "build_work_items", "commit", "materialize", "materialize_gated_delta"]
