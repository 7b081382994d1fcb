"""`cute_ssm.compat.vllm.selective_state_update_replayssm_output_only`."""

from __future__ import annotations

from cute_ssm.ops._operator import Operator

OPERATOR = Operator(
    package=__name__,
    functions=("selective_state_update_replayssm_output_only",),
    spec="ReplayDecodeSpec",
    config="ReplayDecodeConfig",
    kernel="ReplayDecode",
    home="cute_ssm.compat.vllm",
)
