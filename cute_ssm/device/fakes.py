"""`fake`: the tensors that a kernel is compiled for, used by the `fakes` of kernels."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import cutlass.cute as cute
from cutlass import Numeric
from cutlass.cute.runtime import make_fake_tensor

from cute_ssm.device import convert

if TYPE_CHECKING:
    from cute_ssm.ops._table import Table


def fake(
    dtype: type[Numeric] | str, shape: tuple[int | cute.SymInt, ...], inner: tuple[int, ...] = (), align: int = 1
) -> cute.Tensor:
    """Return a tensor without data, with symbolic strides except for the innermost ones, which `inner` gives.

    Its address and its symbolic strides are multiples of `align` elements.  `dtype` is a type or its name.
    """
    dtype = convert.DTYPES[dtype] if isinstance(dtype, str) else dtype
    outer = tuple(cute.sym_int64(divisibility=align) for _ in shape[len(inner) :])
    return make_fake_tensor(dtype, shape, outer + inner, assumed_align=align * dtype.width // 8)


class Layout(NamedTuple):
    """What a kernel knows of a tensor's memory beyond its argument table.

    Attributes
    ----------
    inner : tuple of int
        Strides of the innermost dimensions; the others are dynamic.
    align : int
        Elements that the address and the dynamic strides are multiples of.
    """

    inner: tuple[int, ...] = ()
    align: int = 1


def of_table(
    table: "Table",
    dtypes: Mapping[str, type[Numeric] | str | None],
    sizes: Mapping[str, int | str],
    axes: Mapping[str, tuple[str, ...]] | None = None,
    layouts: Mapping[str, Layout] | None = None,
) -> tuple[cute.Tensor | None, ...]:
    """Return the tensors of an argument table as the compiler sees them, in the order of the table.

    Parameters
    ----------
    table : Table
        Its shapes, contiguous dimensions and alignments hold unless `layouts` says otherwise.
    dtypes : mapping
        Types of the tensors; None: the argument is absent.  A tensor that is not named has the type of the argument
        that the table calls it `like`, or the only type that the table allows.
    sizes : mapping
        Static sizes of axes; or the name of another axis, where both are one.  Axes that are not named are dynamic,
        and equal where their names are.
    axes : mapping, optional
        What ``*name`` stands for in shapes.
    layouts : mapping, optional
        Layouts of tensors of which a kernel knows more, or less, than the table.
    """
    dynamic: dict[str, cute.SymInt] = {}

    def size(axis: str) -> int | cute.SymInt:
        if axis.isdigit():
            return int(axis)
        if "+" in axis:
            return cute.sym_int32()
        known = sizes.get(axis, axis)
        if isinstance(known, int):
            return known
        return dynamic[known] if known in dynamic else dynamic.setdefault(known, cute.sym_int32())

    found: list[cute.Tensor | None] = []
    for name, arg in table.tensors.items():
        dtype = dtypes[name] if name in dtypes else dtypes[arg.like] if arg.like else arg.dtypes[0]
        if dtype is None:
            found.append(None)
            continue
        dtype = convert.DTYPES[dtype] if isinstance(dtype, str) else dtype
        letters = [
            letter for axis in arg.axes for letter in ((axes or {})[axis[1:]] if axis.startswith("*") else (axis,))
        ]
        shape = tuple(size(letter) for letter in letters)
        layout = (layouts or {}).get(name)
        if layout is None:
            inner: list[int] = [1] * bool(arg.contiguous)
            for extent in reversed(shape[len(shape) - arg.contiguous + 1 :] if arg.contiguous else ()):
                if not isinstance(extent, int):
                    raise TypeError(f"{name}: a contiguous dimension of {arg.shape!r} has no static size")
                inner.insert(0, inner[0] * extent)
            layout = Layout(tuple(inner), max(arg.align * 8 // dtype.width, arg.align_elements, 1))
        found.append(fake(dtype, shape, *layout))
    return tuple(found)
