"""How a state is rounded into memory: bit-exact models of Philox, stochastic rounding and row-wise quantisation.

**Nearest.**  float32 values become the nearest element of the state's type, ties to even; NaN becomes the NaN that the
hardware makes (0x7FFF in both 16-bit types, 0x7F in float8).

**Stochastic.**  Every stored element has 16 random bits r.  Its magnitude is cut below the stored type's last place, r
is added to the cut part, and a carry rounds away from zero: the result is one of the two neighbours and right on
average.  bfloat16 adds all of r to its 16 cut bits.  float16 adds the low 13 bits of r to its 13.  float8 adds r to the
upper 16 of its 20.  Subnormal results have longer cut parts, of which the highest 13 (float16) or 16 (float8) bits
count.  The 16-bit types overflow to infinity, unless
float16 states are asked to saturate.  These are the results of ``cvt.rs.{bf16x2,f16x2}.f32``.

**Quantised.**  int8, int16 and float8_e4m3fn keep one float32 *scale* for each row, that is, for each (slot, head, row)
over dstate; an element is ``q * scale``.  See `row_scale`.  An integer is ``h / scale`` rounded to nearest even, or
``floor(h / scale + r / 65536)``.

**From element to random bits.**  The element (slot, head, row, column) stored at token step t takes its bits from
Philox-4x32 with the key (low word of the seed, high word of the seed) and the counter ::

    (row * ceil(dstate / 8) + column // 8,   head,   slot mod 2^32,   t mod 2^16 + 2^16 * (slot // 2^32))

They are the half ``column % 2`` (0: low) of the word ``column % 8 // 2`` of its result.  `slot` is the slot, or the row
of a buffer of intermediate states, that is written.  Nothing else enters: no tiling, algorithm, or order in the batch.
See `random_bits`.

**By fragments.**  `checkpointing_ssu` computes new states by tensor core, where a thread has the same columns of two
rows that are 8 apart, and draws once for sixteen elements.  They take their bits with the same key and the counter ::

    ((row // 16 * 8 + row % 8) * (dstate / 8) + block,   head,   slot mod 2^32,   2^16 * (slot // 2^32))

In rows with ``row % 16 < 8`` they are the half ``column % 2`` (0: low) of a word of its result, and in the others that
half of the word with its 32 bits in reverse, where ::

    types of 16 bits:   block = column // 32 * 4 + column % 8 // 2,    word = column % 32 // 8
    types of  8 bits:   block = column // 32 * 4 + column % 16 // 4,   word = column % 32 // 16 * 2 + column % 4 // 2

See `fragment_bits`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cute_ssm.errors import describe

# The largest magnitude of each quantised type; -128 and -32768 are never produced.
LARGEST = {torch.int8: 127, torch.int16: 32767, torch.float8_e4m3fn: 448}
LARGEST_HALF = 65504.0  # of float16
SMALLEST_SCALE = 2.0**-126  # of a row of zeros, or nearly: the smallest normal float32, whose reciprocal is one too

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
# type -> (mantissa bits cut from a float32, exponent fields between the two biases, random bits used, largest code,
#          code of NaN, storage)
_FLOATS = {
    torch.bfloat16: (16, 0, 16, 0x7F80, 0x7FFF, torch.int16),
    torch.float16: (13, 112, 13, 0x7C00, 0x7FFF, torch.int16),
    torch.float8_e4m3fn: (20, 120, 16, 0x7E, 0x7F, torch.uint8),
}


def philox(seed: int | Tensor, counter: Sequence[int | Tensor], rounds: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of Philox-4x32.

    Parameters
    ----------
    seed : int or int64 Tensor
        64 bits; the key is (low word, high word).
    counter : four ints or integer Tensors
        Words of 32 bits; everything broadcasts.
    rounds : int
        At least 1.

    Returns
    -------
    tuple of four int64 Tensors
        Values in [0, 2^32).
    """
    if rounds < 1:
        raise ValueError(describe("rounds", "at least 1", rounds))
    if isinstance(seed, int):
        seed = torch.tensor((seed + 2**63) % 2**64 - 2**63)
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    c0, c1, c2, c3 = (torch.as_tensor(word).long() & _MASK for word in counter)
    for _ in range(rounds):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # modulo 2^64
        c0, c1, c2, c3 = b >> 32 & _MASK ^ c1 ^ k0, b & _MASK, a >> 32 & _MASK ^ c3 ^ k1, a & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)  # type: ignore[no-untyped-call]
    return c0, c1, c2, c3


