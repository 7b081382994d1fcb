"""Functions of `device.math` against float64: edges, thresholds, grids, and sums over lanes."""

from __future__ import annotations

import functools
import math

import approximations
import pytest
import torch
from bits import equal

pytest.importorskip("cutlass")

import cutlass
import cutlass.cute as cute
from cutlass import Float32

import ptxsim
from cute_ssm.arch import WARP
from cute_ssm.device import math as device
from cute_ssm.device import memory, scan
from cute_ssm.device.fakes import fake
from ptxsim.arithmetic import EXACT, HARDWARE, Arithmetic

INF, NAN = math.inf, math.nan
ULP = 2.0**-23
TINY = 2.0**-126  # smallest normal float32: below, these functions may give zero
FUNCTIONS = {
    "decay": device.decay,
    "reciprocal": device.reciprocal,
    "softplus": device.softplus,
    "silu": device.silu,
    "exponential": device.exponential,
    "sigmoid": device.sigmoid,
    "rsqrt": device.rsqrt,
    "power_of_two": device.power_of_two,
    "fast_softplus": device.fast_softplus,
    "fast_silu": device.fast_silu,
}


# approximate functions are exact, err as documented, and by as much as documented to one side always
ARITHMETICS = {
    "exact": EXACT,
    "hardware": HARDWARE,
    "low": Arithmetic("hardware", lean="low"),
    "high": Arithmetic("hardware", lean="high"),
}


