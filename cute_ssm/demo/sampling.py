"""The choice of the next token from logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cute_ssm.errors import describe

__all__ = ["Sampler"]


class Sampler:
    """Draws tokens with a generator of its own, on the CPU, so that a seed means the same on every backend.

    Parameters
    ----------
    temperature : float
        Divides the logits; 0 takes the likeliest token.
    seed : int
        Seed of the generator.
    floor : float
        Tokens less likely than this fraction of the likeliest one are never drawn.
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
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """Choose a token ``(batch,)`` for every row of logits ``(batch, vocab)``."""
        logits = logits.detach().to("cpu", torch.float64)
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        # a temperature near 0 must not overflow: only differences to the largest logit matter
        scaled = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature
        weights = torch.exp(scaled)
        weights = torch.where(weights >= self.floor, weights, 0.0)
        return torch.multinomial(weights, 1, generator=self.generator)[:, 0]