def random_bits(
    seed: int | Tensor,
    rounds: int,
    slots: int | Tensor,
    heads: int | Tensor,
    rows: int | Tensor,
    columns: int | Tensor,
    dstate: int,
    token: int | Tensor,
) -> Tensor:
    """Return the 16 random bits of elements, by the mapping of this module's docstring.

    Parameters
    ----------
    seed : int or int64 Tensor
        One, or one per element.
    rounds : int
        Rounds of Philox.
    slots, heads, rows, columns, token : int or integer Tensor
        Which elements, and at which token step they are stored; everything broadcasts.
    dstate : int
        Columns of a row.

    Returns
    -------
    int64 Tensor
        Values in [0, 65536).
    """
    slots, heads, rows, columns, token = (torch.as_tensor(t).long() for t in (slots, heads, rows, columns, token))
    counter = (
        rows * -(-dstate // 8) + torch.div(columns, 8, rounding_mode="floor"),
        heads,
        slots,
        (token & 0xFFFF) + (slots >> 32 << 16),
    )
    words = torch.stack(philox(seed, counter, rounds), dim=-1)
    which = (columns % 8 // 2).expand(words.shape[:-1])
    return words.gather(-1, which[..., None])[..., 0] >> 16 * (columns % 2) & 0xFFFF


def fragment_bits(
    seed: int | Tensor,
    rounds: int,
    slots: int | Tensor,
    heads: int | Tensor,
    rows: int | Tensor,
    columns: int | Tensor,
    dstate: int,
    itemsize: int,
) -> Tensor:
    """Return the 16 random bits of elements, by the mapping by fragments of this module's docstring.

    Parameters
    ----------
    seed : int or int64 Tensor
        One, or one per element.
    rounds : int
        Rounds of Philox.
    slots, heads, rows, columns : int or integer Tensor
        Which elements; everything broadcasts.
    dstate : int
        Columns of a row, a multiple of 32.
    itemsize : {2, 1}
        Bytes of an element.

    Returns
    -------
    int64 Tensor
        Values in [0, 65536).

    Raises
    ------
    ValueError
        If `itemsize` is neither 2 nor 1, or `dstate` no multiple of 32.
    """
    if itemsize not in (1, 2):
        raise ValueError(describe("itemsize", "2 or 1", itemsize))
    if dstate % 32:
        raise ValueError(describe("dstate", "a multiple of 32", dstate))
    slots, heads, rows, columns = (torch.as_tensor(t).long() for t in (slots, heads, rows, columns))
    if itemsize == 2:
        block, which = (columns >> 5) * 4 + (columns % 8 >> 1), columns % 32 >> 3
    else:
        block, which = (columns >> 5) * 4 + (columns % 16 >> 2), (columns % 32 >> 4) * 2 + (columns % 4 >> 1)
    counter = (((rows >> 4) * 8 + rows % 8) * (dstate // 8) + block, heads, slots, slots >> 32 << 16)
    words = torch.stack(philox(seed, counter, rounds), dim=-1)
    words = words.gather(-1, which.expand(words.shape[:-1])[..., None])[..., 0]
    return torch.where(rows % 16 < 8, words, _reversed(words)) >> 16 * (columns % 2) & 0xFFFF


def _reversed(words: Tensor) -> Tensor:
    """The lower 32 bits in reverse."""
    for shift, mask in ((16, 0x0000FFFF), (8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        words = (words & mask) << shift | words >> shift & mask
    return words


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32).long() & _MASK


def _from_codes(codes: Tensor, dtype: torch.dtype) -> Tensor:
    storage = _FLOATS[dtype][-1]
    return codes.to(storage).view(dtype)  # a cast between integers keeps the low bits


def round_nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to bfloat16, float16 or (saturating) float8_e4m3fn; NaN is that of the hardware."""
    nan = _from_codes(torch.tensor(_FLOATS[dtype][4]), dtype)
    if dtype is torch.float8_e4m3fn:
        codes = values.clamp(-448.0, 448.0).to(dtype).view(torch.uint8)
        return torch.where(values.isnan(), nan.view(torch.uint8), codes).view(dtype)
    return torch.where(values.isnan(), nan, values.to(dtype))


def round_stochastic(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round float32 to bfloat16, float16 or (saturating) float8_e4m3fn with 16 random bits an element."""
    cut, rebias, used, largest, nan, _ = _FLOATS[dtype]
    pattern = _bits(values)
    magnitude = pattern & 0x7FFFFFFF
    # the same number with the exponent bias of the result, in whose subnormals the leading one is explicit
    exponent = (magnitude >> 23).clamp(min=1)
    whole = torch.where(magnitude >> 23 > 0, magnitude & 0x7FFFFF | 0x800000, magnitude)
    rebiased = torch.where(
        exponent > rebias, magnitude - (rebias << 23), whole >> (rebias + 1 - exponent).clamp(min=0, max=31)
    )
    drawn = (bits.long() & (1 << used) - 1) << cut - used
    codes = (rebiased + drawn >> cut).clamp(max=largest)
    codes = torch.where(magnitude > 0x7F800000, nan, codes | pattern >> 31 << (7 if cut == 20 else 15))
    return _from_codes(codes, dtype)


def row_scale(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the scale of each row (the last dimension) and the factor that encodes it.

    With ``c = (1 + 2^-22) / LARGEST`` rounded up to float32, each operation rounded once to float32 ::

        scale = max(c * max |h|, 2^-126);   encode = 1 / scale

    The excess of 2^-22 outweighs all roundings, so that ``|h * encode| <= LARGEST`` always: nothing is ever clamped,
    and the largest element still encodes to ``LARGEST``.  (A row within 2^-21 of the largest float32 therefore reads as
    infinity there.)  A row with NaN or infinity has the scale and the factor NaN: all of it reads as NaN, whatever its
    integers are.
    """
    largest = values.abs().amax(-1)
    scale = (largest * scale_factor(dtype)).clamp(min=SMALLEST_SCALE)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    return scale, 1.0 / scale


def scale_factor(dtype: torch.dtype) -> float:
    """The float32 ``c`` of `row_scale`."""
    exact = (1.0 + 2.0**-22) / LARGEST[dtype]
    rounded = torch.tensor(exact, dtype=torch.float64).float()
    return float(rounded if rounded.item() >= exact else torch.nextafter(rounded, torch.tensor(torch.inf)))


def quantise(values: Tensor, encode: Tensor, dtype: torch.dtype, bits: Tensor | None = None) -> Tensor:
    """Return the elements of rows whose factors are `encode`; integers of rows with the factor NaN are 0.

    For the integers, ``h * encode`` is not rounded before it is rounded to an integer; for float8 it is, to float32.
    Kernels store other integers in rows with the factor NaN.
    """
    factor = encode[..., None]
    if dtype is torch.float8_e4m3fn:
        scaled = values * factor
        return round_nearest(scaled, dtype) if bits is None else round_stochastic(scaled, dtype, bits)
    exact = (values.double() * factor.double()).nan_to_num(nan=0.0)  # 48 bits at most
    if bits is None:
        return exact.round().to(dtype)
    return ((exact * 65536.0).floor().long() + bits.long() >> 16).to(dtype)


def saturated(values: Tensor) -> Tensor:
    """Return values, of which float16 makes +-65504 where they are beyond, or infinite; NaN stays NaN."""
    return values.clamp(-LARGEST_HALF, LARGEST_HALF)


def store(
    values: Tensor, dtype: torch.dtype, *, bits: Tensor | None = None, saturate: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Round a state into memory.

    Parameters
    ----------
    values : float32 Tensor, (..., dstate)
    dtype : torch.dtype
        float32, bfloat16, float16, int16, int8 or float8_e4m3fn.
    bits : integer Tensor, (..., dstate), optional
        16 random bits for each element: round stochastically.
    saturate : bool
        Make `saturated` float16.

    Returns
    -------
    stored : Tensor, (..., dstate), dtype
    scale : float32 Tensor, (...), or None
        Only of quantised types.

    Raises
    ------
    TypeError
        If `values` are not float32 or `dtype` is none of the above.
    ValueError
        If `bits` are given for float32, which is stored as it is.
    """
    if values.dtype is not torch.float32:
        raise TypeError(describe("values", "float32", values.dtype))
    if saturate:
        values = saturated(values)
    if dtype is torch.float32:
        if bits is not None:
            raise ValueError(describe("bits", "None for float32, which is not rounded", "a tensor"))
        return values.clone(), None
    if dtype in LARGEST:
        scale, encode = row_scale(values, dtype)
        return quantise(values, encode, dtype, bits), scale
    if dtype not in _FLOATS:
        known = "float32, bfloat16, float16, int16, int8 or float8_e4m3fn"
        raise TypeError(describe("dtype", known, dtype))
    return (round_nearest(values, dtype) if bits is None else round_stochastic(values, dtype, bits)), None


def load(stored: Tensor, scale: Tensor | None) -> Tensor:
    """Return a stored state as float32: exact, or one rounding of ``q * scale``."""
    values = stored.float()
    return values if scale is None else values * scale[..., None]
