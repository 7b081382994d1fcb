"""`TokenOperands`: x, B and C of bfloat16 or float16 as operands of products with coefficients in float32.

A coefficient is multiplied as the sum of two parts, so that products are as exact as sums of float32.  For bfloat16
inputs the parts are two bfloat16, each in one product of 16 positions.  float16 has too small a range of exponents for
coefficients: for float16 inputs the parts are two tf32, in products of 8 positions.

The 16 positions of an operand are those of `mma`'s fragments.  For lane ``4 g + p``, words 0 and 1 hold the positions
2 p and 2 p + 1; words 2 and 3, or the second of two words, hold the positions 8 further on.
"""

from collections.abc import Sequence
from typing import NamedTuple, Optional

import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Numeric

from cute_ssm.device import convert, mma

Pairs = list[list[Float32]]  # values of the lane's pairs of positions


class _Part(NamedTuple):
    """One of the operands that add up to a product, and the values that it holds."""

    operand: list[list[Float32]] | list[Int32]
    values: Pairs


class TokenOperands:
    """Operands of `dtype`, float16 or bfloat16."""

    def __init__(self, dtype: type[Numeric]):
        self.dtype = dtype

    def products(self, c: Sequence[list[Int32]], b: Sequence[list[Int32]], sums: list[Float32]) -> list[Float32]:
        """Add C_t . B_j to `sums`; c and b hold two words for each 16 columns of eight tokens and eight positions."""
        for (first, second), words in zip(c, b):
            sums = mma.mma_16([first, first, second, second], words, sums, self.dtype)
        return sums

    def coefficients(self, values: list[Float32]) -> Sequence[list[Numeric]]:
        """Return the lane's four of [16 positions, 8 tokens] as the other operand of `multiply`, in two parts."""
        if self.dtype is BFloat16:
            high = convert.pack(values, BFloat16)
            low = [v - h for v, h in zip(values, convert.unpack(high, BFloat16))]
            return [high, convert.pack(low, BFloat16)]
        return mma.split(values)

    def multiply(self, x: list[Int32], parts: Sequence[list[Numeric]], sums: list[Float32]) -> list[Float32]:
        """Return sums + x^T times coefficients; x holds the words of [16 columns, 16 positions]."""
        for part in parts:
            if self.dtype is BFloat16:
                sums = mma.mma_16(x, part, sums, BFloat16)
            else:
                for i, a in enumerate(self._thin(self._values(x))):
                    sums = mma.mma_tf32(a, part[2 * i : 2 * i + 2], sums)
        return sums

    def weigh(
        self, x: list[Int32], weights: list[Float32], row_factors: Optional[list[Float32]], num_parts: int
    ) -> list[list[list[Float32]] | list[Int32]]:
        """Return [16 columns of x, 16 positions] times weights as `num_parts` operands, the smallest first.

        `weights` are those of the lane's four positions.  `row_factors`, if not None, are those of its two columns of
        x, which are rows of the result.  One part has 8 bits of bfloat16 or 11 of tf32, two have 16 or 22, and three
        have all.
        """
        factors = [list(zip(pair, weights[i // 2 * 2 :])) for i, pair in enumerate(self._values(x))]
        if row_factors is not None:
            factors = [[(v * w, row_factors[i % 2]) for v, w in pair] for i, pair in enumerate(factors)]
        values = [[v * w for v, w in pair] for pair in factors]
        operands: list[list[list[Float32]] | list[Int32]] = []
        for i in range(num_parts):
            part = self._part(values, i == num_parts - 1, num_parts == 1)
            operands.insert(0, part.operand)
            if i == 0:  # from the products before they are rounded: the rest is then exact
                values = [[cute.math.fma(v, w, -h) for (v, w), h in zip(*pair)] for pair in zip(factors, part.values)]
            else:
                values = [[v - h for v, h in zip(*pair)] for pair in zip(values, part.values)]
        return operands

    def _part(self, values: Pairs, last: bool, alone: bool) -> _Part:
        """Return the highest bits of the lane's four pairs."""
        if self.dtype is BFloat16:
            # saturated, so that the rest of an infinite value is infinite and not NaN
            words = [convert.pack(pair, BFloat16, saturate=not last)[0] for pair in values]
            return _Part(words, [convert.unpack([word], BFloat16) for word in words])
        high = [mma.rounded(pair) if alone else pair if last else mma.split(pair)[0] for pair in values]
        return _Part(self._thin(high), high)

    def accumulate(
        self, weighed: Sequence[list[list[Float32]] | list[Int32]], b: list[Int32], sums: list[Float32]
    ) -> list[Float32]:
        """Return sums + weighed x times B; b holds two words of [16 positions, 8 columns]."""
        for part in weighed:
            if self.dtype is BFloat16:
                sums = mma.mma_16(part, b, sums, BFloat16)
            else:
                for a, word in zip(part, b):
                    sums = mma.mma_tf32(a, convert.unpack([word], self.dtype), sums)
        return sums

    def _values(self, words: list[Int32]) -> Pairs:
        return [convert.unpack([word], self.dtype) for word in words]

    @staticmethod
    def _thin(pairs: Pairs) -> Pairs:
        """Return the values of one operand of 16 positions as two operands of 8 positions."""
        return [[pairs[i][0], pairs[i + 1][0], pairs[i][1], pairs[i + 1][1]] for i in (0, 2)]
