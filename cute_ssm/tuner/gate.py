"""The gate before a time: a config's results must be, bit for bit, those of the rule, and those must be right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from cute_ssm import tuning
from cute_ssm.workloads import Call

COARSE = 2.0**-5  # of the largest value; larger errors are not rounding


class Gate:
    """Runs a call with any config, always from the same state.

    Parameters
    ----------
    call : Call
        Its written arguments are overwritten.
    rule : mapping
        Fields of the rule's config; none: what the operator chooses, by a memorised plan from the second call on.
    way : callable, optional
        Context in which the call runs, e.g. that of the emulator.
    """

    def __init__(
        self, call: Call, rule: Mapping[str, int | str], way: Callable[[], AbstractContextManager[Any]] | None = None
    ):
        self.call, self.way = call, way or nullcontext
        self.before = {name: value.clone() for name, value in call.results().items()}
        self.expected = self._run(rule)

    def problem(self, fields: Mapping[str, int | str]) -> str:
        """Return what is wrong with the results of a config, or nothing."""
        for name, value in self._run(fields).items():
            if not torch.equal(_bytes(value), _bytes(self.expected[name])):
                return f"{name} is not, bit for bit, that of the rule's config"
        return ""

    def problem_of_rule(self, other: Mapping[str, torch.Tensor]) -> str:
        """Return what is wrong with the results of the rule's config beside those of the reference, or nothing."""
        for name, value in self.expected.items():
            problem = _far(name, value, other[name])
            if problem:
                return problem
        return ""

    def results(self) -> dict[str, torch.Tensor]:
        """Run the call by the reference, and return what it writes."""
        self.restore()
        self.call.run()
        return {name: value.clone() for name, value in self.call.results().items()}

    def restore(self) -> None:
        """Undo what the call has written."""
        for name, value in self.call.results().items():
            value.copy_(self.before[name])

    def _run(self, fields: Mapping[str, int | str]) -> dict[str, torch.Tensor]:
        self.restore()
        with self.way(), tuning.override(**fields) if fields else nullcontext():
            self.call.run()
        return {name: value.clone() for name, value in self.call.results().items()}


def _far(name: str, got: torch.Tensor, want: torch.Tensor) -> str:
    a, b = got.cpu().float().flatten(), want.cpu().float().flatten()
    if not torch.equal(a.isnan(), b.isnan()):
        return f"{name} is NaN where the reference is not, or the other way round"
    a, b = a.nan_to_num(), b.nan_to_num()
    distance, largest = float((a - b).abs().max()), float(b.abs().max())
    step = torch.finfo(got.dtype).eps if got.is_floating_point() else 0.0  # of float8 more than COARSE
    allowed = max(COARSE, step) * largest + (1.0 if not got.is_floating_point() else 0.0)
    return "" if distance <= allowed else f"{name} differs from the reference by {distance:.3g} of {largest:.3g}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
