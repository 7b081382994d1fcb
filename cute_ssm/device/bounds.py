"""`in_range`: compare an index with its bounds, whatever integer types the two have."""

from typing import Any

from cutlass import Boolean, Int32, Int64


def in_range(index: Int32 | Int64 | int, bound: Int32 | Int64 | int) -> Boolean:
    """Return whether 0 <= index < bound; never true if the bound is zero or negative.

    Both are Python ints or signed integers of up to 64 bits.  They are compared as signed 64-bit integers if either has
    more than 32 bits, else as signed 32-bit integers, so nothing is truncated.  Do not write ``Uint32(index) <
    Uint32(bound)`` instead: the size of a tensor stays signed in the conversion, and so does the comparison.
    """
    for value in (index, bound):
        if not getattr(type(value), "signed", True):
            raise TypeError(
                f"expected signed integers, got {type(value).__name__}, whose large values are not negative"
            )
    wide = any(getattr(value, "width", 0) > 32 or _exceeds(value) for value in (index, bound))
    kind = Int64 if wide else Int32
    index, bound = kind(index), kind(bound)
    return Boolean((index >= 0) & (index < bound))


def _exceeds(value: Any) -> bool:
    """Return whether a value is a Python int that does not fit 32 bits."""
    return isinstance(value, int) and not -(2**31) <= value < 2**31
