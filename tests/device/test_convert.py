"""Conversions of kernels against the model, bit for bit, on both generations of hardware."""

from __future__ import annotations

import pytest
import torch
from bits import equal, same_bits

pytest.importorskip("cutlass")

import kernel_backends
import rounding_kernels as kernels

import ptxsim
from cute_ssm.device import convert
from cute_ssm.reference import rounding

ARCHS = ("sm_90a", "sm_100a")
TYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "int16": torch.int16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
QUANTISED = tuple(name for name, dtype in TYPES.items() if dtype in rounding.LARGEST)
BATCH = kernels.THREADS * kernels.VALUES


def pattern(bits):
    return (bits & 0xFFFFFFFF).to(torch.int32).view(torch.float32)


def special_values(dtype):
    """Around every value (of a sample) of a 16-bit type: itself, the halfway point, and their neighbours in float32."""
    codes = torch.arange(0, 0x7FFF, 5 if dtype is torch.float16 else 23)
    codes = torch.cat([codes, torch.tensor([0, 1, 2, 0x3FF, 0x400, 0x7BFE, 0x7BFF, 0x7F7E, 0x7F7F]), torch.arange(64)])
    exact = codes.to(torch.int16).view(dtype).float()
    after = (codes + 1).to(torch.int16).view(dtype).float()
    half = exact + (after - exact) / 2
    near = [b.view(torch.int32).long() + d for b in (exact, half) for d in (-1, 0, 1)]
    edges = [0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x477FE000]
    edges += [
        0x477FEFFF,
        0x477FF000,
        0x477FFFFF,
        0x47800000,
        0x7F7F0000,
        0x7F7FFFFF,
        0x38800000,
        0x387FFFFF,
        0x33000000,
    ]
    values = torch.cat([*near, torch.tensor(edges * 40)])
    values = torch.cat([values, values | 0x80000000, torch.randint(0, 2**32, (4096,))])
    return pattern(whole(values))


