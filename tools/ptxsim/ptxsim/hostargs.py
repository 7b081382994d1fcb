"""Arguments of a compiled CuTe DSL function: what the fakes promised, checked and packed for the compiled host code.

A tensor reaches the host code as a descriptor: the data pointer, then the dynamic sizes, then the dynamic strides.
Sizes and strides are two groups (LLVM structs); members have the width of their SymInt, and each group is aligned and
padded to its widest member.  Static sizes and strides are part of the compiled code and therefore not passed.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Symbol:
    """A SymInt, by identity: one object per SymInt of a compile."""

    width: int
    divisibility: int


class Symbols:
    """Values that SymInts took so far in one call; a SymInt used twice must have one value."""

    def __init__(self):
        self.values = {}

    def bind(self, symbol, value, where):
        """Check divisibility, range and agreement of one symbolic integer."""
        if value % symbol.divisibility:
            raise ValueError(f"{where} is {value}, which is not divisible by {symbol.divisibility}")
        if not -(1 << symbol.width - 1) <= value < 1 << symbol.width - 1:
            raise ValueError(f"{where} is {value}, which does not fit in {symbol.width} bits")
        known = self.values.setdefault(id(symbol), (value, where))
        if known[0] != value:
            raise ValueError(f"{where} is {value}, but must equal {known[1]}, which is {known[0]}")


class NoneSpec:
    """An argument that was None at compile time.  ``optional``: the call may leave it out."""

    optional = True

    def __init__(self, name):
        self.name = name

    def pack(self, value, symbols, keep):
        if value is not None:
            raise TypeError(f"{self.name}: expected None, as at compile time, got {type(value).__name__}")
        return []

    def tensors(self, value):
        return []


class ConstantSpec(NoneSpec):
    """A compile-time constant: the call repeats the value or passes None."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def pack(self, value, symbols, keep):
        if value is not None and value != self.value:
            raise ValueError(f"{self.name}: compiled for the constant {self.value!r}, got {value!r}")
        return []


class StreamSpec(NoneSpec):
    """A stream; whatever is passed is ignored."""

    def pack(self, value, symbols, keep):
        cell = ctypes.c_void_p(0)
        keep.append(cell)
        return [ctypes.addressof(cell)]


class ScalarSpec(NoneSpec):
    """A run-time number of a DSL type, or a SymInt (``symbol``)."""

    optional = False

    def __init__(self, name, kind, symbol=None):
        self.name, self.kind, self.symbol = name, kind, symbol

    def pack(self, value, symbols, keep):
        if (isinstance(value, bool) and self.kind.__name__ != "Boolean") or not isinstance(value, (bool, int, float)):
            if type(value) is not self.kind:
                raise TypeError(f"{self.name}: expected a number ({self.kind.__name__}), got {type(value).__name__}")
            value = value.value
        whole = getattr(self.kind, "is_integer", False)
        if whole and isinstance(value, float):
            raise TypeError(f"{self.name}: expected an integer ({self.kind.__name__}), got {value!r}")
        if whole and self.kind.__name__ != "Boolean":
            low = -(1 << self.kind.width - 1) if self.kind.signed else 0
            if not low <= value <= low + (1 << self.kind.width) - 1:
                raise ValueError(f"{self.name}: {value} does not fit {self.kind.__name__}")
        if self.symbol is not None:
            symbols.bind(self.symbol, value, self.name)
        number = self.kind(value)
        keep.append(number)
        return number.__c_pointers__()


class SequenceSpec(NoneSpec):
    """A tuple or list of arguments."""

    optional = False

    def __init__(self, name, items):
        self.name, self.items = name, items

    def pack(self, value, symbols, keep):
        if not isinstance(value, (tuple, list)) or len(value) != len(self.items):
            raise TypeError(f"{self.name}: expected a sequence of {len(self.items)}, got {value!r}")
        return [p for item, v in zip(self.items, value) for p in item.pack(v, symbols, keep)]

    def tensors(self, value):
        return [pair for item, v in zip(self.items, value) for pair in item.tensors(v)]


