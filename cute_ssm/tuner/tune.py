"""The search over declared calls: problems one after another, each within its share of the time, rows as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cute_ssm.errors import CuteSsmError
from cute_ssm.runtime import bundles, pool, toolchain
from cute_ssm.runtime.store import Key
from cute_ssm.tuner import search
from cute_ssm.tuner.engines import Engine, Job
from cute_ssm.tuner.journal import Journal
from cute_ssm.tuner.objectives import Objective
from cute_ssm.tuner.problems import Fields, Problem
from cute_ssm.tuning import tables

MARGIN = 0.05  # by which a config must beat that of the rule to get into a table
CONFIRM_ROUNDS = 5
REFERENCE = "the rule's config"


@dataclass
class Solved:
    """A problem and what its search found; `row` is for the table."""

    problem: Problem
    outcome: search.Outcome | None
    row: tables.Row | None
    error: str = ""

    @property
    def gain(self) -> float:
        """Time of the rule's config over that of the best one."""
        return self.outcome.start_cost / self.outcome.cost if self.outcome else 1.0


class Tuner:
    """Solves problems.

    Parameters
    ----------
    engine : Engine
    objective : Objective
        Of the kind that the engine's workers have; asked only what its costs hold for.
    journal : Journal
    margin : float
        As `MARGIN`.  It is raised to the objective's error where that is larger.
    compile_jobs : int, optional
        Processes that compile for GPUs before anything is measured; None: workers compile.
    report : callable, optional
        Called with a line of text for every measurement.
    """

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        journal: Journal,
        margin: float = MARGIN,
        compile_jobs: int | None = None,
        report: Callable[[str], None] | None = None,
    ):
        self.engine, self.objective, self.journal = engine, objective, journal
        self.margin = max(margin, objective.error)
        self.compile_jobs, self.report = compile_jobs, report or (lambda _: None)

    def solve(self, problems: Sequence[Problem], seconds: float | None = None) -> Iterator[Solved]:
        """Yield each problem as it is solved; what is left when time runs out is left out."""
        end = None if seconds is None else time.monotonic() + seconds
        for i, problem in enumerate(problems):
            deadline = None
            if end is not None:
                left = end - time.monotonic()
                if left <= 0:
                    return
                deadline = time.monotonic() + left / (len(problems) - i)
            yield self._solve(problem, deadline)

    def _solve(self, problem: Problem, deadline: float | None) -> Solved:
        costs = _Costs(self, problem)
        confirm = costs.confirm if self.objective.how == "measured" else None
        try:
            outcome = search.descend(
                problem.rule(), problem.space, partial(_can_run, problem), costs.measure, confirm,
                self.objective.noise, deadline, batch=max(8, 2 * self.engine.workers),
            )  # fmt: skip
        except (ValueError, CuteSsmError) as error:
            return Solved(problem, None, None, f"{error}: {costs.last_error}" if costs.last_error else str(error))
        better = outcome.cost < outcome.start_cost * (1 - self.margin)
        evidence = {
            "how": self.objective.how,
            "us": round(outcome.cost if better else outcome.start_cost, 2),
            "rule_us": round(outcome.start_cost, 2),
            "call": problem.case.text(),
            "tried": outcome.tried,
            "complete": outcome.complete,
            **self.objective.on(),
        }
        return Solved(problem, outcome, problem.row(outcome.best if better else {}, evidence))


class _Costs:
    """Costs of a problem's configs, from the journal or the engine.

    A cost is the time relative to that of the rule's config on the same worker at the same time, in microseconds of
    the rule's first measurement: so neither GPUs that differ nor clocks that drift favour a config.
    """

    def __init__(self, tuner: Tuner, problem: Problem):
        self.tuner, self.problem = tuner, problem
        self.case = problem.case.digest()
        self.reference_us: float | None = None
        self.last_error = ""

    def measure(self, configs: Sequence[Fields]) -> list[float | None]:
        """Costs, each measured once."""
        journal = self.tuner.journal
        missing = [fields for fields in configs if journal.get(self.case, fields) is None]
        for fields, found in self._run(missing, rounds=1):
            journal.put(self.case, fields, found, self.problem.case.text())
        return [self._cost(journal.get(self.case, fields)) for fields in configs]

    def confirm(self, configs: Sequence[Fields]) -> list[float | None]:
        """Costs measured anew, for longer."""
        found = {tuple(sorted(fields.items())): m for fields, m in self._run(configs, CONFIRM_ROUNDS)}
        return [self._cost(found[tuple(sorted(fields.items()))]) for fields in configs]

    def _run(self, configs: Sequence[Fields], rounds: int) -> Iterator[tuple[Fields, Any]]:
        if not configs:
            return
        rule = tuple(sorted(self.problem.rule().items()))
        if self.tuner.compile_jobs is not None and _compiles():
            self._compile(configs)
        jobs = [Job(self.problem.case, tuple(sorted(fields.items())), rule, rounds) for fields in configs]
        for number, found in self.tuner.engine.map(jobs):
            self.tuner.report(f"{self.problem.case.text()}  {_brief(configs[number])}: {_words(found)}")
            yield configs[number], found

    def _compile(self, configs: Sequence[Fields]) -> None:
        """Fill the cache on disk; what does not compile fails again, and is named, where it is measured."""
        kernels = [kernel for fields in configs for kernel in self.problem.kernels(fields)]
        for _ in pool.compile_all(list(dict.fromkeys(kernels)), self.tuner.compile_jobs):
            pass

    def _cost(self, found: Any) -> float | None:
        if found is None or found.us is None:
            self.last_error = found.error if found is not None else ""
            return None
        if self.reference_us is None:
            self.reference_us = found.reference_us
        cost: float = found.us / found.reference_us * self.reference_us
        return cost


def _can_run(problem: Problem, fields: Fields) -> bool:
    """Whether a config is valid, and, where there is no compiler, bundles have its kernels."""
    if not problem.valid(fields):
        return False
    return _compiles() or all(bundles.has(Key(*kernel)) for kernel in problem.kernels(fields))


def _compiles() -> bool:
    return toolchain.installed(toolchain.DSL) is not None


def _brief(fields: Mapping[str, int | str]) -> str:
    return ",".join(f"{name}={value}" for name, value in fields.items())


def _words(found: Any) -> str:
    return f"{found.us:.2f} us" if found.us is not None else found.error.splitlines()[0] if found.error else "failed"
