"""A Triton kernel with the signature of mamba_ssm's step, which halves the states of a batch and nothing else."""

import torch
import triton
import triton.language as tl


@triton.jit
def _halve(state, slots, size, BLOCK: tl.constexpr):
    slot = tl.load(slots + tl.program_id(1)).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(state + slot * size + at, mask=at < size)
    tl.store(state + slot * size + at, values * 0.5, mask=at < size)


def step(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None):
    """Launch the kernel for every slot of the batch."""
    size = state[0].numel()
    _halve[(triton.cdiv(size, 2048), x.shape[0])](state, state_batch_indices, size, BLOCK=2048, num_warps=4)
    return torch.empty_like(x)
