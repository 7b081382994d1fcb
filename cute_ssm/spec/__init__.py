"""What a kernel computes (spec) and how fast (config): frozen, hashable, free of torch and of the compiler.

Spec, config and target together are the only input of a compile, so they are the cache key by construction.  Batch,
slots and strides are in neither: they are dynamic.
"""

from cute_ssm.spec.base import (
    FLOATS,
    ITEMSIZE,
    QUANTISED,
    ROW_ALIGNMENTS,
    Config,
    Spec,
    check_alignment,
    digest,
)
from cute_ssm.spec.operators import (
    CHECKPOINT_DSTATES,
    CHECKPOINT_TOKENS,
    DELTA_SIZES,
    EARLY_READS,
    TOKEN_BUCKETS,
    WAIT_FIRST,
    WINDOW_BUCKETS,
    CheckpointingSSUSpec,
    GatedDeltaRuleReplaySpec,
    GatedDeltaRuleSpec,
    GatedDeltaSpec,
    SelectiveScanSpec,
    SelectiveStateUpdateSpec,
    token_bucket,
    window_bucket,
)
from cute_ssm.spec.serving import (
    CommitSpec,
    CursorSpec,
    MaterializeGatedDeltaSpec,
    MaterializeSpec,
    WorkItemsSpec,
)

__all__ = [
    "CHECKPOINT_DSTATES",
    "CHECKPOINT_TOKENS",
    "DELTA_SIZES",
    "EARLY_READS",
    "FLOATS",
    "ITEMSIZE",
    "QUANTISED",
    "ROW_ALIGNMENTS",
    "TOKEN_BUCKETS",
    "WAIT_FIRST",
    "WINDOW_BUCKETS",
    "CheckpointingSSUSpec",
    "CommitSpec",
    "Config",
    "CursorSpec",
    "GatedDeltaRuleReplaySpec",
    "GatedDeltaRuleSpec",
    "GatedDeltaSpec",
    "MaterializeGatedDeltaSpec",
    "MaterializeSpec",
    "SelectiveScanSpec",
    "SelectiveStateUpdateSpec",
    "Spec",
    "WorkItemsSpec",
    "check_alignment",
    "digest",
    "token_bucket",
    "window_bucket",
]
