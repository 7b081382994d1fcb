"""The arguments of the kernel, by name."""

from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Int32

from cute_ssm.device import memory
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
    cu_seqlens: Maybe[cute.Tensor]

    def of_request(self, first: Int32, count: Int32) -> "Tensors":
        """Return the tensors with `count` packed tokens from `first` on as those of every request."""
        packed = (self.q, self.k, self.v, self.a, self.b, self.output)
        q, k, v, a, b, output = (_from_token(tensor, first, count, 0) for tensor in packed)
        return self._replace(q=q, k=k, v=v, a=a, b=b, output=output)

    def of_chunk(self, first: Int32, count: Int32) -> "Tensors":
        """Return the tensors with `count` tokens of every request from its token `first` on."""
        names = ("q", "k", "v", "a", "b", "output", "intermediate_states_buffer", "ssm_state_indices")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return self._replace(**{name: _from_token(x, first, count, x.stride[0]) for name, x in given.items()})


def _from_token(tensor: cute.Tensor, first: Int32, count: Int32, request_stride: Any) -> cute.Tensor:
    """Return a tensor (requests, tokens, ...) that starts with token `first` and has `count` of them."""
    shape, stride = tensor.shape, tensor.stride
    start = memory.address(tensor, 0, first, *[0] * (len(shape) - 2))
    return cute.make_tensor(
        start, cute.make_layout((shape[0], count, *shape[2:]), stride=(request_stride, *stride[1:]))
    )
