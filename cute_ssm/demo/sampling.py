"""Token sampling: the choice is a function of logits, seed and position, and comes with its margin."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.reference.rounding import philox

__all__ = ["Choice", "Sampler"]

_ROUNDS = 10
_BLOCK = 64  # positions whose random numbers are drawn together


@dataclass(frozen=True)
class Choice:
    """A token, and its margin: errors of all logits up to this size do not change the token."""

    token: int
    margin: float


class Sampler:
    """Samples tokens on the CPU; the random numbers of a position depend only on the seed and the position.

    Among the tokens at least `floor` times as likely as the most likely one, the token with the largest ``logit +
    temperature * g`` is chosen, with Gumbel noise g, which samples from their distribution.  The result does not depend
    on how often, in which order, or in which step a position is sampled.

    Parameters
    ----------
    temperature : float
        Sampling temperature; 0 takes the most likely token.
    seed : int
        Seed of the noise.
    floor : float
        Tokens less likely than this fraction of the most likely one are never chosen.
    """

    def __init__(self, temperature: float = 0.0, seed: int = 0, floor: float = 0.1) -> None:
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(describe("temperature", "a finite number of at least 0", temperature))
        if not 0 <= floor <= 1:
            raise ValueError(describe("floor", "a number in [0, 1]", floor))
        if not 0 <= seed < 2**63:
            raise ValueError(describe("seed", "an integer in [0, 2^63)", seed))
        self.temperature = temperature
        self.floor = floor
        self.seed = seed
        self._reach = -temperature * math.log(floor) if temperature and floor else math.inf
        self._drawn: tuple[int, int, Tensor] = (-1, 0, torch.empty(0))

    def __call__(self, logits: Tensor, position: int) -> Choice:
        """Choose the token at a position of the text from its logits ``(vocab,)``."""
        logits = logits.detach().to("cpu", torch.float64)
        short = logits.max() - logits  # distance to the most likely token
        score = logits
        if self.temperature:
            score = logits + self.temperature * self._noise(position, len(logits))
        open_to = short <= self._reach
        token = int(torch.where(open_to, score, -math.inf).argmax())
        # The choice changes if another token is above `floor` and has the larger score, or if this one falls below
        # `floor`.  An error of this size in both logits closes half of the gap each.
        lacks = torch.maximum(score[token] - score, short - self._reach)
        lacks[token] = math.inf
        others = torch.where(torch.arange(len(logits)) == token, -math.inf, logits)
        above = float(self._reach - (others.max() - logits[token]))  # distance of this token from `floor`
        return Choice(token, min(float(lacks.min()), above) / 2)

    def _noise(self, position: int, count: int) -> Tensor:
        """Gumbel noise of all tokens at a position."""
        block, row = divmod(position, _BLOCK)
        if self._drawn[:2] != (block, count):
            rows = torch.arange(block * _BLOCK, (block + 1) * _BLOCK)[:, None]
            word = philox(self.seed, (torch.arange(count), rows, 0, 0), _ROUNDS)[0]
            uniform = (word.double() + 0.5) / 2.0**32
            self._drawn = block, count, -torch.log(-torch.log(uniform))
        return self._drawn[2][row]
