"""Kernels of one thread per eight elements (or fewer), each around one function of `cute_ssm.device`."""

from __future__ import annotations

import functools

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.runtime import make_fake_tensor

import ptxsim
from cute_ssm.arch import by_name
from cute_ssm.device import convert, memory, philox

THREADS = 128
VALUES = 8  # of a thread


class Rounding:
    """out (and scale) of values, per thread: stochastic with given words, or nearest without."""

    def __init__(self, dtype, arch, stochastic):
        self.name, self.dtype, self.arch, self.stochastic = dtype, convert.DTYPES[dtype], by_name(arch), stochastic
        self.quantised = self.dtype in convert.SCALE_FACTORS

    @cute.jit
    def __call__(self, values: cute.Tensor, words: cute.Tensor | None, out: cute.Tensor, scale: cute.Tensor | None):
        threads = values.shape[0]
        self.kernel(values, words, out, scale).launch(grid=[threads // THREADS, 1, 1], block=[THREADS, 1, 1])

    @cute.kernel
    def kernel(self, values: cute.Tensor, words: cute.Tensor | None, out: cute.Tensor, scale: cute.Tensor | None):
        i = cute.arch.block_idx()[0] * THREADS + cute.arch.thread_idx()[0]
        h = memory.load(memory.address(values, i, 0), Float32, VALUES, 16)
        random = memory.load_words(memory.address(words, i, 0), 4) if const_expr(self.stochastic) else None
        if const_expr(self.quantised):
            stored, encode = convert.row_scale(convert.max_abs(h, self.arch), self.dtype)
            memory.store_scalar(memory.address(scale, i), stored, Float32)
            packed = convert.pack_quantised(h, encode, self.dtype, random)
        elif const_expr(self.stochastic):
            packed = convert.pack_stochastic(h, random, self.dtype, self.arch)
        else:
            packed = convert.pack(h, self.dtype)
        size = VALUES * self.dtype.width // 8
        memory.store_packed(memory.address(out, i, 0), packed, self.dtype, min(size, 16))


class Unpacking:
    """values of stored elements, by accesses of a given size, stored again by the same accesses."""

    def __init__(self, dtype, access):
        self.dtype, self.access = convert.DTYPES[dtype], access
        self.quantised = self.dtype in convert.SCALE_FACTORS

    @cute.jit
    def __call__(self, stored: cute.Tensor, values: cute.Tensor, again: cute.Tensor):
        self.kernel(stored, values, again).launch(grid=[stored.shape[0] // THREADS, 1, 1], block=[THREADS, 1, 1])

    @cute.kernel
    def kernel(self, stored: cute.Tensor, values: cute.Tensor, again: cute.Tensor):
        i = cute.arch.block_idx()[0] * THREADS + cute.arch.thread_idx()[0]
        count = const_expr(16)
        got = memory.load(memory.address(stored, i, 0), self.dtype, count, self.access)
        memory.store(memory.address(values, i, 0), got, Float32, 16)
        if const_expr(self.quantised):
            packed = convert.pack_quantised(got, Float32(1.0), self.dtype)
        else:
            packed = convert.pack(got, self.dtype)
        memory.store_packed(memory.address(again, i, 0), packed, self.dtype, self.access)


class Drawing:
    """The words of `count` columns, one thread per (slot, row) and piece of the row."""

    def __init__(self, rounds, count, dstate):
        self.rounds, self.count, self.dstate = rounds, count, dstate

    @cute.jit
    def __call__(
        self, seed: cute.Tensor, slot: cute.Tensor, head: cute.Tensor, row: cute.Tensor, column: cute.Tensor,
        token: cute.Tensor, out: cute.Tensor,
    ):  # fmt: skip
        self.kernel(seed, slot, head, row, column, token, out).launch(
            grid=[slot.shape[0] // THREADS, 1, 1], block=[THREADS, 1, 1]
        )

    @cute.kernel
    def kernel(
        self, seed: cute.Tensor, slot: cute.Tensor, head: cute.Tensor, row: cute.Tensor, column: cute.Tensor,
        token: cute.Tensor, out: cute.Tensor,
    ):  # fmt: skip
        i = cute.arch.block_idx()[0] * THREADS + cute.arch.thread_idx()[0]
        keys = philox.round_keys(seed[0], self.rounds)
        counter = philox.row_counter(slot[i], head[i], token[i])
        words = philox.words(keys, counter, row[i], column[i], self.count, self.dstate)
        for k in cutlass.range_constexpr(self.count // 2):
            memory.store_words(memory.address(out, i, k), [words[k]])


class Storing:
    """Rows of a state, stored stochastically by threads of `count` columns each."""

    def __init__(self, dtype, arch, count, dstate):
        self.dtype, self.arch, self.count, self.dstate = convert.DTYPES[dtype], by_name(arch), count, dstate
        self.quantised = self.dtype in convert.SCALE_FACTORS
        self.pieces = dstate // count

    @cute.jit
    def __call__(
        self, seed: cute.Tensor, values: cute.Tensor, encode: cute.Tensor, out: cute.Tensor, slot: cutlass.Int64
    ):
        self.kernel(seed, values, encode, out, slot).launch(
            grid=[values.shape[0] * self.pieces // THREADS, 1, 1], block=[THREADS, 1, 1]
        )

    @cute.kernel
    def kernel(
        self, seed: cute.Tensor, values: cute.Tensor, encode: cute.Tensor, out: cute.Tensor, slot: cutlass.Int64
    ):
        i = cute.arch.block_idx()[0] * THREADS + cute.arch.thread_idx()[0]
        row, column = i // self.pieces, i % self.pieces * self.count
        h = memory.load(memory.address(values, row, column), Float32, self.count, 4)
        keys = philox.round_keys(seed[0], 10)
        words = philox.words(keys, philox.row_counter(slot, 5, 2), row, column, self.count, self.dstate)
        if const_expr(self.quantised):
            packed = convert.pack_quantised(h, encode[row], self.dtype, words)
        else:
            packed = convert.pack_stochastic(h, words, self.dtype, self.arch)
        size = min(self.count * self.dtype.width // 8, 16)
        memory.store_packed(memory.address(out, row, column), packed, self.dtype, size, self.count)


def _tensor(dtype, *inner):
    rows = cute.sym_int32(divisibility=THREADS)
    strides = tuple(reversed([int(_product(inner[len(inner) - k :])) for k in range(len(inner))]))
    outer = _product(inner)
    return make_fake_tensor(dtype, (rows, *inner), (outer, *strides), assumed_align=16)


def _product(sizes):
    return functools.reduce(lambda a, b: a * b, sizes, 1)


@functools.cache
def rounding(dtype, arch, stochastic):
    kernel = Rounding(dtype, arch, stochastic)
    return ptxsim.compile(
        kernel,
        _tensor(Float32, VALUES),
        _tensor(Int32, VALUES // 2) if stochastic else None,
        _tensor(kernel.dtype, VALUES),
        _tensor(Float32) if kernel.quantised else None,
        arch=arch,
    )


@functools.cache
def unpacking(dtype, access, arch):
    kernel = Unpacking(dtype, access)
    return ptxsim.compile(kernel, _tensor(kernel.dtype, 16), _tensor(Float32, 16), _tensor(kernel.dtype, 16), arch=arch)


@functools.cache
def drawing(rounds, count, dstate, arch):
    integers = (_tensor(cutlass.Int64), *(_tensor(Int32) for _ in range(4)))
    seed = make_fake_tensor(cutlass.Int64, (1,), (1,))
    return ptxsim.compile(Drawing(rounds, count, dstate), seed, *integers, _tensor(Int32, count // 2), arch=arch)


@functools.cache
def storing(dtype, count, dstate, arch):
    kernel = Storing(dtype, arch, count, dstate)
    seed = make_fake_tensor(cutlass.Int64, (1,), (1,))
    state = (_tensor(Float32, dstate), _tensor(Float32), _tensor(kernel.dtype, dstate))
    return ptxsim.compile(kernel, seed, *state, cutlass.Int64(0), arch=arch)
