"""Logits in float64, and token choices that do not depend on rounding.

Logits differ in their last bits between backends, and between generation token by token and several tokens at once.
Occasionally such a difference changes a token.  `Decisions` prevents this: if an error of `tolerance` in the logits
could change a choice, the choice is made from float64 logits.  As long as the computed logits are within the tolerance
of the float64 ones, *every* token is the one that float64 would choose, on every backend.  `Run.logits_deviation`
reports whether they were.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from cute_ssm.demo.model import LanguageModel
from cute_ssm.demo.sampling import Sampler
from cute_ssm.demo.ssd import recurrence
from cute_ssm.errors import describe

__all__ = ["Decisions", "ExactModel"]


def double_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **options: Tensor | bool | None
) -> Tensor:
    """`cute_ssm.selective_state_update` in float64, for the arguments that the demo's model passes."""
    slots, bias, out = options["state_batch_indices"], options["dt_bias"], options["out"]
    if not isinstance(slots, Tensor) or not isinstance(bias, Tensor) or not isinstance(out, Tensor):
        raise TypeError(describe("state_batch_indices, dt_bias, out", "tensors", (type(slots), type(bias), type(out))))
    step = torch.nn.functional.softplus(dt[..., 0] + bias[:, 0])
    series = (t[:, None] for t in (x, step, B, C))
    x, step, B, C = series
    y, state[slots] = recurrence(x, step, A[:, 0, 0], B, C, D[:, 0], state[slots])
    return out.copy_(y[:, 0])


class ExactModel:
    """Float64 logits along a text, each computed once, at the first request.

    Parameters
    ----------
    model : LanguageModel
        Its weights are copied to the CPU.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = copy.deepcopy(model).to("cpu", torch.float64)
        self._slot = torch.zeros(1, dtype=torch.int64)
        self._cache = self._model.new_cache(1)
        self._seen: list[int] = []
        self._logits: list[Tensor] = []

    def logits(self, tokens: Sequence[int], first: int) -> Tensor:
        """Return the logits after each of ``tokens[first:]``, (count, vocab).

        Each call should extend the text of the call before; any other text is computed from its start.
        """
        if self._seen != list(tokens[: len(self._seen)]) or first < len(self._seen) - len(self._logits):
            self._seen, self._logits = [], []
        if not self._seen:
            for pool in (*self._cache.conv, *self._cache.ssm):
                pool.zero_()
            if first:  # no logits before `first` are requested
                self._model.prefill(torch.tensor([tokens[:first]]), self._cache, self._slot)
                self._seen = list(tokens[:first])
        for token in tokens[len(self._seen) :]:
            self._logits.append(self._model.step(torch.tensor([token]), self._cache, self._slot, double_update)[0])
            self._seen.append(token)
        start = first - (len(self._seen) - len(self._logits))
        return torch.stack(self._logits[start : start + len(tokens) - first])


class Decisions:
    """Chooses the tokens of one text so that logit errors up to a tolerance do not change them.

    Parameters
    ----------
    model : LanguageModel
        The model that generates.
    sampler : Sampler
    tolerance : float
        Choices with a margin up to this are made from float64 logits.
    first : int
        Position of the first chosen token, at least 1.

    Attributes
    ----------
    close : int
        Number of choices made from float64 logits.
    exact : ExactModel
    """

    def __init__(self, model: LanguageModel, sampler: Sampler, tolerance: float, first: int) -> None:
        if not tolerance >= 0:
            raise ValueError(describe("tolerance", "a number of at least 0", tolerance))
        self.exact = ExactModel(model)
        self.tolerance = tolerance
        self.close = 0
        self._sampler = sampler
        self._first = first

    def __call__(self, logits: Tensor, tokens: Sequence[int]) -> int:
        """Choose the token after `tokens` from logits ``(vocab,)``."""
        choice = self._sampler(logits, len(tokens))
        if choice.margin <= self.tolerance:
            self.close += 1
            choice = self._sampler(self.exact.logits(tokens, self._first - 1)[-1], len(tokens))
        return choice.token
