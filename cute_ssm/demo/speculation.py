"""Speculative generation: draft tokens without the model, then verify several in one step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cute_ssm.demo import DRAFT
from cute_ssm.demo.loop import TOLERANCES, Deviation, LayerRecord, Run, Step, worst
from cute_ssm.demo.model import LanguageModel, Verification, operator
from cute_ssm.demo.sampling import Sampler
from cute_ssm.errors import describe

__all__ = ["WINDOW", "Drafter", "Speculation"]

WINDOW = 16  # accepted tokens that may be pending
_PART = 16  # tokens of the drafter's table in one batch


class Drafter:
    """Drafts the continuation of a text without running the model: right drafts save steps, wrong ones change nothing.

    First by prompt lookup: the token that followed the last earlier occurrence of the text's longest suffix, of `least`
    to `longest` tokens.  If there is none, by what the model predicts after the last token alone, from a table that is
    computed once.  This draft uses the random numbers of the position, so that it often equals the later choice.

    Parameters
    ----------
    model : LanguageModel
    sampler : Sampler
        The sampler that chooses the tokens.
    least, longest : int
        Lengths of the suffixes to look up.
    """

    def __init__(self, model: LanguageModel, sampler: Sampler, least: int = 2, longest: int = 4) -> None:
        if not 1 <= least <= longest:
            raise ValueError(describe("least", f"1 to {longest}", least))
        self._sampler, self._least, self._longest = sampler, least, longest
        every = torch.arange(model.config.vocab, device=model.embedding.device)
        with torch.no_grad():  # in batches whose states fit in CPU caches: a third of the time of a single batch
            parts = [every[i : i + _PART, None] for i in range(0, len(every), _PART)]
            self._expected = torch.cat([model(part, chunk=1)[:, 0].cpu() for part in parts])
        self._after: dict[tuple[int, ...], int] = {}  # suffix -> position of the token after its last occurrence
        self._read = 0

    def __call__(self, tokens: Sequence[int], count: int) -> list[int]:
        """Draft `count` tokens after `tokens`; each call must extend the text of the call before."""
        for position in range(self._read, len(tokens)):
            for length in range(self._least, min(self._longest, position) + 1):
                self._after[tuple(tokens[position - length : position])] = position
        self._read = len(tokens)
        text = list(tokens)
        while len(text) < len(tokens) + count:
            text.append(self._next(text))
        return text[len(tokens) :]

    def _next(self, text: list[int]) -> int:
        for length in range(min(self._longest, len(text)), self._least - 1, -1):
            position = self._after.get(tuple(text[-length:]))
            if position is not None:
                return text[position]
        return self._sampler(self._expected[text[-1]], len(text)).token


class Speculation(Run):
    """Speculative generation: verifies the last token and its drafts in one step with `cute_ssm.checkpointing_ssu`.

    Generates the same tokens as `Generation` with the same sampler: a draft is accepted if it equals the chosen token.

    Parameters
    ----------
    model, prompt, count, sampler
        As for `Run`.
    draft : int
        Drafted tokens per step.
    state_dtype : torch.dtype
        Dtype of the recurrent states.
    verification : Verification, optional
        Default: :func:`cute_ssm.checkpointing_ssu`.
    slots : int
        Slots of the pool, at least 2, without the one for padding.
    window : int
        Accepted tokens that may be pending.
    tolerance : float, optional
        Default: the entry of `TOLERANCES`.

    Attributes
    ----------
    steps : list of Step
    pool : StatePool
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Sequence[int],
        count: int,
        sampler: Sampler,
        draft: int = DRAFT,
        state_dtype: torch.dtype = torch.float32,
        verification: Verification | None = None,
        slots: int = 4,
        window: int = WINDOW,
        tolerance: float | None = None,
    ) -> None:
        if draft < 1:
            raise ValueError(describe("draft", "at least 1", draft))
        if slots < 2:
            raise ValueError(describe("slots", "at least 2", slots))
        self.pool = model.new_pool(slots, draft + 1, window, state_dtype)
        spare, slot = self.pool.allocate(), self.pool.allocate()
        tolerance = TOLERANCES[state_dtype] if tolerance is None else tolerance
        super().__init__(model, prompt, count, sampler, self.pool.slots, slot, tolerance)
        self.draft = draft
        self._spare = torch.tensor([spare], device=self._index.device)
        self._verification = verification or operator("checkpointing_ssu")
        self._records: list[LayerRecord] = []
        self._drafter = Drafter(model, sampler)
        self._pending = 0  # pending tokens on the device, known to the host because it decides acceptance

    @property
    def state_bytes(self) -> int:
        """Bytes of one write of the states of all layers."""
        return self.pool.state_bytes

    def warm_up(self) -> float:
        """Run one step on another slot, so that the measured time includes no compilation; return its seconds."""
        begin = time.perf_counter()
        tokens = torch.full((1, self.pool.tokens), self.tokens[0], device=self._index.device)
        self.model.verify(tokens, self.pool, self._spare, self._verification)
        self.pool.commit(self._spare, torch.zeros_like(self._spare))
        self._wait()
        return time.perf_counter() - begin

    def run(self) -> Iterator[int]:
        """Prefill, then yield tokens as they are generated; ``seconds`` excludes decisions in float64."""
        begin = time.perf_counter()
        if self.prompt_length > 1:
            prompt = torch.tensor([self.tokens[:-1]], device=self._index.device)
            self.model.prefill_pool(prompt, self.pool, self._index)
            self._wait()
        self.prefill_seconds = time.perf_counter() - begin
        while len(self.generated) < self.count:
            yield from self._step()

    def _step(self) -> list[int]:
        """Verify the last token and its drafts; return the chosen tokens."""
        begin = time.perf_counter()
        tokens = [self.tokens[-1], *self._drafter(self.tokens, self.draft)]
        given = torch.tensor([tokens], device=self._index.device)
        logits = self.model.verify(given, self.pool, self._index, self._record)[0].cpu()
        self.seconds += time.perf_counter() - begin
        wanted = self.count - len(self.generated)
        chosen: list[int] = []
        for position in range(min(len(tokens), wanted)):
            if position and chosen[-1] != tokens[position]:
                break
            chosen.append(self.decisions(logits[position], [*self.tokens, *chosen]))
        begin = time.perf_counter()
        self.pool.commit(self._index, torch.full_like(self._index, len(chosen)))
        self._wait()
        self.seconds += time.perf_counter() - begin
        wrote = self._pending + len(tokens) > self.pool.window
        self._pending = len(chosen) + (0 if wrote else self._pending)
        self.steps.append(Step(len(chosen), wrote))
        self.logits += logits[: len(chosen)]
        self.tokens += chosen
        return chosen

    def _record(self, **call: Tensor) -> Tensor:
        """Run a layer's verification and record its inputs and outputs."""
        layer = self._calls_of_step()
        if layer == len(self._records):
            state = call["state"][self.slot].float().clone()
            self._records.append(LayerRecord.of(state, call["A"], call["D"], call["dt_bias"]))
        record = self._records[layer]
        for name in ("x", "B", "C"):
            getattr(record, name).append(call[name][0].clone())
        record.dt.append(call["dt"][0, :, :, 0].clone())
        out = self._verification(**call)
        record.out.append(out[0].clone())
        return out

    def _calls_of_step(self) -> int:
        """Return the layer that is verified next: the first with fewer records than started steps."""
        begun = len(self.steps) + 1
        return next((i for i, record in enumerate(self._records) if len(record.x) < begun), len(self._records))

    def ssm_deviation(self) -> Deviation:
        """Compare the outputs at accepted tokens with the float64 recurrence on the same inputs and initial state."""
        accepted = [step.accepted for step in self.steps]
        return worst([record.deviation(accepted) for record in self._records])

    @property
    def writes(self) -> int:
        """Number of steps that wrote the states."""
        return sum(step.wrote for step in self.steps)

    @property
    def saved_bytes(self) -> int:
        """Bytes of state writes saved, compared with a write in every step."""
        return (len(self.steps) - self.writes) * self.pool.state_bytes
