"""Faults of what kernels are composed of: conversions, random numbers, mathematics, memory."""

from faults import Fault

CONVERT = "cute_ssm/device/convert.py"
PHILOX = "cute_ssm/device/philox.py"
MATH = "cute_ssm/device/math.py"
ROUNDING = "cute_ssm/reference/rounding.py"
BITS16 = "tests/device/test_convert.py::test_16_bits"
QUANTISED = "tests/device/test_convert.py::test_quantised"
WORDS = "tests/device/test_philox.py::test_words"
EDGES = "tests/device/test_math.py::test_values_at_edges"
ERRORS = "tests/device/test_math.py::test_relative_error_over_the_range"

FAULTS = [
    Fault(
        "random halves are swapped",
        CONVERT,
        "grid = [_rebiased(low, used, 0, dtype), _rebiased(high, used, 1, dtype)]",
        "grid = [_rebiased(low, used, 1, dtype), _rebiased(high, used, 0, dtype)]",
        (f"{BITS16}[stochastic-float16-sm_90a]",),
    ),
    Fault(
        "fourteen random bits of thirteen",
        CONVERT,
        "used = random & 0x1FFF1FFF",
        "used = random & 0x3FFF3FFF",
        (f"{BITS16}[stochastic-float16-sm_90a]",),
    ),
    Fault(
        "NaN becomes a number",
        CONVERT,
        "            word = _with_nans(word, low, high, dtype)\n",
        "",
        (f"{BITS16}[stochastic-bfloat16-sm_90a]",),
    ),
    Fault(
        "a scale that is a place too small",
        CONVERT,
        "scale = _largest(largest * Float32(SCALE_FACTORS[dtype]), floor)",
        "scale = _largest(largest * Float32(SCALE_FACTORS[dtype] * (1 - 2**-20)), floor)",
        ("tests/device/test_convert.py::test_scale_of_every_mantissa",),
    ),
    Fault(
        "pairs of bytes change places",
        CONVERT,
        "return pairs if dtype is Int16 else [_permute(a, b, 0x5410)",
        "return pairs if dtype is Int16 else [_permute(a, b, 0x1054)",
        (f"{QUANTISED}[nearest-int8-sm_90a]",),
    ),
    Fault(
        "an infinite row reads as numbers",
        CONVERT,
        "return RowScale(cute.math.fma(encode, Float32(0.0), scale), encode)",
        "return RowScale(scale, encode)",
        (f"{QUANTISED}[nearest-int8-sm_90a]",),
    ),
    Fault(
        "one operand less of a maximum",
        CONVERT,
        "for first in range(0, len(values), step):",
        "for first in range(step, len(values), step):",
        (f"{QUANTISED}[nearest-int8-sm_90a]",),
    ),
    Fault(
        "a round more",
        PHILOX,
        "for i in range(rounds)\n",
        "for i in range(rounds + 1)\n",
        (f"{WORDS}[10-8-128-sm_90a]",),
    ),
    Fault(
        "high bits of the slot are lost",
        PHILOX,
        "high = Int32(Int64(slot) >> 32) << 16",
        "high = Int32(0)",
        (f"{WORDS}[10-8-128-sm_90a]",),
    ),
    Fault(
        "rows share their random bits",
        PHILOX,
        "groups = -(-dstate // COLUMNS)",
        "groups = dstate // COLUMNS",
        (f"{WORDS}[10-4-100-sm_90a]",),
    ),
    Fault(
        "the wrong pair of columns",
        PHILOX,
        "skip = Int32(column) % COLUMNS // 2",
        "skip = Int32(column) % COLUMNS // 4",
        (f"{WORDS}[10-2-18-sm_100a]",),
    ),
    Fault(
        "the reference uses other multipliers",
        ROUNDING,
        "_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)",
        "_MULTIPLIERS = (0xCD9E8D57, 0xD2511F53)",
        ("tests/reference/test_rounding.py::test_philox_known_answers",),
    ),
    Fault(
        "the reference rounds ties away from zero",
        ROUNDING,
        "return exact.round().to(dtype)",
        "return (exact + 0.5 * exact.sign()).trunc().to(dtype)",
        ("tests/reference/test_rounding.py::test_ties_and_floors_of_integers",),
    ),
    Fault(
        "subnormal results of the reference lose their leading one",
        ROUNDING,
        "magnitude & 0x7FFFFF | 0x800000, magnitude)",
        "magnitude & 0x7FFFFF, magnitude)",
        ("tests/reference/test_rounding.py::test_stochastic_by_exact_arithmetic",),
    ),
    Fault(
        "one random bit less of float8",
        ROUNDING,
        "torch.float8_e4m3fn: (20, 120, 16, 0x7E, 0x7F, torch.uint8)",
        "torch.float8_e4m3fn: (20, 120, 15, 0x7E, 0x7F, torch.uint8)",
        ("tests/reference/test_rounding.py::test_the_highest_random_bit_that_is_used_decides_halves",),
    ),
    Fault(
        "rows of fragments without their reversal",
        ROUNDING,
        "torch.where(rows % 16 < 8, words, _reversed(words))",
        "words",
        ("tests/reference/test_rounding.py::test_mapping_by_fragments",),
    ),
    Fault(
        "decays of infinite rates are NaN",
        MATH,
        "    x = larger(x, Float32(-128.0))",
        "    x = larger(x, Float32(-float('inf')))",
        (f"{EDGES}[decay]",),
    ),
    Fault(
        "decays by one float of log2(e)",
        MATH,
        "    excess = cute.math.fma(x, Float32(-_LOG2E_LOW), excess)\n",
        "",
        (f"{ERRORS}[decay]",),
    ),
    Fault(
        "softplus by a shorter series",
        MATH,
        "_ARTANH = tuple(1.0 / (2 * k + 1) for k in range(7))",
        "_ARTANH = tuple(1.0 / (2 * k + 1) for k in range(5))",
        (f"{ERRORS}[softplus]",),
    ),
    Fault(
        "sigmoid of negative numbers is that of positive ones",
        MATH,
        "    return inverse if x >= 0.0 else e * inverse\n\n\n@cute.jit\ndef gate_exponent",
        "    return inverse\n\n\n@cute.jit\ndef gate_exponent",
        (f"{EDGES}[sigmoid]",),
    ),
    Fault(
        "exponentials by one term less",
        MATH,
        "for factorial in (720, 120, 24, 6, 2):",
        "for factorial in (120, 24, 6, 2):",
        (f"{ERRORS}[exponential]",),
    ),
    Fault(
        "sums over half a segment",
        MATH,
        "    while offset < lanes:\n",
        "    while offset < lanes // 2:\n",
        ("tests/device/test_math.py::test_sums_over_lanes",),
    ),
    Fault(
        "a larger number hides a NaN",
        MATH,
        '"max.NaN.f32 $0, $1, $2;"',
        '"max.f32 $0, $1, $2;"',
        ("tests/device/test_math.py::test_larger_of_two_is_nan_if_one_is",),
    ),
]
