"""`fake`: tensors as the compiler sees them, for the `fakes` of kernels."""

import cutlass.cute as cute
from cutlass.cute.runtime import make_fake_tensor

from cute_ssm.device import convert


def fake(dtype, shape, inner=(), align=1):
    """A tensor with free strides but for the innermost ones given, for accesses of `align` elements.

    `dtype` is a type or its name.
    """
    dtype = convert.DTYPES[dtype] if isinstance(dtype, str) else dtype
    outer = tuple(cute.sym_int64(divisibility=align) for _ in shape[len(inner) :])
    return make_fake_tensor(dtype, shape, outer + inner, assumed_align=align * dtype.width // 8)
