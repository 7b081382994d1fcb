"""Generation token by token, and comparison of its results with float64."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cute_ssm.demo.exact import Decisions
from cute_ssm.demo.model import LanguageModel, StateUpdate, operator
from cute_ssm.demo.sampling import Sampler
from cute_ssm.demo.ssd import recurrence
from cute_ssm.errors import describe

__all__ = ["TOLERANCES", "Deviation", "Generation", "LayerRecord", "Run", "Step"]

#: Logit errors that change no choice, by dtype of the states: several times the errors of the shipped model.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 0.02, torch.float16: 0.02, torch.bfloat16: 0.15}


@dataclass
class LayerRecord:
    """Inputs and outputs of one layer's state updates, and the state before the first of them.

    Inputs and outputs hold one tensor (tokens, ...) per step.
    """

    start: Tensor
    A: Tensor
    D: Tensor
    dt_bias: Tensor
    x: list[Tensor] = field(default_factory=list)
    dt: list[Tensor] = field(default_factory=list)
    B: list[Tensor] = field(default_factory=list)
    C: list[Tensor] = field(default_factory=list)
    out: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, state: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor) -> LayerRecord:
        """Start a record from the state of one sequence, (nheads, dim, dstate), and the layer's weights."""
        return cls(state[None].cpu(), A[:, 0, 0].cpu(), D[:, 0].cpu(), dt_bias[:, 0].cpu())

    def deviation(self, steps: Sequence[int]) -> Deviation:
        """Compare the outputs at the first ``steps[i]`` tokens of each step i with the float64 recurrence."""

        def series(values: list[Tensor]) -> Tensor:
            parts = [value[:count] for value, count in zip(values, steps)]
            return torch.cat(parts)[None].to("cpu", torch.float64)

        x, dt, B, C, out = (series(values) for values in (self.x, self.dt, self.B, self.C, self.out))
        step = torch.nn.functional.softplus(dt + self.dt_bias.double())
        expected, _ = recurrence(x, step, self.A.double(), B, C, self.D.double(), self.start.double())
        return Deviation.of(out, expected)


class _Recorder:
    """A state update that calls another one and records its inputs and outputs for each layer."""

    def __init__(self, update: StateUpdate, layers: int) -> None:
        self.update = update
        self.layers: list[LayerRecord] = []
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
            self.layers.append(LayerRecord.of(state[slots][0], A, D, bias))
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
    """The largest difference from a float64 result, and the largest absolute value of that result."""

    difference: float
    largest: float

    @classmethod
    def of(cls, got: Tensor, expected: Tensor) -> Deviation:
        """Compare two tensors of the same shape; any NaN makes the difference NaN."""
        difference = (got.to("cpu", torch.float64) - expected).abs()
        return cls(float(difference.max()), float(expected.abs().max()))


@dataclass(frozen=True)
class Step:
    """A step of the model.

    Attributes
    ----------
    accepted : int
        Tokens added to the history, including the first one, which needs no verification.  As many were generated.
    wrote : bool
        Whether the states of all layers were written.
    """

    accepted: int
    wrote: bool


