"""A round of tuning: the search of ``python -m cute_ssm tune`` over one call of each operator.

Where there is no compiler, the search keeps to configs whose kernels a bundle has; `gpu_calls.candidates` says which
the kit holds.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import gpu_calls
import torch

from cute_ssm import runtime, workloads
from cute_ssm.runtime import toolchain
from cute_ssm.spec import digest
from cute_ssm.tuner import engines, problems, tune
from cute_ssm.tuner.gpu import Gpu
from cute_ssm.tuner.journal import Journal
from cute_ssm.tuner.problems import Problem
from cute_ssm.tuning import tables
from gpu_pass.records import Item, Wrong

TABLE = "tuned.json"


def declared(rehearse: bool) -> list[Problem]:
    """Return the problems, for the current GPU; small ones with two values of each field to rehearse."""
    arch, sms = runtime.target(), torch.cuda.get_device_properties(0).multi_processor_count
    if not rehearse:
        return gpu_calls.tuned(arch, sms)
    found = []
    for op in workloads.OPERATORS:
        one = problems.problem(op, workloads.small(op), arch, sms)
        rule = one.rule()
        space = {name: tuple(dict.fromkeys((rule[name], *values)))[:2] for name, values in one.space.items()}
        found.append(dataclasses.replace(one, space=space))
    return found


class Round:
    """Solves problems one by one, each within its share of the time.

    Parameters
    ----------
    objective : Objective
        That measures configs in this process.
    """

    def __init__(self, out: Path, objective: Any, seconds: float, count: int):
        self.out, self.objective = out, objective
        self.end, self.left = time.monotonic() + seconds, count

    def solve(self, problem: Problem) -> dict[str, Any]:
        """Search; a row of the table says what is best, the journal has every measurement.

        Raises
        ------
        Wrong
            The rule's config cannot be measured, or its results are wrong.
        """
        share = max(1.0, (self.end - time.monotonic()) / max(1, self.left))
        self.left -= 1
        sources = digest(sorted(self.objective.on().items()), toolchain.sources_digest())
        journal = Journal(self.out / f"tune-{problem.case.op}.jsonl", sources)
        engine = engines.Inline(self.objective)
        try:
            tuner = tune.Tuner(engine, self.objective, journal, tune.MARGIN, None, lambda text: print(text, flush=True))
            (solved,) = tuner.solve([problem], share)
        finally:
            journal.close()
        if solved.row is None or solved.outcome is None:
            raise Wrong(solved.error)
        tables.merge(self.out / TABLE, [solved.row])
        outcome = solved.outcome
        return {
            "us": outcome.cost, "rule_us": outcome.start_cost, "tried": outcome.tried, "complete": outcome.complete,
            "config": solved.row["config"],
        }  # fmt: skip


def items(out: Path, rehearse: bool, seconds: float) -> list[Item]:
    """Return the problems to solve on the current GPU, within a time for all."""
    found = declared(rehearse)
    objective = Gpu(replays=1, sets=2) if rehearse else Gpu()
    solver = Round(out, objective, seconds, len(found))
    return [Item(one.case.text(), lambda one=one: solver.solve(one)) for one in found]
