"""Sums of products as tensor cores compute them: `arithmetic.TensorSum` says how, for ``arithmetic="hardware"``."""

from __future__ import annotations

import numpy as np

F16, F32, F64, I16, I32, I64, U32 = np.float16, np.float32, np.float64, np.int16, np.int32, np.int64, np.uint32
LOWEST = {"f16": -14, "bf16": -126, "tf32": -126, "e4m3": -6, "e5m2": -14, "f32": -126}  # exponents of normal numbers
NO_TERM = I16(-16384)  # exponent of a zero, which aligns nothing; twice that is an int16, too
WARPS = 16  # multiplied together, so that the temporaries stay in the cache
NAN = np.array(0x7FFFFFFF, U32).view(F32)


def exponents(values, kind):
    """Exponents of values of a type, int16; those of subnormal numbers are the lowest of normal ones."""
    bits = np.asarray(values, F32).view(I32)
    found = np.maximum((bits >> 23 & 255).astype(I16) - I16(127), I16(LOWEST[kind]))
    found[values == 0] = NO_TERM
    return found


def product(a, b, c, kinds, figures):
    """Return c + A B as one instruction computes it.

    Parameters
    ----------
    a, b : array
        float32 [..., rows, K] and [..., columns, K]: values of the types `kinds`.
    c : array
        float32 [..., rows, columns], or float16 where `figures` say that results are.
    kinds : tuple of str
        Types of a and b: ``"f16"``, ``"bf16"``, ``"tf32"``, ``"e4m3"`` or ``"e5m2"``.
    figures : arithmetic.TensorSum

    Returns
    -------
    array
        [..., rows, columns] of the type of `c`.  A NaN is the canonical one.
    """
    if not figures.widened:
        return _sum(a, b, c, kinds, figures)
    lower = np.arange(a.shape[-1]) % 4 < 2  # of each register of four
    total = np.zeros_like(c)
    for part in (lower, ~lower):
        total = _sum(a[..., part], b[..., part], total, ("f16", "f16"), figures)
    return total + c


def _sum(a, b, c, kinds, figures):
    """Return c + A B, each result one sum of all its products and c."""
    if c.ndim > 2 and len(c) > WARPS:
        parts = [slice(i, i + WARPS) for i in range(0, len(c), WARPS)]
        return np.concatenate([_sum(a[p], b[p], c[p], kinds, figures) for p in parts])
    rows, columns = (_terms_first(part) for part in (a, b))  # K first: all that follows runs over whole arrays
    of_rows, of_columns = exponents(rows, kinds[0]), exponents(columns, kinds[1])
    top = (_by_row(of_rows, c.shape) + _by_column(of_columns, c.shape)).max(0)
    wide = c.reshape(-1)
    top = np.maximum(top, exponents(wide, "f16" if figures.half else "f32"))
    top = np.where(top < NO_TERM // 2, 0, np.maximum(top, figures.lowest)).astype(I32)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        out = None
        if _narrow(of_rows) and _narrow(of_columns) and len(rows) << figures.fraction <= 1 << 29:
            out = _in_float32(_by_row(rows, c.shape), _by_column(columns, c.shape), wide, top, figures)
        if out is None:
            out = _in_float64(_by_row(rows, c.shape), _by_column(columns, c.shape), wide, top, figures)
    return out.reshape(c.shape)


def _terms_first(values):
    """[..., n, K] -> contiguous [K, everything else]."""
    return np.ascontiguousarray(values.reshape(-1, values.shape[-1]).T)


def _by_row(values, shape):
    """[K, outer * rows] -> [K, outer * rows * columns]."""
    return np.repeat(values, shape[-1], axis=1)


def _by_column(values, shape):
    """[K, outer * columns] -> [K, outer * rows * columns]."""
    parts = values.reshape(len(values), -1, 1, shape[-1])
    return np.repeat(parts, shape[-2], axis=2).reshape(len(values), -1)


def _narrow(exponent):
    """Whether values are finite, and products of two such, and any bit of them, are normal float32."""
    return exponent.max() < 62 and exponent.min(initial=0, where=exponent != NO_TERM) > -52


def _in_float32(rows, columns, wide, top, figures):
    """Results where float32 holds products, scaled to units, and int32 the sum of K of them; else None."""
    scale = np.ldexp(F32(1), figures.fraction - top)
    wide = wide.astype(F32) * scale
    if not (np.isfinite(wide).all() and (scale < 2.0**127).all()):
        return None
    rows *= columns
    rows *= scale
    return _finish(rows.astype(I32).sum(0, dtype=I32).astype(F64) + np.trunc(wide), top, figures)


def _in_float64(rows, columns, wide, top, figures):
    """Results for any values."""
    products, wide = rows.astype(F64) * columns, wide.astype(F64)
    plain = products.sum(0) + wide
    unit = np.ldexp(1.0, top - figures.fraction)
    out = _finish(np.trunc(products / unit).sum(0) + np.trunc(wide / unit), top, figures)
    return np.where(np.isfinite(plain), out, np.where(np.isnan(plain), NAN, plain).astype(out.dtype))


def _finish(total, top, figures):
    """Results from sums in units of ``2**(top - fraction)``; all is exact until the last step."""
    total = np.ldexp(total, top - figures.fraction) + 0.0
    return total.astype(F16) if figures.half else cut(total, figures.result)


def cut(values, bits):
    """float64 -> float32 with `bits` bits behind the leading one, towards zero; 2**128 and more is infinite."""
    size = np.abs(values)
    if ((size < 2.0**-126) & (size > 0)).any():
        step = np.ldexp(1.0, np.maximum(np.frexp(values)[1] - 1, LOWEST["f32"]) - bits)
        return (np.trunc(values / step) * step + 0.0).astype(F32)
    return (values.view(I64) & I64(-(1 << (52 - bits)))).view(F64).astype(F32)