class Run(ABC):
    """Generation of one sequence: the common base of generation token by token and by speculation.

    Every token is the one that float64 logits would choose, as long as the computed logits are within `tolerance` of
    them: see `cute_ssm.demo.exact`.

    Parameters
    ----------
    model : LanguageModel
        The model, on the device where the updates run.
    prompt : sequence of int
        At least one token.
    count : int
        Tokens to generate.
    sampler : Sampler
        Chooses each token.
    slots, slot : int
        Size of the state pool, and the slot of this sequence.
    tolerance : float
        Largest logit error that changes no choice.

    Attributes
    ----------
    steps : list of Step
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Sequence[int],
        count: int,
        sampler: Sampler,
        slots: int,
        slot: int,
        tolerance: float,
    ) -> None:
        if not prompt:
            raise ValueError(describe("prompt", "at least one token", "none"))
        if count < 1:
            raise ValueError(describe("tokens", "at least 1", count))
        if not 0 <= slot < slots:
            raise ValueError(describe("slot", f"a value in [0, {slots})", slot))
        device = model.embedding.device
        self.model, self.count = model, count
        self.slots, self.slot = slots, slot
        self.tokens = list(prompt)
        self.prompt_length = len(self.tokens)
        self.steps: list[Step] = []
        self.seconds = 0.0
        self.prefill_seconds = 0.0
        self.logits: list[Tensor] = []  # (vocab,) of every generated token
        self.decisions = Decisions(model, sampler, tolerance, self.prompt_length)
        self._index = torch.tensor([slot], device=device)
        self._spare = torch.tensor([(slot + 1) % slots], device=device)

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.prompt_length :]

    @property
    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of one write of the states of all layers."""

    @abstractmethod
    def warm_up(self) -> float:
        """Run one step on another slot, so that the measured time includes no compilation; return its seconds."""

    @abstractmethod
    def run(self) -> Iterator[int]:
        """Prefill, then yield tokens as they are generated; ``seconds`` excludes decisions in float64."""

    @abstractmethod
    def ssm_deviation(self) -> Deviation:
        """Compare the outputs of all state updates with the float64 recurrence on the same inputs and initial state."""

    def logits_deviation(self) -> Deviation:
        """Compare the logits with those of the whole model in float64 on the same text."""
        expected = self.decisions.exact.logits(self.tokens[:-1], self.prompt_length - 1)
        return Deviation.of(torch.stack(self.logits[: len(expected)]), expected)

    def _wait(self) -> None:
        if self._index.is_cuda:
            torch.cuda.synchronize(self._index.device)


class Generation(Run):
    """Generation token by token: prefills the prompt, then generates one token per step.

    The first step takes the last token of the prompt, so `count` tokens take `count` steps of the model and
    ``count * layers`` state updates.

    Parameters
    ----------
    model, prompt, count, sampler, slots, slot
        As for `Run`.
    state_dtype : torch.dtype
        Dtype of the recurrent states.
    update : StateUpdate, optional
        Default: :func:`cute_ssm.selective_state_update`.
    tolerance : float, optional
        Default: the entry of `TOLERANCES`.
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
        tolerance: float | None = None,
    ) -> None:
        tolerance = TOLERANCES[state_dtype] if tolerance is None else tolerance
        super().__init__(model, prompt, count, sampler, slots, slot, tolerance)
        update = update or operator()
        self._cache = model.new_cache(slots, state_dtype)
        self._update = update
        self._recorder = _Recorder(update, model.config.layers)

    @property
    def state_bytes(self) -> int:
        """Bytes of one write of the states of all layers."""
        return sum(pool[0].nbytes for pool in self._cache.ssm)

    def warm_up(self) -> float:
        """Run one step on another slot, so that the measured time includes no compilation; return its seconds."""
        begin = time.perf_counter()
        token = torch.tensor([self.tokens[0]], device=self._index.device)
        self.model.step(token, self._cache, self._spare, self._update)
        self._wait()
        return time.perf_counter() - begin

    def run(self) -> Iterator[int]:
        """Prefill, then yield tokens as they are generated; ``seconds`` excludes decisions in float64."""
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
            logits = self.model.step(last, self._cache, self._index, self._recorder)[0].cpu()
            self.seconds += time.perf_counter() - begin
            token = self.decisions(logits, self.tokens)
            self.logits.append(logits)
            self.tokens.append(token)
            self.steps.append(Step(1, wrote=True))
            yield token

    def ssm_deviation(self) -> Deviation:
        """Compare the outputs of all state updates with the float64 recurrence on the same inputs and initial state."""
        steps = [1] * len(self.generated)  # an interrupted step may have added more records for some layers
        return worst([layer.deviation(steps) for layer in self._recorder.layers])


def worst(deviations: Sequence[Deviation]) -> Deviation:
    """Return the largest difference and the largest value of several comparisons."""
    difference = max((d.difference for d in deviations), key=lambda value: (math.isnan(value), value), default=0.0)
    return Deviation(difference, max((d.largest for d in deviations), default=0.0))
