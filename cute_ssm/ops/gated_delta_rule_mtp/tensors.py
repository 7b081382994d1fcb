"""The arguments of the kernel, by name."""

from typing import NamedTuple, Optional

import cutlass.cute as cute


class Tensors(NamedTuple):
    """Arguments of `cute_ssm.gated_delta_rule_mtp`."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    initial_state: cute.Tensor
    initial_state_indices: cute.Tensor
    A_log: cute.Tensor
    a: cute.Tensor
    dt_bias: cute.Tensor
    b: cute.Tensor
    output: cute.Tensor
    intermediate_states_buffer: Optional[cute.Tensor]
    ssm_state_indices: Optional[cute.Tensor]
    output_state_indices: Optional[cute.Tensor]
    accepted_steps: Optional[cute.Tensor]
