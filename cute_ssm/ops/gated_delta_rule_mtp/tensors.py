"""The arguments of the kernel, by name."""

from typing import NamedTuple

import cutlass.cute as cute

from cute_ssm.device.types import Maybe


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
    intermediate_states_buffer: Maybe[cute.Tensor]
    ssm_state_indices: Maybe[cute.Tensor]
    output_state_indices: Maybe[cute.Tensor]
    accepted_steps: Maybe[cute.Tensor]
