"""`TokenOperands`: x, B and C of bfloat16 or float16 as operands of products with coefficients in float32.

A coefficient is multiplied as the sum of two parts, so that products are as exact as sums of float32: bfloat16 inputs
take two bfloat16, in one product of 16 positions each.  float16 has too few exponents for coefficients: float16 inputs
take two tf32, in products of 8 positions.  The 16 positions of an operand are those of `mma`'s fragments: of words
(0, 1) for lane ``4 g + p``, 2 p and 2 p + 1; of words (2, 3), or of the second of two, 8 more.
"""

import cutlass.cute as cute
from cutlass import BFloat16

from cute_ssm.device import convert, mma


class TokenOperands:
    """Operands of `dtype`, float16 or bfloat16."""

    def __init__(self, dtype):
        self.dtype = dtype

    def products(self, c, b, sums):
        """C_t . B_j: c and b list two words for each 16 columns of the rows of eight tokens and eight positions."""
        for (first, second), words in zip(c, b):
            sums = mma.mma_16([first, first, second, second], words, sums, self.dtype)
        return sums

    def coefficients(self, values):
        """The lane's four of [16 positions, 8 tokens] as the other operand of `multiply`."""
        if self.dtype is BFloat16:
            high = convert.pack(values, BFloat16)
            low = [v - h for v, h in zip(values, convert.unpack(high, BFloat16))]
            return [high, convert.pack(low, BFloat16)]
        return mma.split(values)

    def multiply(self, x, parts, sums):
        """sums + x^T times coefficients; x are the words of [16 columns, 16 positions]."""
        for part in parts:
            if self.dtype is BFloat16:
                sums = mma.mma_16(x, part, sums, BFloat16)
            else:
                for i, a in enumerate(self._thin(self._values(x))):
                    sums = mma.mma_tf32(a, part[2 * i : 2 * i + 2], sums)
        return sums

    def weigh(self, x, weights, rows, parts):
        """Words of [16 columns of x, 16 positions] times weights, as `parts` operands, the smallest first.

        `weights` are those of the lane's four positions, `rows`, or None, of its two columns of x, which are rows of
        the result.  One part has 8 bits of bfloat16 or 11 of tf32, two have 16 or 22, three have all.
        """
        factors = [list(zip(pair, weights[i // 2 * 2 :])) for i, pair in enumerate(self._values(x))]
        if rows is not None:
            factors = [[(v * w, rows[i % 2]) for v, w in pair] for i, pair in enumerate(factors)]
        values, operands = [[v * w for v, w in pair] for pair in factors], []
        for part in range(parts):
            operand, high = self._part(values, part == parts - 1, parts == 1)
            operands.insert(0, operand)
            if part == 0:  # of the products themselves, not rounded: what is left after their highest bits is exact
                values = [[cute.math.fma(v, w, -h) for (v, w), h in zip(*pair)] for pair in zip(factors, high)]
            else:
                values = [[v - h for v, h in zip(*pair)] for pair in zip(values, high)]
        return operands

    def _part(self, values, last, alone):
        """(values of the lane's four pairs as an operand, what it holds of them)."""
        if self.dtype is BFloat16:
            # what is left of an infinite value is infinite
            words = [convert.pack(pair, BFloat16, saturate=not last)[0] for pair in values]
            return words, [convert.unpack([word], BFloat16) for word in words]
        high = [mma.rounded(pair) if alone else pair if last else mma.split(pair)[0] for pair in values]
        return self._thin(high), high

    def accumulate(self, weighed, b, sums):
        """sums + weighed x times B; b are two words of [16 positions, 8 columns]."""
        for part in weighed:
            if self.dtype is BFloat16:
                sums = mma.mma_16(part, b, sums, BFloat16)
            else:
                for a, word in zip(part, b):
                    sums = mma.mma_tf32(a, convert.unpack([word], self.dtype), sums)
        return sums

    def _values(self, words):
        return [convert.unpack([word], self.dtype) for word in words]

    @staticmethod
    def _thin(pairs):
        """Two operands of 8 positions from the values of one of 16."""
        return [[pairs[i][0], pairs[i + 1][0], pairs[i][1], pairs[i + 1][1]] for i in (0, 2)]
