"""A small kernel of CuTe DSL, called as a published one is: compiled for the open session's architecture."""

import torch
from cutlass import Float32, Int32, cute

import ptxsim


@cute.kernel
def double(x: cute.Tensor):
    cta, thread = cute.arch.block_idx()[0], cute.arch.thread_idx()[0]
    x[cta * 32 + thread] = x[cta * 32 + thread] * Float32(2)


@cute.jit
def launch(x: cute.Tensor, ctas: Int32, stream):
    double(x).launch(grid=(ctas, 1, 1), block=(32, 1, 1), stream=stream)


def doubled() -> None:
    """Double the elements of 296 CTAs, two for each SM of a B200."""
    fake = cute.runtime.make_fake_tensor(Float32, (cute.sym_int(),), stride=(1,))
    compiled = ptxsim.compile(
        launch, fake, Int32(1), cute.runtime.make_fake_stream(), arch=ptxsim.current().arch, source_lines=False
    )
    compiled(torch.ones(296 * 32), 296)