def whole(values):
    """Repeat values up to full CTAs, in a random order."""
    size = -(-len(values) // BATCH) * BATCH
    return values.repeat(2)[:size][torch.randperm(size)]


def draw(count):
    """(words for kernels, 16 bits an element for the model), with the extremes among them."""
    bits = torch.randint(0, 65536, (count,))
    bits[::7], bits[::11], bits[::13] = 0, 65535, 0x1FFF
    pairs = bits.view(-1, 2)
    return (pairs[:, 0] | pairs[:, 1] << 16).to(torch.int32).view(-1, 4), bits.view(-1, 8)


def run(name, arch, values, words):
    rows = values.view(-1, kernels.VALUES)
    out = torch.zeros(rows.shape, dtype=TYPES[name])
    scale = torch.full((len(rows),), -1.0) if name in QUANTISED else None
    kernel = kernels.rounding(name, arch, words is not None)
    with ptxsim.emulate(arch=arch, arithmetic=kernel_backends.arithmetic):
        kernel(rows, words, out, scale)
    assert all(info.spill_bytes == 0 for info in kernel.kernels)
    return out, scale


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("random", [True, False], ids=["stochastic", "nearest"])
def test_16_bits(name, arch, random):
    values = special_values(TYPES[name])
    words, bits = draw(len(values)) if random else (None, None)
    out, _ = run(name, arch, values, words)
    want, _ = rounding.store(values.view(-1, 8), TYPES[name], bits=bits)
    same_bits(out, want)


def rows_of(name):
    """Rows of 8: every element of the type, ties, wide and narrow ranges, zeros, subnormals, and not finite ones."""
    largest = rounding.LARGEST[TYPES[name]]
    count = 3 * kernels.THREADS
    wide = torch.randn(count, 8) * 2.0 ** torch.randint(-20, 4, (count, 8))
    ranges = 2.0 ** torch.randint(-140, 120, (count, 1))
    rows = [wide, torch.randn(count, 8) * ranges, (torch.rand(count, 8) * 2 - 1) * largest]
    grid = torch.randint(-2 * largest, 2 * largest + 1, (count, 8)) / 2
    grid[:, 0] = largest
    rows += [grid, torch.zeros(1, 8), -torch.zeros(1, 8), torch.full((2, 8), 1e-45), torch.full((2, 8), 3.4e38)]
    bad = torch.randn(96, 8)
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        bad[i::3, i] = value
    bad[::2, 5] = torch.nan
    rows = torch.cat([*rows, bad])
    size = -(-len(rows) // kernels.THREADS) * kernels.THREADS
    return rows.repeat(2, 1)[:size].contiguous()


@pytest.mark.accuracy
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("random", [True, False], ids=["stochastic", "nearest"])
def test_quantised(name, arch, random):
    values = rows_of(name)
    words, bits = draw(values.numel()) if random else (None, None)
    out, scale = run(name, arch, values, words)
    want, want_scale = rounding.store(values, TYPES[name], bits=bits)
    torch.testing.assert_close(scale, want_scale, rtol=0, atol=0, equal_nan=True)
    finite = want_scale.isfinite()
    assert finite.any() and not finite.all()
    same_bits(out[finite], want[finite])
    assert rounding.load(out, scale)[~finite].isnan().all()
    if name == "float8_e4m3fn":
        assert out.float()[~finite].isnan().all()


@pytest.mark.accuracy
@pytest.mark.parametrize("name", QUANTISED)
def test_scale_of_every_mantissa(name):
    """A sample of all; the reciprocal is exactly rounded for each."""
    mantissa = torch.arange(0, 2**23, 2003)
    exponent = torch.randint(1, 255, mantissa.shape)
    largest = pattern(torch.cat([exponent << 23 | mantissa, torch.tensor([0x3FFFFFFF, 0x00FFFFFF, 0x7F7FFFFF] * 5)]))
    rows = torch.zeros(-(-len(largest) // kernels.THREADS) * kernels.THREADS, 8)
    rows[: len(largest), 3] = -largest
    out, scale = run(name, "sm_90a", rows, None)
    want, want_scale = rounding.store(rows, TYPES[name])
    equal(scale, want_scale)
    same_bits(out, want)


def test_constants_are_those_of_the_model():
    for name in QUANTISED:
        assert convert.SCALE_FACTORS[convert.DTYPES[name]] == rounding.scale_factor(TYPES[name])
    assert convert.SMALLEST_SCALE == rounding.SMALLEST_SCALE


@pytest.mark.parametrize(
    "name,access",
    [(name, access) for name, dtype in TYPES.items() for access in (1, 2, 4, 8, 16) if access >= dtype.itemsize],
)
def test_load_and_store_by_any_access(name, access):
    """Every element of the type becomes its exact float32, and that the element again."""
    dtype = TYPES[name]
    count = 256 if dtype.itemsize == 1 else 65536
    raw = torch.arange(count).repeat(1 if count > 256 else 16 * kernels.THREADS // 256)
    stored = raw.to(torch.uint8 if dtype.itemsize == 1 else torch.int16).view(dtype).view(-1, 16)
    values, again = torch.zeros(stored.shape), torch.zeros(stored.shape, dtype=dtype)
    arch = "sm_90a" if access % 8 else "sm_100a"
    kernel = kernels.unpacking(name, access, arch)
    with ptxsim.emulate(arch=arch):
        kernel(stored, values, again)
    equal(values.view(torch.int32)[~values.isnan()], stored.float().view(torch.int32)[~values.isnan()])
    equal(values.isnan(), stored.float().isnan())
    same_bits(again[~values.isnan()], stored[~values.isnan()])


@pytest.mark.thin(6)
@pytest.mark.parametrize("count,dstate", [(1, 17), (2, 18), (4, 20), (8, 24), (16, 32), (2, 32)])
@pytest.mark.parametrize("name", TYPES)
def test_a_stored_state_does_not_depend_on_the_tiling(name, count, dstate):
    """Threads of any number of columns store what the model does, with the bits that it draws."""
    arch = ARCHS[count == 4]
    values = torch.randn(kernels.THREADS, dstate) * 2.0 ** torch.randint(-12, 3, (kernels.THREADS, dstate))
    seed, slot = 2**40 + 9, 2**33 + 1
    rows, columns = torch.arange(len(values))[:, None], torch.arange(dstate)
    bits = rounding.random_bits(seed, 10, slot, 5, rows, columns, dstate, 2)
    want, _ = rounding.store(values, TYPES[name], bits=bits)
    quantised = name in QUANTISED
    encode = rounding.row_scale(values, TYPES[name])[1] if quantised else torch.zeros(len(values))
    out = torch.zeros(values.shape, dtype=TYPES[name])
    kernel = kernels.storing(name, count, dstate, arch)
    with ptxsim.emulate(arch=arch):
        kernel(torch.tensor([seed]), values, encode, out, slot)
    same_bits(out, want)


def test_floor_of_tiny_negative_values():
    rows = torch.full((kernels.THREADS, 8), -1e-20)
    rows[:, 0] = 1.0
    out, _ = run("int8", "sm_90a", rows, torch.zeros(len(rows), 4, dtype=torch.int32))
    same_bits(out, rounding.store(rows, torch.int8, bits=torch.zeros(rows.shape, dtype=torch.int64))[0])


# Instructions of a kernel around eight elements: they cannot rise unnoticed.
BUDGET = {
    ("bfloat16", "sm_90a"): 41,
    ("bfloat16", "sm_100a"): 24,
    ("float16", "sm_90a"): 69,
    ("float16", "sm_100a"): 24,
    ("int8", "sm_90a"): 77,
    ("int16", "sm_90a"): 75,
    ("float8_e4m3fn", "sm_90a"): 94,
}


@pytest.mark.parametrize("name,arch", BUDGET)
def test_instructions(name, arch):
    kernel = kernels.rounding(name, arch, True)
    values, (words, _) = torch.randn(kernels.THREADS, 8), draw(BATCH)
    out, scale = torch.zeros(values.shape, dtype=TYPES[name]), torch.zeros(kernels.THREADS)
    with ptxsim.emulate(arch=arch, counters=True) as session:
        kernel(values, words, out, scale if name in QUANTISED else None)
    warps = kernels.THREADS // 32
    assert session.launches[-1].counters.as_dict()["instructions"]["total"] <= BUDGET[name, arch] * warps
