"""The smallest kernel the runtime can serve: out = factor * x.  Importing this module imports the compiler."""

import cutlass
import cutlass.cute as cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from tiny_spec import TinyConfig


class Tiny:
    def __init__(self, spec, config, arch):
        self.dtype = {"float32": cutlass.Float32, "float16": cutlass.Float16}[spec.dtype]
        self.factor = spec.factor
        self.threads = config.threads

    @staticmethod
    def default_config(spec, arch, units=None):
        return TinyConfig()

    def fakes(self):
        n = cute.sym_int64()
        x, out = (make_fake_tensor(self.dtype, (n,), (1,)) for _ in range(2))
        return x, out, make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(self, x: cute.Tensor, out: cute.Tensor, stream):
        grid = (cute.ceil_div(cute.size(x), self.threads), 1, 1)
        self.kernel(x, out).launch(grid=grid, block=(self.threads, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, x: cute.Tensor, out: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        i = block * self.threads + thread
        if i < cute.size(x):
            out[i] = x[i] * self.dtype(self.factor)
