"""`fake`: the tensors that a kernel is compiled for, used by the `fakes` of kernels."""

import cutlass.cute as cute
from cutlass import Numeric
from cutlass.cute.runtime import make_fake_tensor

from cute_ssm.device import convert


def fake(
    dtype: type[Numeric] | str, shape: tuple[int | cute.SymInt, ...], inner: tuple[int, ...] = (), align: int = 1
) -> cute.Tensor:
    """Return a tensor without data, with symbolic strides except for the innermost ones, which `inner` gives.

    Its address and its symbolic strides are multiples of `align` elements.  `dtype` is a type or its name.
    """
    dtype = convert.DTYPES[dtype] if isinstance(dtype, str) else dtype
    outer = tuple(cute.sym_int64(divisibility=align) for _ in shape[len(inner) :])
    return make_fake_tensor(dtype, shape, outer + inner, assumed_align=align * dtype.width // 8)
