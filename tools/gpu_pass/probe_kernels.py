"""The kernels of `probes`.  Importing this module imports the compiler."""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32
from cutlass.cute.runtime import make_fake_stream
from cutlass.cutlass_dsl import T, dsl_user_op

from cute_ssm.arch import WARP
from cute_ssm.device import memory, mma
from cute_ssm.device.asm import pure
from cute_ssm.device.convert import as_float
from cute_ssm.device.fakes import fake
from gpu_pass.probes import FUNCTIONS, OPERANDS, ProbeConfig

_BLOCK = 256  # instructions of one text of inline PTX
_CHAINS = 8


@dsl_user_op
def _approximate(name: str, x: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    return Float32(pure(T.f32(), [x], f"{name}.approx.ftz.f32 $0, $1;", "=f,f", loc, ip))


@dsl_user_op
def _chained(x: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    """Return x after `_BLOCK` dependent multiply-adds in `_CHAINS` chains."""
    lines = [".reg .f32 c<8>;", *(f"mov.f32 c{i}, $1;" for i in range(_CHAINS))]
    lines += [f"fma.rn.f32 c{i % _CHAINS}, c{i % _CHAINS}, c{(i + 3) % _CHAINS}, $1;" for i in range(_BLOCK)]
    lines += ["mov.f32 $0, c0;", *(f"add.f32 $0, $0, c{i};" for i in range(1, _CHAINS))]
    return Float32(pure(T.f32(), [x], "{ " + " ".join(lines) + " }", "=&f,f", loc, ip))


class _Kernel:
    def __init__(self, spec, config, arch):
        self.spec = spec

    @staticmethod
    def default_config(spec, arch, units=None):
        return ProbeConfig()


class Approximate(_Kernel):
    """One value of each function per thread; the number of values is a multiple of a warp's lanes."""

    def fakes(self):
        shape = (len(FUNCTIONS), cute.sym_int32())
        return fake(Float32, shape, (1,)), fake(Float32, shape, (1,)), make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(self, x: cute.Tensor, out: cute.Tensor, stream):
        self.kernel(x, out).launch(grid=[x.shape[1] // WARP, 1, 1], block=[WARP, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, x: cute.Tensor, out: cute.Tensor):
        i = cute.arch.block_idx()[0] * WARP + cute.arch.thread_idx()[0]
        for f in cutlass.range_constexpr(len(FUNCTIONS)):
            memory.store_scalar(memory.address(out, f, i), _approximate(FUNCTIONS[f], x[f, i]), Float32)


class Matrix(_Kernel):
    """One instruction per warp: m16n8k16 of 16-bit operands, m16n8k8 of tf32."""

    def fakes(self):
        count = cute.sym_int32()
        a, b = OPERANDS[self.spec.operands]
        tensors = [fake(Int32, (count, WARP, n), (n, 1)) for n in (a, b)]
        tensors += [fake(Float32, (count, WARP, 4), (4, 1)) for _ in range(2)]
        return *tensors, make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(self, a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, d: cute.Tensor, stream):
        self.kernel(a, b, c, d).launch(grid=[a.shape[0], 1, 1], block=[WARP, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, d: cute.Tensor):
        i, lane = cute.arch.block_idx()[0], cute.arch.thread_idx()[0]
        words = [[tensor[i, lane, n] for n in range(tensor.shape[2])] for tensor in (a, b)]
        sums = [c[i, lane, n] for n in range(4)]
        if cutlass.const_expr(self.spec.operands == "tf32"):
            floats = [[as_float(word) for word in part] for part in words]
            results = mma.mma_tf32(*floats, sums)
        else:
            kind = BFloat16 if self.spec.operands == "bfloat16" else Float16
            results = mma.mma_16(*words, sums, kind)
        for n in cutlass.range_constexpr(4):
            memory.store_scalar(memory.address(d, i, lane, n), results[n], Float32)


class Long(_Kernel):
    """A warp per element of x, each through all instructions; x is changed."""

    def fakes(self):
        return fake(Float32, (cute.sym_int32(),), (1,)), make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(self, x: cute.Tensor, stream):
        self.kernel(x).launch(grid=[x.shape[0], 1, 1], block=[WARP, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, x: cute.Tensor):
        i = cute.arch.block_idx()[0]
        value = x[i]
        for _ in cutlass.range_constexpr(self.spec.instructions // _BLOCK):
            value = _chained(value)
        if cute.arch.thread_idx()[0] == 0:
            memory.store_scalar(memory.address(x, i), value, Float32)
