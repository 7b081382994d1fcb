"""Generation token by token, and the comparison of what it computed with float64."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cute_ssm.demo.model import LanguageModel, StateUpdate, operator
from cute_ssm.demo.sampling import Sampler
from cute_ssm.demo.ssd import recurrence
from cute_ssm.errors import describe

__all__ = ["Deviation", "Generation"]


@dataclass
class _Layer:
    """What one layer's state updates were given and gave: the inputs of every step, and the state before the first."""

    start: Tensor
    A: Tensor
    D: Tensor
    dt_bias: Tensor
    x: list[Tensor] = field(default_factory=list)
    dt: list[Tensor] = field(default_factory=list)
    B: list[Tensor] = field(default_factory=list)
    C: list[Tensor] = field(default_factory=list)
    out: list[Tensor] = field(default_factory=list)


class _Recorder:
    """A state update that hands its arguments on to another and keeps copies of them, layer by layer."""

    def __init__(self, update: StateUpdate, layers: int) -> None:
        self.update = update
        self.layers: list[_Layer] = []
        self._count = layers
        self._calls = 0

    def __call__(
        self, state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **options: object
    ) -> Tensor:
        index = self._calls % self._count
        self._calls += 1
        if index == len(self.layers):
            slots, bias = options["state_batch_indices"], options["dt_bias"]
            if not isinstance(slots, Tensor) or not isinstance(bias, Tensor):
                raise TypeError(describe("state_batch_indices, dt_bias", "tensors", (type(slots), type(bias))))
            self.layers.append(_Layer(state[slots].cpu(), A[:, 0, 0].cpu(), D[:, 0].cpu(), bias[:, 0].cpu()))
        layer = self.layers[index]
        layer.x.append(x.clone())
        layer.dt.append(dt[:, :, 0].clone())
        layer.B.append(B.clone())
        layer.C.append(C.clone())
        out = self.update(state, x, dt, A, B, C, D, **options)
        layer.out.append(out.clone())
        return out


@dataclass(frozen=True)
class Deviation:
    """The largest difference of what was computed from its float64 counterpart, and the largest value of the latter."""

    difference: float
    largest: float

    @classmethod
    def of(cls, got: Tensor, expected: Tensor) -> Deviation:
        """Compare two tensors of one shape; a NaN anywhere is a difference of NaN."""
        difference = (got.to("cpu", torch.float64) - expected).abs()
        return cls(float(difference.max()), float(expected.abs().max()))


class Generation:
    """One sequence on its way: prefills the prompt, then yields a token for every state update.

    The last token of the prompt is the first that goes through the state update, so `count` tokens take `count` steps
    of the model, and ``count * layers`` state updates.

    Parameters
    ----------
    model : LanguageModel
        The model, on the device the updates run on.
    prompt : sequence of int
        At least one token.
    count : int
        Tokens to generate.
    sampler : Sampler
        Chooses each token.
    state_dtype : torch.dtype
        Type of the recurrent states.
    update : StateUpdate, optional
        The state update, :func:`cute_ssm.selective_state_update` when not given.
    slots, slot : int
        Size of the pool of states, and the slot this sequence uses.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Sequence[int],
        count: int,
        sampler: Sampler,
        state_dtype: torch.dtype = torch.float32,
        update: StateUpdate | None = None,
        slots: int = 4,
        slot: int = 2,
    ) -> None:
        if not prompt:
            raise ValueError(describe("prompt", "at least one token", "none"))
        if count < 1:
            raise ValueError(describe("tokens", "at least 1", count))
        if not 0 <= slot < slots:
            raise ValueError(describe("slot", f"a value in [0, {slots})", slot))
        update = update or operator()
        device = model.embedding.device
        self.model, self.sampler, self.count = model, sampler, count
        self.slots, self.slot = slots, slot
        self.tokens = list(prompt)
        self.prompt_length = len(self.tokens)
        self.seconds = 0.0
        self.prefill_seconds = 0.0
        self.logits: list[Tensor] = []
        self._cache = model.new_cache(slots, state_dtype)
        self._index = torch.tensor([slot], device=device)
        self._spare = torch.tensor([(slot + 1) % slots], device=device)
        self._update = update
        self._recorder = _Recorder(update, model.config.layers)

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.prompt_length :]

    def warm_up(self) -> float:
        """Run one step on another slot, so that compilation is over before the time is taken; returns its seconds."""
        begin = time.perf_counter()
        token = torch.tensor([self.tokens[0]], device=self._index.device)
        self.model.step(token, self._cache, self._spare, self._update)
        self._wait()
        return time.perf_counter() - begin

    def run(self) -> Iterator[int]:
        """Prefill, then yield the tokens as they are made; only the model's own work counts in ``seconds``."""
        device = self._index.device
        begin = time.perf_counter()
        if self.prompt_length > 1:
            prompt = torch.tensor([self.tokens[:-1]], device=device)
            self.model.prefill(prompt, self._cache, self._index)
            self._wait()
        self.prefill_seconds = time.perf_counter() - begin
        for _ in range(self.count):
            begin = time.perf_counter()
            last = torch.tensor(self.tokens[-1:], device=device)
            logits = self.model.step(last, self._cache, self._index, self._recorder)
            token = int(self.sampler(logits)[0])
            self.seconds += time.perf_counter() - begin
            self.logits.append(logits)
            self.tokens.append(token)
            yield token

    def ssm_deviation(self) -> Deviation:
        """Compare the outputs of all state updates with the float64 recurrence on the same inputs and first states."""
        worst = Deviation(0.0, 0.0)
        steps = len(self.generated)  # an interrupted step has left more than this in some lists
        for layer in self._recorder.layers:
            x, dt, B, C, out = (_series(v[:steps]) for v in (layer.x, layer.dt, layer.B, layer.C, layer.out))
            step = torch.nn.functional.softplus(dt + layer.dt_bias.double())
            expected, _ = recurrence(x, step, layer.A.double(), B, C, layer.D.double(), layer.start.double())
            worst = _worse(worst, Deviation.of(out, expected))
        return worst

    def logits_deviation(self) -> Deviation:
        """Compare the logits with those of the whole model in float64, token by token from the start of the prompt."""
        exact = copy.deepcopy(self.model).to("cpu", torch.float64)
        with torch.no_grad():
            expected = exact(torch.tensor([self.tokens[:-1]]), chunk=None)[:, self.prompt_length - 1 :]
        return Deviation.of(torch.stack(self.logits[: len(self.generated)], dim=1), expected)

    def _wait(self) -> None:
        if self._index.is_cuda:
            torch.cuda.synchronize(self._index.device)


def _series(values: list[Tensor]) -> Tensor:
    return torch.stack(values, dim=1).to("cpu", torch.float64)


def _worse(one: Deviation, other: Deviation) -> Deviation:
    difference = max(one.difference, other.difference, key=lambda value: (math.isnan(value), value))
    return Deviation(difference, max(one.largest, other.largest))
