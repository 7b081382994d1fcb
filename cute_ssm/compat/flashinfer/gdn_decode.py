"""Functions with the signatures and conventions of ``flashinfer.gdn_decode``."""

from __future__ import annotations

from torch import Tensor

from cute_ssm.ops.gated_delta_rule_mtp.operator import gated_delta_rule_mtp as _mtp


def gated_delta_rule_mtp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor,
    initial_state_indices: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    output: Tensor | None = None,
    intermediate_states_buffer: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    disable_state_update: bool | None = None,
    use_qk_l2norm: bool = True,
    output_state_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run 1 to 16 tokens of the gated delta rule for every request, like FlashInfer's function of this name.

    Parameters and results are those of `cute_ssm.gated_delta_rule_mtp`.  As in FlashInfer, ``output_state_indices`` on
    another device, or of another integer dtype than ``initial_state_indices``, is converted.

    Notes
    -----
    Differences from FlashInfer:

    * States may be bfloat16 or float16.
    * float16 inputs are not rounded to bfloat16.
    * Negative entries of ``ssm_state_indices`` are skipped.
    * An intermediate buffer may have more tokens per row than the call.
    * Every pool may be strided.
    * K and V may be any multiples of 16 up to 256, V also 512.
    * Indices on the CPU are checked.
    """
    if isinstance(output_state_indices, Tensor) and isinstance(initial_state_indices, Tensor):
        output_state_indices = output_state_indices.to(initial_state_indices)
    return _mtp(
        q, k, v, initial_state, initial_state_indices, A_log, a, dt_bias, b, scale, output, intermediate_states_buffer,
        ssm_state_indices, disable_state_update, use_qk_l2norm, output_state_indices,
    )  # fmt: skip