class Kernel:
    """Row i of `out`: function i of every value; two more: `larger` of a value and its mirror image, both ways."""

    @cute.jit
    def __call__(self, values: cute.Tensor, out: cute.Tensor):
        self.kernel(values, out).launch(grid=[values.shape[0] // WARP, 1, 1], block=[WARP, 1, 1])

    @cute.kernel
    def kernel(self, values: cute.Tensor, out: cute.Tensor):
        i = cute.arch.block_idx()[0] * WARP + cute.arch.thread_idx()[0]
        x, other = values[i], values[values.shape[0] - 1 - i]
        results = [function(x) for function in FUNCTIONS.values()]
        results += [device.larger(x, other), device.larger(other, x)]
        for n in cutlass.range_constexpr(len(results)):
            memory.store_scalar(memory.address(out, n, i), results[n], Float32)


@functools.cache
def emulated(values: tuple[float, ...], arithmetic: str = "exact") -> torch.Tensor:
    count = -(-len(values) // WARP) * WARP
    x = torch.zeros(count)
    x[: len(values)] = torch.tensor(values)
    out = torch.full((len(FUNCTIONS) + 2, count), 7.0)
    kernel = compiled()
    with ptxsim.emulate(arch="sm_90a", arithmetic=ARITHMETICS[arithmetic]):
        kernel(x, out)
    return out


@functools.cache
def compiled():
    fakes = (fake(Float32, (cute.sym_int32(),), (1,)), fake(Float32, (len(FUNCTIONS) + 2, cute.sym_int32()), (1,)))
    return ptxsim.compile(Kernel(), *fakes, arch="sm_90a")


def apply(name: str, values: list[float], arithmetic: str = "exact") -> list[float]:
    return emulated(tuple(values), arithmetic)[list(FUNCTIONS).index(name), : len(values)].tolist()


def softplus(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


TRUE = {
    "decay": torch.exp,
    "reciprocal": torch.reciprocal,
    "softplus": softplus,
    "silu": silu,
    "exponential": torch.exp,
    "sigmoid": torch.sigmoid,
    "rsqrt": torch.rsqrt,
    "power_of_two": torch.exp2,
    "fast_softplus": softplus,
    "fast_silu": silu,
}
WORST = {  # relative errors by rounding alone in units in the last place, |x| given
    "decay": lambda x: 1.0,
    "reciprocal": lambda x: 0.5,
    "softplus": lambda x: 2.0,
    "silu": lambda x: 2.0,
    "exponential": lambda x: 0.75,
    "sigmoid": lambda x: 1.5,
    "rsqrt": lambda x: 0.75,
    "power_of_two": lambda x: 0.5,
    "fast_softplus": lambda x: 2 + 5 * x / 8,
    "fast_silu": lambda x: 2 + 5 * x / 8,
}
GRIDS = {
    "decay": (-87.0, 88.0),
    "reciprocal": (2.0**-100, 2.0**100),
    "softplus": (-80.0, 80.0),
    "silu": (-80.0, 80.0),
    "exponential": (-87.0, 88.37),
    "sigmoid": (-80.0, 80.0),
    "rsqrt": (2.0**-100, 2.0**100),
    "power_of_two": (-125.0, 127.0),
    "fast_softplus": (-80.0, 80.0),
    "fast_silu": (-80.0, 80.0),
}


def approximation(name: str, x: torch.Tensor, errors: approximations.Errors) -> torch.Tensor:
    """Largest relative errors that come from those of instructions."""
    function = name.removeprefix("fast_")
    if function == "softplus":
        return errors.softplus(x, fast=name.startswith("fast_")) / softplus(x.double())
    if function == "silu":
        return errors.silu(x)
    relative = {"decay": errors.ex2, "power_of_two": errors.ex2, "reciprocal": errors.rcp}.get(name, 0.0)
    return torch.full(x.shape, relative)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_relative_error_over_the_range(name, arithmetic):
    low, high = GRIDS[name]
    if low > 0:
        x = torch.logspace(math.log2(low), math.log2(high), 2048, base=2.0, dtype=torch.float64)
    else:
        small = torch.logspace(-30, 0, 256, base=2.0, dtype=torch.float64)
        x = torch.cat([torch.linspace(low, high, 1536, dtype=torch.float64), small, -small])
    x = x.float()
    want = TRUE[name](x.double())
    got = torch.tensor(apply(name, x.tolist(), arithmetic), dtype=torch.float64)
    seen = want.abs() >= TINY  # of results that are normal numbers
    error = ((got - want).abs() / want.abs() / ULP)[seen]
    limit = torch.tensor([WORST[name](abs(v)) for v in x.tolist()])
    limit = (limit + approximation(name, x, approximations.of(ARITHMETICS[arithmetic])) / ULP)[seen]
    worst = int((error / limit).argmax())
    assert error[worst] <= limit[worst], f"{error[worst]:.2f} units in the last place at {x[seen][worst]}"
    assert (got[~seen].abs() <= TINY).all()


LN2, SUBNORMAL, SMALLEST, LARGEST = math.log(2), 2.0**-140, 2.0**-149, 3.4028234663852886e38
EDGES = {  # (argument, value)
    # e^(A dt') of A = -inf is 0: without a bound on the exponent the correction of its product would be NaN
    "decay": (
        (0.0, 1.0), (-0.0, 1.0), (SUBNORMAL, 1.0), (-SUBNORMAL, 1.0), (-SMALLEST, 1.0), (-INF, 0.0), (-LARGEST, 0.0),
        (-128.0, 0.0), (-127.99, 0.0), (-1e4, 0.0), (NAN, NAN),
    ),
    "reciprocal": ((INF, 0.0), (-INF, -0.0), (0.0, INF), (-0.0, -INF), (1.0, 1.0), (-2.0, -0.5), (NAN, NAN)),
    "softplus": (
        (-INF, 0.0), (INF, INF), (-LARGEST, 0.0), (LARGEST, LARGEST), (0.0, LN2), (-0.0, LN2), (SUBNORMAL, LN2),
        (20.0, 20.000000002061153), (100.0, 100.0), (-100.0, 0.0), (NAN, NAN),
    ),
    "silu": (  # x times the sigmoid of x: of -inf, NaN
        (0.0, 0.0), (-0.0, -0.0), (INF, INF), (LARGEST, LARGEST), (-INF, NAN), (-LARGEST, -0.0), (-200.0, -0.0),
        (NAN, NAN),
    ),
    "exponential": (
        (0.0, 1.0), (-0.0, 1.0), (SUBNORMAL, 1.0), (-SUBNORMAL, 1.0), (-88.5, 0.0), (-1e30, 0.0), (-INF, 0.0),
        (88.0, math.exp(88.0)), (NAN, NAN),
    ),
    "sigmoid": (
        (0.0, 0.5), (-0.0, 0.5), (SUBNORMAL, 0.5), (INF, 1.0), (-INF, 0.0), (LARGEST, 1.0), (-LARGEST, 0.0),
        (30.0, 1.0), (-88.5, 0.0), (NAN, NAN),
    ),
    "rsqrt": ((1.0, 1.0), (4.0, 0.5), (0.25, 2.0), (TINY, 2.0**63), (1e-6, 1e3), (NAN, NAN)),
    "power_of_two": (
        (0.0, 1.0), (-0.0, 1.0), (SUBNORMAL, 1.0), (-INF, 0.0), (INF, INF), (-LARGEST, 0.0), (-127.0, 0.0),
        (1.0, 2.0), (-126.0, TINY), (NAN, NAN),
    ),
    "fast_softplus": (
        (-INF, 0.0), (INF, INF), (LARGEST, LARGEST), (-LARGEST, 0.0), (0.0, LN2), (-0.0, LN2), (-30000.0, 0.0),
        (20.0, 20.000000002061153), (NAN, NAN),
    ),
    "fast_silu": (
        (0.0, 0.0), (-0.0, -0.0), (INF, INF), (LARGEST, LARGEST), (-INF, NAN), (-LARGEST, -0.0), (NAN, NAN),
    ),
}  # fmt: skip


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_at_edges(name, arithmetic):
    edges = EDGES[name]
    for (x, want), got in zip(edges, apply(name, [x for x, _ in edges], arithmetic)):
        if math.isnan(want):
            assert math.isnan(got), f"{name}({x}) is {got}"
            continue
        if (got, want) == (INF, LARGEST) and arithmetic != "exact":
            continue  # no document says that the reciprocal of one is one
        assert math.copysign(1, got) == math.copysign(1, want), f"{name}({x}) is {got}, expected {want}"
        rel = 2 * ULP if arithmetic == "exact" else 4 * ULP
        assert got == pytest.approx(want, rel=rel, abs=TINY), f"{name}({x}) is {got}, expected {want}"


def test_exponentials_overflow_visibly():
    """Above what float32 holds `decay` is NaN, as documented, and the power of two is infinite."""
    assert all(math.isnan(v) or v == INF for v in apply("decay", [89.0, 1e4, INF]))
    assert apply("power_of_two", [128.0, 1e4]) == [INF, INF]


def test_larger_of_two_is_nan_if_one_is():
    values = [NAN, 1.0, -0.0, -INF, SUBNORMAL, 2.0] + [0.0] * 20 + [3.0, INF, 0.0, -SUBNORMAL, 5.0, 1.0]
    one, other = emulated(tuple(values))[-2:].tolist()
    for x, y, a, b in zip(values, values[::-1], one, other):
        if math.isnan(x) or math.isnan(y):
            assert math.isnan(a) and math.isnan(b)
        else:
            assert a == b == max(x, y)


# ----------------------------------------------------------------------------------------------------------- two inputs
class Gates:
    """Columns of `out`: what gates of the gated delta rule are made of."""

    @cute.jit
    def __call__(self, rates: cute.Tensor, values: cute.Tensor, out: cute.Tensor):
        self.kernel(rates, values, out).launch(grid=[values.shape[0] // WARP, 1, 1], block=[WARP, 1, 1])

    @cute.kernel
    def kernel(self, rates: cute.Tensor, values: cute.Tensor, out: cute.Tensor):
        i = cute.arch.block_idx()[0] * WARP + cute.arch.thread_idx()[0]
        product, low = device.gate_exponent(rates[i], values[i])
        out[i, 0] = product
        out[i, 1] = low
        out[i, 2] = device.gate_decay(rates[i], values[i])


def gates(rates, values, arithmetic):
    count = -(-len(rates) // WARP) * WARP
    padded = [torch.tensor([*t, *[0.0] * (count - len(t))]) for t in (rates, values)]
    out = torch.full((count, 3), 7.0)
    with ptxsim.emulate(arch="sm_90a", arithmetic=ARITHMETICS[arithmetic]):
        compiled_gates()(*padded, out)
    return out[: len(rates)].double()


@functools.cache
def compiled_gates():
    column, count = (Float32, (cute.sym_int32(),), (1,)), cute.sym_int32()
    fakes = (fake(*column), fake(*column), fake(Float32, (count, 3), (3, 1)))
    return ptxsim.compile(Gates(), *fakes, arch="sm_90a")


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_gates_of_the_delta_rule(arithmetic):
    rates = [-10.0, -4.0, 0.0, 1.0, 5.0] * 60
    values = torch.linspace(-60, 60, len(rates)).tolist()
    edges = [
        (0.0, INF), (0.0, -INF), (-INF, 3.0), (88.0, 5.0), (200.0, 1.0), (0.0, 1e38), (0.0, 0.0), (-200.0, -200.0),
        (89.0, -INF), (INF, -LARGEST), (NAN, 1.0), (NAN, -INF), (0.0, NAN), (-INF, NAN),
    ]  # fmt: skip
    got = gates(rates + [a for a, _ in edges], values + [x for _, x in edges], arithmetic)
    A, x = torch.tensor(rates).double(), torch.tensor(values).double()
    want = torch.exp(A) * softplus(x)
    some = want <= 1e4
    error = ((got[: len(rates), 0] - want).abs() / want)[some & (want > TINY)] / ULP
    assert error.max() <= 2.5
    both = (got[: len(rates), :2].sum(1) - want).abs()[some]
    assert (both <= 2.5 * ULP * want[some] + TINY).all()
    decays = torch.exp(-want)
    inside = want < 80
    error = ((got[: len(rates), 2] - decays).abs() / decays)[inside]
    assert (error <= (1.5 + 2.5 * want[inside]) * ULP).all()
    at = got[len(rates) :]
    assert at[:, 0].tolist()[:2] == [1e4, 0.0]
    assert at[:, 2].tolist()[:2] == [0.0, 1.0]
    assert at[2, 2] == 1, "no decay at rate 0"
    assert at[3:6, 0].tolist() == [1e4] * 3
    assert at[3:6, 2].tolist() == [0.0] * 3
    assert at[6, 2] == pytest.approx(0.5, rel=2 * ULP)
    assert at[10:, ::2].isnan().all(), "what is not a number stays none"
    assert at[7:10, ::2].tolist() == [[0.0, 1.0]] * 3, "no step is no decay, whatever the rate"


# ------------------------------------------------------------------------------------------------------ sums over lanes
class Lanes:
    """Rows of `out`: running sums, then sums and largest over segments of `lanes`, of `count` values a lane."""

    def __init__(self, lanes, count):
        self.lanes, self.count = lanes, count

    @cute.jit
    def __call__(self, values: cute.Tensor, out: cute.Tensor):
        self.kernel(values, out).launch(grid=[1, 1, 1], block=[WARP, 1, 1])

    @cute.kernel
    def kernel(self, values: cute.Tensor, out: cute.Tensor):
        lane = cute.arch.lane_idx()
        mine = [values[lane, n] for n in range(self.count)]
        out[0, lane] = device.running_sum(mine[0])
        out[1, lane] = device.sum_exchanged(list(mine), self.lanes)
        out[2, lane] = device.max_exchanged(list(mine), self.lanes)
        out[3, lane] = device.from_lane(mine[0], 31 - lane)
        out[4, lane] = device.exchanged(mine[0], 3)
        out[5, lane] = scan.sum_chains(list(mine))
        share = scan.scatter_sums(list(mine), lane, min(self.lanes, self.count))
        for n in cutlass.range_constexpr(len(share)):
            out[6 + n, lane] = share[n]


def lanes(values, segment):
    count = values.shape[1]
    out = torch.full((6 + count, WARP), 7.0)
    with ptxsim.emulate(arch="sm_90a"):
        fakes = (fake(Float32, tuple(values.shape), (count, 1)), fake(Float32, tuple(out.shape), (WARP, 1)))
        ptxsim.compile(Lanes(segment, count), *fakes, arch="sm_90a")(values, out)
    return out


@pytest.mark.parametrize(("segment", "count"), [(8, 8), pytest.param(32, 4, marks=pytest.mark.slow), (4, 2)])
def test_sums_over_lanes(segment, count):
    """Of integers, whose sums are exact in any order: every lane has the sum, and the share, that it should have."""
    g = torch.Generator().manual_seed(count)
    values = torch.randint(-1000, 1000, (WARP, count), generator=g).float()
    out = lanes(values, segment)
    equal(out[0], torch.cat([values[:16, 0].cumsum(0), values[16:, 0].cumsum(0)]))
    for lane in range(WARP):
        first, mine = lane // segment * segment, lane % segment % count
        members = range(first, first + segment)
        chosen = [values[j, mine ^ (j % segment % count)] for j in members]
        assert out[1, lane] == sum(chosen), f"lane {lane}"
        assert out[2, lane] == max(chosen), f"lane {lane}"
        assert out[3, lane] == values[31 - lane, 0]
        assert out[4, lane] == values[lane ^ 3, 0]
        assert out[5, lane] == values[lane].sum()
        width = min(segment, count)
        start, share = lane // width * width, count // width
        sums = values[start : start + width].sum(0)
        at = lane % width * share
        equal(out[6 : 6 + share, lane], sums[at : at + share], f"lane {lane}")


def test_sums_over_lanes_of_numbers_that_are_not_finite():
    values = torch.zeros(WARP, 8)
    values[3, 0], values[9, 5], values[17, 1], values[18, 2] = NAN, -INF, INF, -0.0
    out = lanes(values, 8)
    assert out[0, :3].eq(0).all()
    assert out[0, 3:16].isnan().all()
    assert out[0, 16:].eq(0).all(), "the other half of the warp sums for itself"
    owner = {lane: lane % 8 % 8 for lane in range(WARP)}
    for row, lane_of in ((1, "sum"), (2, "largest")):
        for lane in range(WARP):
            first = lane // 8 * 8
            chosen = torch.stack([values[j, owner[lane] ^ (j % 8)] for j in range(first, first + 8)])
            want = chosen.sum() if row == 1 else chosen.amax()
            got = out[row, lane]
            assert got.isnan() if want.isnan() else got == want, f"{lane_of} of lane {lane}: {got}, expected {want}"
