"""`StateTile`: rows of a head's state in swizzled shared memory, as operand and as result of matrix products.

A *quad* is what one ``ldmatrix`` loads: 32 bytes of 16 rows.  Lane ``4 g + p`` gets four bytes of row g, four of
row g + 8, and the same 16 bytes further on, for every type.  The order of columns in a sum does not matter, so each
word becomes an operand without moving between lanes:

- 16-bit types: one register of an operand of `mma.mma_16`;
- 8-bit types: two registers of float16; int8 is increased by 1152, and the sums start with that much less;
- int16: a register of upper and a register of lower bytes, for two products;
- float32: one register of an operand of `mma.mma_tf32`.

The same words, as float32, are one accumulator [16 rows, 8 columns] for each four of their elements.  A new state is
accumulated on the old one and stored at the same addresses.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Union

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int8, Int16, Int32, Numeric
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import cpasync
from cutlass.cutlass_dsl import T, dsl_user_op

from cute_ssm.arch import Arch
from cute_ssm.device import convert, memory, mma, philox
from cute_ssm.device.asm import pure

ROWS = 16  # of a product
HELD_QUADS = 16  # most quads for which registers hold C in float32
_BYTE_SHIFT = 1024.0 + 128.0  # of a signed byte in the low bits of float16's 1024
_LOW_SHIFT = 1024.0  # of an unsigned one

Accumulators = list[list[Float32]]


class TileCopy(NamedTuple):
    """A copy of tiles by a tensor map, and its two sides."""

    atom: cute.CopyAtom
    shared: cute.Tensor  # (box, stage)
    pool: cute.Tensor  # (box, tile of a slot, slot)


class Projection(NamedTuple):
    """C of eight tokens as an operand of `StateTile.product`."""

    operand: Any  # lists of registers for each 16 columns, or a pointer to C where registers cannot hold it
    start: list[Float32]  # accumulator that sums start from
    low_start: list[Float32]  # the same for the lower bytes of int16
    factors: list[Float32]  # of the lane's two columns of results


class _WordPair(NamedTuple):
    """The two words of float16 that a word of bytes, or of int16, becomes."""

    first: Int32
    second: Int32


@dsl_user_op
def _two_words(word: Int32, text: str, *, loc: Any = None, ip: Any = None) -> list[Int32]:
    words = pure(llvm.StructType.get_literal([T.i32()] * 2), [word], text, "=&r,=r,r", loc, ip)
    return [Int32(llvm.extractvalue(T.i32(), words, [i], loc=loc, ip=ip)) for i in range(2)]


def _spread(word: Int32, text: str) -> _WordPair:
    """Return the two words that an instruction sequence makes of one."""
    return _WordPair(*_two_words(word, text))


def _bytes_to_float16(word: Int32) -> _WordPair:
    """Return the signed bytes (0, 1) and (2, 3) as float16, each increased by 1152."""
    text = (
        "{ .reg .b32 t; xor.b32 t, $2, 0x80808080; prmt.b32 $0, t, 0x64646464, 0x4140; "
        "prmt.b32 $1, t, 0x64646464, 0x4342; }"
    )
    return _spread(word, text)


def _float8_to_float16(word: Int32) -> _WordPair:
    text = "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }"
    return _spread(word, text)


def _int16_to_float16(word: Int32) -> _WordPair:
    """Return the upper bytes as float16, increased by 1152, and the lower bytes, increased by 1024."""
    text = (
        "{ .reg .b32 t; xor.b32 t, $2, 0x80808080; prmt.b32 $0, t, 0x64646464, 0x4341; "
        "prmt.b32 $1, $2, 0x64646464, 0x4240; }"
    )
    return _spread(word, text)


@dsl_user_op
def _larger_pair(most: Int32, pair: Int32, *, loc: Any = None, ip: Any = None) -> Int32:
    """Return the larger magnitudes of two pairs of bfloat16, with either sign."""
    return Int32(pure(T.i32(), [most, pair], "max.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", loc, ip))


@dsl_user_op
def _times(pair: Int32, factor: Int32, *, loc: Any = None, ip: Any = None) -> Int32:
    """Return the products of two pairs of bfloat16."""
    return Int32(pure(T.i32(), [pair, factor], "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", loc, ip))


@dsl_user_op
def _power_of_two(x: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    """Return 2^floor(log2 x) of a positive normal x; 0 of 0."""
    return Float32(pure(T.f32(), [x], "and.b32 $0, $1, 0x7f800000;", "=f,f", loc, ip))


@dsl_user_op
def _inverse_power_of_two(x: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    text = "{ .reg .b32 t; and.b32 t, $1, 0x7f800000; sub.s32 $0, 0x7f000000, t; }"
    return Float32(pure(T.f32(), [x], text, "=f,f", loc, ip))


@dsl_user_op
def _pair_of(low: Int32, high: Int32, *, loc: Any = None, ip: Any = None) -> Int32:
    """Return the low halves of two words."""
    return Int32(pure(T.i32(), [low, high], "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", loc, ip))


@dsl_user_op
def _reversed_bits(word: Int32, *, loc: Any = None, ip: Any = None) -> Int32:
    return Int32(pure(T.i32(), [word], "brev.b32 $0, $1;", "=r,r", loc, ip))


class StateTile:
    """`rows` rows of `dstate` columns; a warp works on 16 of them at a time.

    In shared memory, rows are divided into `pieces` of `piece` bytes (32, 64 or 128).  The 16-byte chunks of a piece
    are swizzled, so that eight rows of a chunk use every bank once.  A tensor map copies a whole tile.
    """

    def __init__(
        self,
        dtype: type[Numeric],
        inputs: type[Numeric],
        rows: int,
        dstate: int,
        arch: Arch,
        philox_rounds: int = 0,
        saturate: bool = False,
    ):
        self.dtype, self.inputs, self.rows, self.dstate = dtype, inputs, rows, dstate
        self.arch, self.rounds, self.saturate = arch, philox_rounds, saturate
        self.scaled = dtype in (Int16, Int8, cutlass.Float8E4M3FN)
        pitch = dstate * dtype.width // 8
        self.piece = max(size for size in (32, 64, 128) if pitch % size == 0)
        self.pieces = pitch // self.piece
        self.bytes = rows * pitch
        self.bits = {32: 1, 64: 2, 128: 3}[self.piece]  # of the swizzle
        self.quads = pitch // 32
        self.per_piece = self.piece // 32
        self.blocks = rows // ROWS
        self.results = {8: 4, 16: 2, 32: 1}[dtype.width]  # accumulators of a quad
        self.per_draw = 1 if dtype.width == 8 else 2  # quads that one call of `draw` serves
        self.wide = dtype is Float32 or (dtype is BFloat16 and inputs is Float16)  # operands are tf32
        self.operand = BFloat16 if dtype is BFloat16 else Float16
        self.normalised = not self.wide and self.operand is not inputs  # C is bfloat16 and has to become float16

    # -------------------------------------------------------------------------------------------------------- geometry
    def tensor_box(self) -> tuple[int, ...]:
        """Return the elements of a tile in the order of the tensor map: (piece, rows, pieces, 1)."""
        return self.piece * 8 // self.dtype.width, self.rows, self.pieces, 1

    def shared_layout(self, stages: Optional[int] = None) -> cute.ComposedLayout:
        """Return the layout of tiles in shared memory, (box, stage), or that of one tile, (box).

        Do not slice one tile off the others: DSL 4.8.1 crashes for some strides.
        """
        row = self.piece * 8 // self.dtype.width
        size = row * self.rows * self.pieces
        shape: tuple[int, ...] = self.tensor_box()
        stride: tuple[int, ...] = (1, row, row * self.rows, size)
        if stages is not None:
            shape, stride = (*shape, stages), (*stride, size)
        plain = cute.make_layout(shape, stride=stride)
        return cute.make_composed_layout(cute.make_swizzle(self.bits, 4, 3), 0, plain)

    def global_view(self, state: cute.Tensor) -> cute.Tensor:
        """Return the pool [slots, heads, dim, dstate] in the order of `tensor_box`."""
        slots, heads, dim = state.shape[:3]
        row = self.piece * 8 // self.dtype.width
        shape, stride = (row, heads * dim, self.pieces, slots), (1, state.shape[3], row, state.stride[0])
        return cute.make_tensor(state.iterator, cute.make_layout(shape, stride=stride))

    def partition(self, atom: cute.CopyAtom, view: cute.Tensor, tiles: cute.Tensor) -> TileCopy:
        """Return both sides of copies between the pool and the `tiles` in shared memory."""
        tiled = cute.local_tile(view, self.tensor_box(), (0, None, 0, None))
        sides = cpasync.tma_partition(
            atom, 0, cute.make_layout(1), cute.group_modes(tiles, 0, 4), cute.group_modes(tiled, 0, 4)
        )
        return TileCopy(atom, *sides)

    def pointers(self, tiles: cute.Pointer, lane: Int32) -> list[cute.Pointer]:
        """Return this lane's addresses of the quads of a piece in the first of the `tiles` in shared memory."""
        row = lane % ROWS
        turn = row >> (3 - self.bits) & ((1 << self.bits) - 1)
        return [tiles + (row * self.piece + ((2 * quad + lane // ROWS) ^ turn) * 16) for quad in range(self.per_piece)]

    def quad_at(self, pointers: list[cute.Pointer], quad: int, block: int) -> cute.Pointer:
        """Return the address of a quad of a block of 16 rows."""
        offset = quad // self.per_piece * self.rows * self.piece + block * ROWS * self.piece
        return pointers[quad % self.per_piece] + offset

    # --------------------------------------------------------------------------------------------------------- product
    @cute.jit
    def projection(self, natural: list[list[Int32]], row: cute.Pointer, lane: Int32) -> Projection:
        """Return C as the other operand of `product`.

        `natural` holds the words of C as an operand of `mma.mma_16`, two for each 16 columns; `row` is the address of
        the row of C of token ``lane // 4``.
        """
        p = lane % 4
        start, factors = [Float32(0.0)] * 4, [Float32(1.0)] * 2
        low = start
        if cutlass.const_expr(self.wide):
            operand = self._wide_projection(natural, row, p)
        else:
            operand = natural
            if cutlass.const_expr(self.dtype.width == 8):
                operand = [memory.load_words(row + (quad * 32 + p * 8), 2) for quad in range(self.dstate // 16)]
            if cutlass.const_expr(self.normalised):
                operand, factors = self._normalise(operand, lane)
            if cutlass.const_expr(self.dtype is Int8 or self.dtype is Int16):
                ones = [Int32(0x3C003C00)] * 4
                for pair in operand:
                    start = mma.mma_16(ones, pair, start, Float16)
                low = [value * -_LOW_SHIFT for value in start]
                start = [value * -_BYTE_SHIFT for value in start]
        return Projection(operand, start, low, factors)

    def _wide_projection(
        self, natural: list[list[Int32]], row: cute.Pointer, p: Int32
    ) -> Union[list[list[Float32]], cute.Pointer]:
        """Return C in float32, for `_wide_pair`: its values, or their address if registers cannot hold them."""
        if self.dtype is not Float32:
            return [convert.unpack([word], self.inputs) for pair in natural for word in pair]
        at = cute.recast_ptr(row, dtype=self.inputs) + p
        return at if self.quads > HELD_QUADS else [self._wide_pair(at, quad) for quad in range(self.quads)]

    def _wide_pair(self, operand: Union[list[list[Float32]], cute.Pointer], quad: int) -> list[Float32]:
        """Return C of the columns (p, p + 4) of each 8, or (2 p, 2 p + 1) where a word holds two states."""
        if isinstance(operand, list):
            return operand[quad]
        return [memory.load_scalar(operand + (quad * 8 + i), self.inputs) for i in (0, 4)]

    def _normalise(self, operand: list[list[Int32]], lane: Int32) -> tuple[list[list[Int32]], list[Float32]]:
        """Return C / 2^e as float16, and 2^e of the lane's two columns of results.

        2^e <= max < 2^(e + 1) of a token's bfloat16; the quotients are exact down to 2^-24 of that.  The exponent is
        at most 126, and a token of subnormal numbers counts as zero.
        """
        top = Int32(0)
        for pair in operand:
            for word in pair:
                top = _larger_pair(top, word)
        most = cute.arch.fmax(*convert.unpack([top & 0x7FFF7FFF], BFloat16))
        for distance in (1, 2):
            most = cute.arch.fmax(most, cute.arch.shuffle_sync_bfly(most, distance))
        most = cute.arch.fmin(most, Float32(2.0**126))  # whose inverse is still normal
        up, down = _power_of_two(most), _inverse_power_of_two(most)
        (down,) = convert.pack([down, down], BFloat16)  # a power of two: exact, and so are products that float16 holds
        scaled = []
        for pair in operand:
            values = convert.unpack([_times(word, down) for word in pair], BFloat16)
            scaled.append(convert.pack(values, Float16))
        return scaled, [cute.arch.shuffle_sync(up, lane % 4 * 8 + 4 * i) for i in range(2)]

    def product(self, pointers: list[cute.Pointer], projection: Projection) -> Accumulators:
        """Return the state times C^T of eight tokens: one accumulator [16 rows, 8 tokens] for each block."""
        operand = projection.operand
        sums = [projection.start] * self.blocks
        low = [projection.low_start] * self.blocks
        for quad in range(self.quads):
            column = self._wide_pair(operand, quad) if self.dtype is Float32 else None
            for block in range(self.blocks):
                words = mma.load_matrices(self.quad_at(pointers, quad, block), 4, transposed=False)
                if self.dtype is Float32:
                    a = mma.rounded([convert.as_float(word) for word in words])
                    sums[block] = mma.mma_tf32(a, column, sums[block])
                elif self.wide:
                    for i in range(2):
                        (a0, a2), (a1, a3) = (convert.unpack([word], BFloat16) for word in words[2 * i : 2 * i + 2])
                        sums[block] = mma.mma_tf32([a0, a1, a2, a3], operand[2 * quad + i], sums[block])
                elif self.dtype is Int16:
                    parts = [_int16_to_float16(word) for word in words]
                    sums[block] = mma.mma_16([high for high, _ in parts], operand[quad], sums[block], Float16)
                    low[block] = mma.mma_16([part for _, part in parts], operand[quad], low[block], Float16)
                elif self.dtype.width == 8:
                    spread = _bytes_to_float16 if self.dtype is Int8 else _float8_to_float16
                    pairs = [spread(word) for word in words]
                    for i in range(2):
                        (a0, a2), (a1, a3) = pairs[2 * i : 2 * i + 2]
                        sums[block] = mma.mma_16([a0, a1, a2, a3], operand[2 * quad + i], sums[block], Float16)
                else:
                    sums[block] = mma.mma_16(words, operand[quad], sums[block], self.operand)
        if self.dtype is Int16:
            return [[cute.math.fma(h, Float32(256.0), part) for h, part in zip(*both)] for both in zip(sums, low)]
        return sums

    # --------------------------------------------------------------------------------------------------------- results
    def columns(self, quad: int, result: int, g: Int32) -> Int32:
        """Return the column of the state that is column g of an accumulator of a quad."""
        if self.dtype is Float32:
            return quad * 8 + g // 2 + g % 2 * 4
        if self.dtype.width == 8:
            return quad * 32 + result // 2 * 16 + g // 2 * 4 + g % 2 + result % 2 * 2
        return quad * 16 + result * 8 + g

    def history_rows(self, first: int, lane: Int32) -> list[Int32]:
        """Return the positions, of 16 from `first` on, whose rows of B this lane reads for `history_operand`."""
        if self.dtype.width == 16:
            return [first + lane % 8 + lane // 8 % 2 * 8]
        return [first + 2 * (lane % 4) + i for i in (0, 1, 8, 9)]

    def history_operand(self, rows: list[cute.Pointer], quad: int, lane: Int32) -> list[list[Int32]]:
        """Return B of 16 positions as operands for the accumulators of a quad, two words each.

        `rows` holds the addresses of the rows of `history_rows`.
        """
        if self.dtype.width == 16:
            words = mma.load_matrices(rows[0] + (quad * 32 + lane // 16 * 16), 4)
            return [words[:2], words[2:]]
        operands = []
        for result in range(self.results):
            offset = self.columns(quad, result, lane // 4) * 2
            halves = [Int32(memory.load_words(row + offset, 1, 16)[0]) for row in rows]
            operands.append([_pair_of(*halves[:2]), _pair_of(*halves[2:])])
        return operands

    def identity(self, decay: Float32, lane: Int32) -> Union[Float32, list[Int32]]:
        """Return what `accumulators` multiplies old states by: a decay, or one where states are quantised.

        The result holds the lane's words of matrices [16, 8] with that factor on a diagonal: the upper diagonal for
        the first eight columns of an operand, the lower for the others.  A decay is the sum of two such matrices.
        Its relative error is 2^-17 for bfloat16 states.  For float16 states it is 2^-22, or an absolute 2^-25 below
        2^-13, which is less than the rounding of the inputs adds.  A state that is not finite spreads over 16 columns
        of its row.
        """
        if self.dtype is Float32:
            return decay
        g, p = lane // 4, lane % 4
        mask = cutlass.select_(g // 2 == p, cutlass.select_(g % 2 == 0, Int32(0xFFFF), Int32(-65536)), Int32(0))
        if self.dtype is Int16:
            return [mask & 0x5C005C00, mask & 0x3C003C00]  # 256 for upper bytes, and 1
        if self.scaled:
            return [mask & 0x3C003C00]
        (high,) = convert.pack([decay, decay], self.operand)
        rest = decay - convert.unpack([high], self.operand)[0]
        return [mask & high, mask & convert.pack([rest, rest], self.operand)[0]]

    def accumulators(self, words: list[Int32], identity: list[Int32]) -> Accumulators:
        """Return a quad as accumulators: decayed, or the integers or float8 themselves where states are quantised.

        A product with the identity moves words into the layout of results, in float32, and changes no element.
        """
        start = [Float32({Int8: -_BYTE_SHIFT, Int16: -256.0 * _BYTE_SHIFT - _LOW_SHIFT}.get(self.dtype, 0.0))] * 4
        operands: list[Sequence[Int32]] = [words]
        if self.dtype.width == 8:
            spread = _bytes_to_float16 if self.dtype is Int8 else _float8_to_float16
            pairs = [spread(word) for word in words]
            operands = [[pairs[i].first, pairs[i + 1].first, pairs[i].second, pairs[i + 1].second] for i in (0, 2)]
        parts: list[list[Any]] = [[a] * len(identity) for a in operands]
        if self.dtype is Int16:
            parts = [list(zip(*(_int16_to_float16(word) for word in words)))]
        results = []
        for a in parts:
            for result in range(2):
                c = start
                for part, diagonal in zip(a, identity):
                    b = [diagonal, Int32(0)] if result == 0 else [Int32(0), diagonal]
                    c = mma.mma_16(part, b, c, self.operand)
                results.append(c)
        return results

    def decayed(self, words: list[Int32], decay: Float32, results: Accumulators) -> Accumulators:
        """Return a quad of a float32 state, decayed, plus accumulators, rounded once."""
        (c,) = results
        return [[cute.math.fma(convert.as_float(words[i]), decay, c[j]) for j, i in enumerate((0, 2, 1, 3))]]

    def words(
        self, results: Accumulators, encode: Optional[list[Float32]], bits: Optional[list[list[Int32]]]
    ) -> list[Int32]:
        """Return the accumulators of a quad, rounded, in the words of `accumulators`.

        `encode` holds the encoding factors of rows g and g + 8 of quantised types; `bits` holds the quad's bits of
        `draw` for stochastic rounding, or is None.
        """
        if self.dtype is Float32:
            (c,) = results
            return [convert.as_word(c[i]) for i in (0, 2, 1, 3)]
        size = self.results // 2  # accumulators of one word
        rows = [
            [value for c in results[i * size : (i + 1) * size] for value in c[2 * half : 2 * half + 2]]
            for i in range(2)
            for half in range(2)
        ]
        drawn: list[Any] = [None] * 4
        if bits is not None:  # row g + 8 takes the bits of row g in reverse
            drawn = [each for half in bits for each in (half, [_reversed_bits(word) for word in half])]
        if encode is not None:
            return [convert.pack_quantised(rows[i], encode[i % 2], self.dtype, drawn[i])[0] for i in range(4)]
        if bits is None:
            return [convert.pack(row, self.dtype, self.saturate)[0] for row in rows]
        pairs = zip(rows, drawn)
        return [convert.pack_stochastic(row, each, self.dtype, self.arch, self.saturate)[0] for row, each in pairs]

    def draw(
        self, keys: list[philox.RoundKey], row_counter: philox.RowCounter, row: Int32, quad: int, lane: Int32
    ) -> list[list[list[Int32]]]:
        """Return random bits for `words` of `per_draw` quads, from `quad` on, by the map of `reference.rounding`.

        `row_counter` holds the words of the counter that a row shares; `row` is that of row g in the head.
        """
        group = quad if self.dtype.width == 8 else quad // 2
        counter = ((row >> 4) * 8 + (row & 7)) * (self.dstate // 8) + (group * 4 + (lane & 3))
        words = philox.philox(keys, counter, *row_counter)
        if self.dtype.width == 8:
            return [[words[:2], words[2:]]]
        return [[[words[i]], [words[i + 1]]] for i in (0, 2)]
