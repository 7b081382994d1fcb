"""`cute_ssm.checkpointing_ssu` and `cute_ssm.checkpointing_ssu_ring`."""

from __future__ import annotations

from cute_ssm.ops._operator import Operator

OPERATOR = Operator(
    package=__name__,
    functions=("checkpointing_ssu", "checkpointing_ssu_ring"),
    spec="CheckpointingSSUSpec",
    config="CheckpointingSSUConfig",
    kernel="CheckpointingSSU",
)
