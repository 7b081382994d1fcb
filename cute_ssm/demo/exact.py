"""The model in float64, and decisions that do not depend on how its float32 twin was computed.

Two ways to run a model, token by token or several at once, by kernel or by PyTorch, give logits that differ in their
last bits, and now and then a choice hangs on those.  `Decisions` makes the text independent of them: a choice that an
error of `tolerance` in the logits could change is made from the logits in float64 instead.  So as long as the logits of
a way are within the tolerance of those in float64, *every* token is the one that float64 would choose, whichever way
it is.  `Generation.logits_deviation` measures whether they were.
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
    """Do in float64 what `cute_ssm.selective_state_update` does for the demo's model."""
    slots, bias, out = options["state_batch_indices"], options["dt_bias"], options["out"]
    if not isinstance(slots, Tensor) or not isinstance(bias, Tensor) or not isinstance(out, Tensor):
        raise TypeError(describe("state_batch_indices, dt_bias, out", "tensors", (type(slots), type(bias), type(out))))
    step = torch.nn.functional.softplus(dt[..., 0] + bias[:, 0])
    series = (t[:, None] for t in (x, step, B, C))
    x, step, B, C = series
    y, state[slots] = recurrence(x, step, A[:, 0, 0], B, C, D[:, 0], state[slots])
    return out.copy_(y[:, 0])


class ExactModel:
    """Logits in float64 along a text, computed where they are asked for, each once.

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

        Texts that are asked for one after the other should continue each other.
        """
        if self._seen != list(tokens[: len(self._seen)]) or first < len(self._seen) - len(self._logits):
            self._seen, self._logits = [], []
        if not self._seen:
            for pool in (*self._cache.conv, *self._cache.ssm):
                pool.zero_()
            if first:  # nobody asked for these
                self._model.prefill(torch.tensor([tokens[:first]]), self._cache, self._slot)
                self._seen = list(tokens[:first])
        for token in tokens[len(self._seen) :]:
            self._logits.append(self._model.step(torch.tensor([token]), self._cache, self._slot, double_update)[0])
            self._seen.append(token)
        start = first - (len(self._seen) - len(self._logits))
        return torch.stack(self._logits[start : start + len(tokens) - first])


class Decisions:
    """Chooses tokens of one text so that they do not depend on errors of logits up to a tolerance.

    Parameters
    ----------
    model : LanguageModel
        The model whose choices they are.
    sampler : Sampler
    tolerance : float
        Choices with a smaller margin are made from the logits in float64.
    first : int
        Position of the first token that is chosen, at least 1.

    Attributes
    ----------
    close : int
        How many choices were made from the logits in float64.
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
