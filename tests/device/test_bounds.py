"""`device.bounds.in_range` in the emulator: every kind of index against every kind of bound, and its instructions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("cutlass")

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32

import cute_ssm
import ptxsim
from cute_ssm.device import bounds
from cute_ssm.device.fakes import fake

THREADS = 32
ROWS = 7
WRAPPING = 2**32 + 3  # a bound, and an index, that 32 bits would take for 3


class Kernel:
    """Column j of `out`: whether a thread's index is within bound j."""

    @cute.jit
    def __call__(self, index: cute.Tensor, table: cute.Tensor, out: cute.Tensor, few: Int32, many: Int64):
        self.kernel(index, table, out, few, many).launch(grid=[1, 1, 1], block=[THREADS, 1, 1])

    @cute.kernel
    def kernel(self, index: cute.Tensor, table: cute.Tensor, out: cute.Tensor, few: Int32, many: Int64):
        i = cute.arch.thread_idx()[0]
        value = index[i]
        limits = (table.shape[0], few, many, ROWS, WRAPPING, -few)
        for j in cutlass.range_constexpr(len(limits)):
            out[i, j] = Int32(bounds.in_range(value, limits[j]))
        out[i, len(limits)] = Int32(bounds.in_range(ROWS - 1, value))


def values(wide):
    some = [-(2**31), -1000, -3, -1, 0, 1, ROWS - 1, ROWS, ROWS + 1, 2**31 - 1]
    far = [2**32, -(2**32), 2**32 - 1, WRAPPING - 1, WRAPPING, 2**63 - 1, -(2**63)]
    return some + far if wide else some


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_is_compared_with_both_bounds_as_a_number(dtype):
    some = values(dtype is torch.int64)
    index = torch.tensor(some + [0] * (THREADS - len(some)), dtype=dtype)
    out = torch.full((THREADS, 7), -1, dtype=torch.int32)
    name = str(dtype).removeprefix("torch.")
    fakes = (fake(name, (THREADS,), (1,)), fake("int32", (cute.sym_int32(),)), fake("int32", (THREADS, 7), (7, 1)))
    with ptxsim.emulate(arch="sm_90a"):
        kernel = ptxsim.compile(Kernel(), *fakes, Int32(0), Int64(0), arch="sm_90a")
        kernel(index, torch.zeros(ROWS, dtype=torch.int32), out, ROWS, WRAPPING)
    for value, got in zip(some, out.tolist()):
        want = [0 <= value < bound for bound in (ROWS, ROWS, WRAPPING, ROWS, WRAPPING, -ROWS)]
        assert got == [*want, ROWS - 1 < value], f"index {value}"
    compared = [line.split()[0] for line in kernel.ptx.splitlines() if "setp." in line]
    wide = dtype is torch.int64
    assert not wide or all(name.endswith("64") for name in compared), f"truncated: {compared}"
    assert f"setp.lt.u{64 if wide else 32}" in compared, "a constant bound takes one comparison"
    assert len(compared) <= 12


def test_unsigned_numbers_are_refused():
    with pytest.raises(TypeError, match="Uint32"):
        bounds.in_range(Uint32(3), 7)
    with pytest.raises(TypeError, match="Uint32"):
        bounds.in_range(3, Uint32(7))


def test_numbers_known_while_tracing():
    assert bool(bounds.in_range(3, 4))
    assert not bool(bounds.in_range(4, 4))
    assert not bool(bounds.in_range(-1, 4))


def test_no_kernel_compares_what_it_has_converted_to_unsigned():
    """The conversion of a size keeps its sign, so that such comparisons are signed; `in_range` is meant."""
    unsigned, less = r"Uint(8|16|32|64)\([^()]*(\([^()]*\)[^()]*)*\)", r"(?<![<>])[<>]=?(?![<>])"
    comparison = re.compile(f"{unsigned} *{less}|{less} *{unsigned}")
    assert comparison.search("Uint32(k) <= Uint32(spec.window)")
    assert comparison.search("bound > Uint32(Int32(k))")
    assert not comparison.search("Uint32(1) << Uint32(lane)")
    package = Path(cute_ssm.__file__).parent
    found = [
        f"{path.name}:{number}"
        for folder in ("kernels", "device")
        for path in sorted((package / folder).glob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if comparison.search(line) and "``" not in line
    ]
    assert not found
