"""`in_range`: whether an index lies between zero and a bound, as numbers, whatever the types of the two."""

from cutlass import Boolean, Int32, Int64


def in_range(index, bound):
    """Whether 0 <= index < bound; never true where the bound is negative or zero.

    Either may be a Python int or a signed integer of up to 64 bits, dynamic or not.  Both are compared as signed
    integers of 64 bits if one of them has as many, else of 32, so nothing is truncated.  ``Uint32(index) <
    Uint32(bound)`` is not the same: the sizes of a tensor keep their sign in it, and the comparison is signed.
    """
    for value in (index, bound):
        if not getattr(type(value), "signed", True):
            raise TypeError(f"expected signed integers, got {type(value).__name__}: its large values are not negative")
    wide = any(getattr(value, "width", 0) > 32 or _exceeds(value) for value in (index, bound))
    kind = Int64 if wide else Int32
    index, bound = kind(index), kind(bound)
    return Boolean((index >= 0) & (index < bound))


def _exceeds(value):
    return isinstance(value, int) and not -(2**31) <= value < 2**31