class TensorSpec(NoneSpec):
    """A tensor: element type, rank, static or symbolic sizes and strides, alignment."""

    optional = False

    def __init__(self, name, fake, symbols):
        self.name = name
        self.dtypes, self.bits = torch_dtypes(fake.element_type), fake.element_type.width
        self.kind = fake.element_type.__name__
        self.shape = tuple(_dimension(x, symbols) for x in fake.shape)
        self.stride = tuple(_dimension(x, symbols) for x in fake.stride)
        self.align = int(fake._assumed_align or 1)
        symbolic = [[x for x in group if not isinstance(x, int)] for group in (self.shape, self.stride)]
        self.layout, self.size = "<q", 8
        for group in symbolic:
            align = max([x.width // 8 for x in group], default=1)
            self._pad(align)
            for x in group:
                self._pad(x.width // 8)
                self.layout += "q" if x.width == 64 else "i"
                self.size += x.width // 8
            self._pad(align)

    def _pad(self, align):
        pad = -self.size % align
        self.layout += f"{pad}x"
        self.size += pad

    def tensors(self, value):
        return [(self.name, value)]

    def pack(self, value, symbols, keep):
        if not hasattr(value, "untyped_storage"):
            raise TypeError(f"{self.name}: expected a {self.kind} tensor, got {type(value).__name__}")
        if value.device.type != "cpu":
            raise ValueError(f"{self.name}: the emulator needs a CPU tensor, got one on {value.device}")
        if value.dtype not in self.dtypes:
            raise TypeError(f"{self.name}: expected dtype {self.kind}, got {value.dtype}")
        if value.dim() != len(self.shape):
            raise ValueError(f"{self.name}: expected {len(self.shape)} dimensions, got shape {tuple(value.shape)}")
        shape, stride, address = tuple(value.shape), value.stride(), value.data_ptr()
        dynamic = [address]
        for i, (want, got) in enumerate(zip(self.shape, shape)):
            if isinstance(want, int):
                if want != got:
                    raise ValueError(f"{self.name}.shape[{i}] is {got}, compiled for {want}")
            else:
                symbols.bind(want, got, f"{self.name}.shape[{i}]")
                dynamic.append(got)
        empty = 0 in shape
        for i, (want, got) in enumerate(zip(self.stride, stride)):
            free = empty or shape[i] == 1  # such a stride never multiplies anything but zero
            if isinstance(want, int):
                if want != got and not free:
                    raise ValueError(f"{self.name}.stride[{i}] is {got}, compiled for {want}")
                continue
            if free:
                got = 0 if got % want.divisibility or got >> want.width - 1 else got
            else:
                symbols.bind(want, got, f"{self.name}.stride[{i}]")
            dynamic.append(got)
        if address % self.align and not empty:
            raise ValueError(f"{self.name}: address 0x{address:x} is not aligned to {self.align} bytes")
        data = ctypes.create_string_buffer(struct.pack(self.layout, *dynamic), max(self.size, 16))
        keep.append(data)
        return [ctypes.addressof(data)]


_TORCH = {
    "Float64": ("float64",),
    "Float32": ("float32",),
    "TFloat32": ("float32",),
    "Float16": ("float16",),
    "BFloat16": ("bfloat16",),
    "Float8E4M3FN": ("float8_e4m3fn", "uint8"),
    "Float8E5M2": ("float8_e5m2", "uint8"),
    "Float8E8M0FNU": ("float8_e8m0fnu", "uint8"),
    "Int64": ("int64",),
    "Int32": ("int32",),
    "Int16": ("int16",),
    "Int8": ("int8",),
    "Uint64": ("uint64", "int64"),
    "Uint32": ("uint32", "int32"),
    "Uint16": ("uint16", "int16"),
    "Uint8": ("uint8", "bool"),
    "Boolean": ("bool",),
}


def torch_dtypes(kind):
    """The torch dtypes that may be passed for a DSL element type."""
    import torch

    names = _TORCH.get(kind.__name__)
    if names is None:
        raise TypeError(f"tensors of {kind.__name__} cannot be emulated")
    return tuple(getattr(torch, n) for n in names if hasattr(torch, n))


def _dimension(value, symbols):
    """A size or stride of a fake tensor: itself if static, else its Symbol."""
    if isinstance(value, int):
        return value
    if id(value) not in symbols:  # the SymInt is kept, so that its id stays its own
        symbols[id(value)] = Symbol(value.width, int(getattr(value, "divisibility", 1) or 1)), value
    return symbols[id(value)][0]


def describe(name, fake, annotation, symbols):
    """The spec of one argument from what was passed at compile time.

    ``symbols``: (Symbol, SymInt) of each SymInt met so far, by id, for all arguments of one compile.
    """
    from cutlass import Float32, Int32, Int64
    from cutlass.base_dsl.typing import Numeric
    from cutlass.cute.typing import SymInt

    if fake is None:
        return NoneSpec(name)
    if "Constexpr" in str(annotation):
        return ConstantSpec(name, fake)
    if hasattr(fake, "use_tvm_ffi_env_stream"):
        return StreamSpec(name)
    if hasattr(fake, "_typed_tensor"):
        return TensorSpec(name, fake, symbols)
    numeric = annotation if isinstance(annotation, type) and issubclass(annotation, Numeric) else None
    if isinstance(fake, SymInt):
        return ScalarSpec(name, numeric or (Int64 if fake.width == 64 else Int32), _dimension(fake, symbols))
    if isinstance(fake, Numeric):
        return ScalarSpec(name, numeric or type(fake))
    if isinstance(fake, (bool, int, float)):
        return ScalarSpec(name, numeric or (Float32 if isinstance(fake, float) else Int32))
    if isinstance(fake, (tuple, list)):
        if hasattr(fake, "_fields"):
            kinds = getattr(type(fake), "__annotations__", {})
            return SequenceSpec(
                name,
                [describe(f"{name}.{f}", v, kinds.get(f), symbols) for f, v in zip(fake._fields, fake, strict=True)],
            )
        return SequenceSpec(name, [describe(f"{name}[{i}]", item, None, symbols) for i, item in enumerate(fake)])
    raise TypeError(f"{name}: cannot compile for a {type(fake).__name__}; pass a fake tensor, a number or None")
