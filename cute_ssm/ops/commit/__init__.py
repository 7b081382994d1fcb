"""`cute_ssm.serving.commit`."""

from __future__ import annotations

from cute_ssm.ops._operator import Operator

OPERATOR = Operator(
    package=__name__,
    functions=("commit",),
    spec="CommitSpec",
    config="CursorConfig",
    kernel="CommitCursors",
    home="cute_ssm.serving",
    workload=False,
)
