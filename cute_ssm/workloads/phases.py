"""Phases of speculative decoding: how many accepted tokens a slot holds beside its state, once a batch has mixed.

A step has T tokens and room for W: it writes the state if ``k + T > W``, where k tokens were accepted since the state
was written.  Then `a` of its tokens are accepted, and k becomes `a` after a write, else ``k + a``.  The k of a slot is
a Markov chain; its stationary distribution is what a batch in service looks like.  A benchmark with one k for all
slots, or with k = 0, measures something that does not occur.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch

# Accepted tokens of a step of 6, counted in service: TensorRT-LLM, pull request 14203.  Mean 3.95.
HISTOGRAM = (539622, 329144, 336224, 495832, 444398, 1007008)


def accepted(tokens: int, chance: float = 0.8) -> tuple[float, ...]:
    """Return the distribution of the accepted tokens of a step, 1 to `tokens`.

    Of six tokens, as counted (`HISTOGRAM`); else each draft is accepted with `chance`, up to the first that is not.
    """
    if tokens == len(HISTOGRAM):
        return tuple(count / sum(HISTOGRAM) for count in HISTOGRAM)
    return geometric(tokens, chance)


def geometric(tokens: int, chance: float) -> tuple[float, ...]:
    """Return the distribution of accepted tokens, 1 to `tokens`, if each draft is accepted with `chance`."""
    return tuple(chance**n * (1 - chance if n < tokens - 1 else 1) for n in range(tokens))


@functools.lru_cache(maxsize=256)
def stationary(window: int, accepts: tuple[float, ...]) -> tuple[float, ...]:
    """Return the distribution of k, 0 to `window`, before a step.

    Parameters
    ----------
    window : int
        W, at least one.
    accepts : tuple of float
        Distribution of the accepted tokens of a step, one to T.
    """
    tokens = len(accepts)
    highest = max(window, tokens)
    now = [0.0] * (highest + 1)
    now[0] = 1.0
    mean = now
    for _ in range(64):  # means of ever longer stretches: a chain may be periodic
        total = [0.0] * (highest + 1)
        for _ in range(4 * highest):
            now = _step(now, window, tokens, accepts)
            total = [a + b for a, b in zip(total, now)]
        before, mean = mean, [value / (4 * highest) for value in total]
        if max(abs(a - b) for a, b in zip(before, mean)) < 1e-12:
            break
    return tuple(mean)


def _step(now: Sequence[float], window: int, tokens: int, accepts: Sequence[float]) -> list[float]:
    after = [0.0] * len(now)
    for k, share in enumerate(now):
        kept = 0 if k + tokens > window else k
        for n, chance in enumerate(accepts, 1):
            after[kept + n] += share * chance
    return after


def write_fraction(window: int, accepts: tuple[float, ...]) -> float:
    """Return the share of steps that write the state."""
    return sum(share for k, share in enumerate(stationary(window, accepts)) if k + len(accepts) > window)


def draw(batch: int, window: int, accepts: tuple[float, ...], seed: int = 0) -> torch.Tensor:
    """Return k of `batch` slots, int32, in random order.

    Stratified: the shares of a batch are those of the distribution as nearly as its size allows, so that two batches
    of a size cost the same.
    """
    shares = stationary(window, accepts)
    bounds = list(itertools.accumulate(shares))
    points = [(i + 0.5) / batch * bounds[-1] for i in range(batch)]
    drawn, k = [], 0
    for point in points:
        while bounds[k] < point:
            k += 1
        drawn.append(k)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(drawn, dtype=torch.int32)[order]
