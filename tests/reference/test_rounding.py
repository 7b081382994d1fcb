"""The models of rounding themselves: known answers, against slower statements of the same thing, and on average."""

from __future__ import annotations

import pytest
import torch
from bits import equal
from hypothesis import given
from hypothesis import strategies as st

from cute_ssm.reference import rounding

FLOATS = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
QUANTISED = tuple(rounding.LARGEST)

# seed, low word of the counter's first 64 bits, rounds -> words
PHILOX = [
    (0, (0, 0, 0, 0), 10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (-1, (0xFFFFFFFF,) * 4, 10, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        0x299F31D0A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        10,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
    (42, (0, 0, 0, 0), 10, (0x9CEAF053, 0x77F5493B, 0x12BF50AD, 0x5742B3D7)),
    (42, (1, 0, 0, 0), 10, (0xFCDB2127, 0x53BA6CFD, 0x838F5A6E, 0x744E06FB)),
    (42, (0, 0, 0, 0), 1, (0x2A, 0, 0, 0)),
    (42, (0, 0, 0, 0), 4, (0xD40CB753, 0xCA257967, 0x74CC301C, 0x63EF4677)),
    (42, (4, 0, 0, 0), 5, (0xD2B64933, 0xD7866270, 0xA6DA222A, 0xB28E8E4A)),
    (123456, (12, 2, 0, 0), 10, (0xC2F3FFDB, 0x2DE32439, 0xAD6BB866, 0x9B0B65A7)),
    (0xDEADBEEF, (7, 0, 0, 0), 10, (0x568EFC2B, 0xA600F15A, 0x5787C584, 0xA23C615D)),
    (2**33 + 5, (1, 0, 0, 0), 10, (0xEFDD8FD2, 0x4F55284F, 0xA5303CF2, 0x062BEFC7)),
]


def from_bits(patterns):
    return torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)


def codes(tensor):
    return tensor.view(torch.uint8 if tensor.dtype.itemsize == 1 else torch.int16)


@pytest.mark.parametrize("seed,counter,rounds,words", PHILOX)
def test_philox_known_answers(seed, counter, rounds, words):
    assert tuple(int(word) for word in rounding.philox(seed, counter, rounds)) == words


def test_philox_broadcasts():
    seeds = torch.tensor([0, 42])[:, None]
    words = rounding.philox(seeds, (torch.arange(2), 0, 0, 0), 10)
    assert words[0].shape == (2, 2) and words[0][1].tolist() == [0x9CEAF053, 0xFCDB2127]
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        rounding.philox(0, (0, 0, 0, 0), 0)


def test_mapping_from_elements_to_bits():
    """Spelt out element by element."""
    dstate, seed, rounds = 20, 42, 10
    for slot, head, row, column, token in [(0, 0, 0, 0, 0), (5, 3, 7, 19, 2), (2**32 + 9, 1, 63, 13, 65535)]:
        counter = (row * 3 + column // 8, head, slot % 2**32, token + (slot // 2**32) * 65536)
        word = int(rounding.philox(seed, counter, rounds)[column % 8 // 2])
        expected = word >> 16 if column % 2 else word & 0xFFFF
        assert int(rounding.random_bits(seed, rounds, slot, head, row, column, dstate, token)) == expected
    # known answers: what kernels of any version must draw
    got = rounding.random_bits(42, 10, 0, 0, 0, torch.arange(9), 16, 0)
    assert got[:8].tolist() == [0xF053, 0x9CEA, 0x493B, 0x77F5, 0x50AD, 0x12BF, 0xB3D7, 0x5742] and got[8] == 0x2127


def test_bits_of_different_elements_differ():
    slots, heads, rows, tokens = torch.meshgrid(*[torch.arange(4)] * 4, indexing="ij")
    columns = torch.arange(16)
    bits = rounding.random_bits(7, 10, *(t[..., None] for t in (slots, heads, rows)), columns, 16, tokens[..., None])
    rows_of_bits = bits.flatten(0, 3)
    assert len({tuple(row.tolist()) for row in rows_of_bits}) == 4**4
    assert abs(bits.double().mean() - 32767.5) < 4 * 65536 / (12 * bits.numel()) ** 0.5


@pytest.mark.parametrize("itemsize", [2, 1])
def test_mapping_by_fragments(itemsize):
    """Spelt out element by element."""
    dstate, seed, rounds = 96, 42, 10
    for slot, head, row, column in [(0, 0, 0, 0), (5, 3, 7, 19), (2**32 + 9, 1, 63, 77), (4, 0, 24, 95)]:
        within = column % 32
        if itemsize == 2:
            block, word = within % 8 // 2, within // 8
        else:
            block, word = within % 16 // 4, within // 16 * 2 + within % 4 // 2
        first = (row // 16 * 8 + row % 8) * (dstate // 8) + column // 32 * 4 + block
        drawn = int(rounding.philox(seed, (first, head, slot % 2**32, slot // 2**32 * 65536), rounds)[word])
        if row % 16 >= 8:
            drawn = int(f"{drawn:032b}"[::-1], 2)
        expected = drawn >> 16 if column % 2 else drawn & 0xFFFF
        assert int(rounding.fragment_bits(seed, rounds, slot, head, row, column, dstate, itemsize)) == expected
    # known answers: what kernels of any version must draw
    columns = torch.tensor([0, 1, 8, 9, 16, 24, 2] if itemsize == 2 else [0, 1, 2, 3, 16, 18, 4])
    for row, words in (
        (0, [0xF053, 0x9CEA, 0x493B, 0x77F5, 0x50AD, 0xB3D7, 0x2127]),
        (8, [0x5739, 0xCA0F, 0xAFEE, 0xDC92, 0xFD48, 0x42EA, 0xDB3F]),
    ):
        assert rounding.fragment_bits(42, 10, 0, 0, row, columns, 64, itemsize).tolist() == words


@pytest.mark.parametrize("itemsize", [2, 1])
def test_bits_of_a_fragment_are_spread_evenly(itemsize):
    """As numbers, as single bits, and between the elements that share a draw."""
    row, column = torch.meshgrid(torch.arange(128), torch.arange(256), indexing="ij")
    bits = rounding.fragment_bits(7, 10, 3, 1, row, column, 256, itemsize)
    other = rounding.fragment_bits(7, 10, 3, 2, row, column, 256, itemsize)
    count = bits.numel()
    assert abs(bits.double().mean() - 32767.5) < 4 * 65536 / (12 * count) ** 0.5
    assert (bits == other).double().mean() < 4 / 65536 + 4 * (1 / 65536 / count) ** 0.5
    assert len({tuple(r.tolist()) for r in bits}) == 128
    for used in (13, 16):  # bits that types of 16 bits, and of 8, round with
        part = (bits % 2**used).double() / 2**used - 0.5
        for shift in ((8, 0), (8, 1), (8, -1), (0, 1), (0, 8), (1, 0)):
            product = (part * part.roll(shift, (0, 1))).mean() * 12  # a correlation
            assert abs(product) < 5 / count**0.5 + 2.0 ** (2 - used), (used, shift)


def test_fragments_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="itemsize: expected 2 or 1, got 4"):
        rounding.fragment_bits(0, 10, 0, 0, 0, 0, 64, 4)
    with pytest.raises(ValueError, match="dstate: expected a multiple of 32, got 80"):
        rounding.fragment_bits(0, 10, 0, 0, 0, 0, 80, 2)


# ------------------------------------------------------------------------------------------------------- stochastic
def neighbours(dtype):
    """All non-negative finite values of a type, ascending, as float64."""
    top = rounding._FLOATS[dtype][3] + (dtype is torch.float8_e4m3fn)
    return rounding._from_codes(torch.arange(top), dtype).double()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_stochastic_is_a_neighbour_and_exact_values_stay(dtype):
    grid = neighbours(dtype)
    generator = torch.Generator().manual_seed(0)
    below = torch.randint(0, len(grid) - 1, (20000,), generator=generator)
    share = torch.rand(20000, generator=generator, dtype=torch.float64)
    values = (grid[below] + share * (grid[below + 1] - grid[below])).float()
    values[::3] *= -1
    bits = torch.randint(0, 65536, values.shape, generator=generator)
    rounded = rounding.round_stochastic(values, dtype, bits).double()
    size = values.double().abs()
    upper = torch.searchsorted(grid, size).clamp(max=len(grid) - 1)
    lower = (torch.searchsorted(grid, size, right=True) - 1).clamp(min=0)
    assert (((rounded.abs() == grid[lower]) | (rounded.abs() == grid[upper])) & (rounded.sign() * values >= 0)).all()
    for bit in (0, 65535):
        exact = torch.cat([grid, -grid]).float()
        stored = rounding.round_stochastic(exact, dtype, torch.full(exact.shape, bit))
        equal(codes(stored), codes(exact.to(dtype)))


@given(
    pattern=st.integers(0, 2**32 - 1) | st.integers(0x38000000 - 2**24, 0x38800000 + 2**10),
    bits=st.integers(0, 65535),
    dtype=st.sampled_from(FLOATS),
)
def test_stochastic_by_exact_arithmetic(pattern, bits, dtype):
    """With integers of any size instead of patterns of bits."""
    value = from_bits([pattern])
    got = rounding.round_stochastic(value, dtype, torch.tensor([bits]))
    if value.isnan():
        assert codes(got).item() == (0x7F if dtype is torch.float8_e4m3fn else 0x7FFF)
        return
    mantissa, lowest, used, top = {
        torch.bfloat16: (7, -126, 16, torch.finfo(torch.bfloat16).max),
        torch.float16: (10, -14, 13, 65504.0),
        torch.float8_e4m3fn: (3, -6, 16, 448.0),
    }[dtype]
    size = abs(value.item())
    if size == float("inf"):
        expected = 448.0 if dtype is torch.float8_e4m3fn else size
    else:
        numerator, denominator = size.as_integer_ratio()
        exponent = numerator.bit_length() - denominator.bit_length()
        exponent -= numerator < denominator * 2**exponent if exponent >= 0 else numerator * 2**-exponent < denominator
        unit = max(exponent, lowest) - mantissa - used  # the last bit that counts
        units = numerator * 2 ** max(-unit, 0) // (denominator * 2 ** max(unit, 0))
        steps = units + (bits & (1 << used) - 1) >> used
        expected = steps * 2.0 ** (unit + used) if steps < 2**60 else float("inf")
        if expected > top:
            expected = 448.0 if dtype is torch.float8_e4m3fn else float("inf")
    assert abs(got.float().item()) == expected
    assert got.float().signbit() == value.signbit()


@pytest.mark.parametrize(
    ("dtype", "mantissa", "used"),
    [(torch.bfloat16, 7, 16), (torch.float16, 10, 13), (torch.float8_e4m3fn, 3, 16)],
    ids=str,
)
def test_the_highest_random_bit_that_is_used_decides_halves(dtype, mantissa, used):
    """Halfway between neighbours the number goes up from that bit on; bits above it do not count."""
    half, above = 1 << used - 1, 65536 - (1 << used)
    bits = torch.tensor([0, half - 1, half, 2 * half - 1, half - 1 + above, half + above])
    for sign in (1.0, -1.0):
        value = sign * (1.0 + 2.0 ** -(mantissa + 1))
        got = rounding.round_stochastic(torch.full((6,), value), dtype, bits).float()
        up = sign * (1.0 + 2.0**-mantissa)
        assert got.tolist() == [sign, sign, up, up, sign, up]


@pytest.mark.parametrize("dtype", (*FLOATS, torch.int8, torch.int16), ids=str)
@pytest.mark.parametrize("scale", [1.0, 3e-6, 2.0**-127])
def test_unbiased(dtype, scale):
    """The mean over many seeds, within 4 standard deviations, also where results are subnormal."""
    if dtype in (torch.bfloat16, torch.int8, torch.int16) or scale > 1e-30:
        values = torch.tensor([0.1, -0.37, 0.9, 1.7, -1e-3, 0.013, 1.0, -0.5]) * scale
        seeds = torch.arange(20000)[:, None]
        bits = rounding.random_bits(seeds, 7, 3, 1, 2, torch.arange(8), 8, 0)
        stored, row = rounding.store(values.expand(20000, 8), dtype, bits=bits)
        error = rounding.load(stored, row).double() - values.double()
        spread = error.std(0)
        # the bits that are cut off, and how far a row's scale is rounded
        limit = 4 * spread / 20000**0.5 + spread * 2.0**-12 + values.double().abs() * 2.0**-21
        if dtype in (torch.int8, torch.int16):
            limit = limit + row[0].double() * 2.0**-16
        assert (error.mean(0).abs() <= limit).all()


def test_truncation_would_be_biased():
    """The test above can fail."""
    values = torch.full((20000, 8), 0.1)
    stored, _ = rounding.store(values, torch.float16, bits=torch.zeros(20000, 8, dtype=torch.int64))
    assert (stored.double() - values.double()).mean().abs() > 1e-6


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nearest(dtype):
    values = torch.tensor([0.0, -0.0, 1.0625, 1.1875, 448.0, -500.0, torch.inf, -torch.inf, torch.nan])
    got = rounding.round_nearest(values, dtype)
    if dtype is torch.float8_e4m3fn:
        assert codes(got).tolist() == [0, 0x80, 0x38, 0x3A, 0x7E, 0xFE, 0x7E, 0xFE, 0x7F]
    else:
        equal(codes(got[:-1]), codes(values[:-1].to(dtype)))
        assert codes(got)[-1] == 0x7FFF


# -------------------------------------------------------------------------------------------------------- quantised
ROWS = torch.tensor(
    [
        [1.0, -0.5, 0.25, 0.0],
        [0.0, -0.0, 0.0, 0.0],
        [1e-40, -1e-45, 3e-41, 0.0],
        [1e-37, 1e-38, -1e-37, 2e-38],
        [3.4028e38, -1e38, 1.0, 0.0],
        [-7.3, 1e-20, 3.3, 7.2999997],
    ]
)


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("bits", [None, 0, 1, 65535])
def test_quantised_rows(dtype, bits):
    random = None if bits is None else torch.full(ROWS.shape, bits)
    stored, scale = rounding.store(ROWS, dtype, bits=random)
    largest = rounding.LARGEST[dtype]
    assert (stored.float().abs() <= largest).all() and scale.isfinite().all()
    assert (scale >= 2.0**-126).all() and scale[1] == 2.0**-126
    error = (rounding.load(stored, scale) - ROWS).abs()
    if dtype is torch.float8_e4m3fn:
        limit = ROWS.abs() * (2.0**-4 if bits is None else 2.0**-3) * 1.001 + scale[:, None] * 2.0**-9
    else:
        limit = scale[:, None] * (0.51 if bits is None else 1.01)
    assert (error.double() <= limit.double()).all()
    if bits is None:
        assert (stored.float().abs().amax(-1)[[0, 4, 5]] == largest).all()


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("random", [False, True])
def test_rows_that_are_not_finite_read_as_nan(dtype, value, random):
    rows = ROWS.clone()
    rows[0, 2] = value
    bits = torch.randint(0, 65536, rows.shape) if random else None
    stored, scale = rounding.store(rows, dtype, bits=bits)
    back = rounding.load(stored, scale)
    assert back[0].isnan().all() and back[1:].isfinite().all()


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_nothing_exceeds_the_largest_code(dtype):
    """For any amax: the excess in the scale outweighs all roundings."""
    generator = torch.Generator().manual_seed(0)
    amax = (torch.randint(0, 0x7F800000, (200000, 1), generator=generator).int()).view(torch.float32)
    _, encode = rounding.row_scale(amax, dtype)
    largest = rounding.LARGEST[dtype]
    assert (amax[:, 0].double() * encode.double() <= largest).all()
    assert ((amax[:, 0] * encode)[amax[:, 0] > 1e-30] >= largest * (1 - 2.0**-20)).all()


def test_ties_and_floors_of_integers():
    # a row whose factor is exactly a power of two does not exist; ties are made by choosing the factor
    encode = torch.tensor([1.0])
    values = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, -2.5, 126.5]])
    assert rounding.quantise(values, encode, torch.int8).tolist() == [[0, 2, 2, 0, -2, 0, -2, 126]]
    for bits, expected in ((0, [0, 1, 2, -1, -2, 0, -3, 126]), (32768, [1, 2, 3, 0, -1, 0, -2, 127])):
        got = rounding.quantise(values, encode, torch.int8, torch.full((1, 8), bits))
        assert got.tolist() == [expected]
    tiny = torch.tensor([[-1e-30, 1e-30]])
    assert rounding.quantise(tiny, encode, torch.int16, torch.tensor([[0, 65535]])).tolist() == [[-1, 0]]
    assert rounding.quantise(tiny, encode, torch.int16, torch.tensor([[1, 0]])).tolist() == [[0, 0]]


def test_store_checks():
    values = torch.zeros(2, 8)
    assert rounding.store(values, torch.float32)[1] is None
    with pytest.raises(TypeError, match=r"values: expected float32, got torch\.float16"):
        rounding.store(values.half(), torch.float16)
    with pytest.raises(TypeError, match=r"dtype: expected float32, .* got torch\.int32"):
        rounding.store(values, torch.int32)
    with pytest.raises(ValueError, match="bits: expected None for float32"):
        rounding.store(values, torch.float32, bits=torch.zeros(2, 8))
