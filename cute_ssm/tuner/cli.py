"""The options of ``python -m cute_ssm tune``, and what it prints."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cute_ssm.errors import describe

if TYPE_CHECKING:
    from cute_ssm.arch import Arch
    from cute_ssm.tuner.problems import Problem
    from cute_ssm.tuner.tune import Solved


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("op", metavar="OP", help="operator, for example selective_state_update")
    parser.add_argument(
        "--shapes", nargs="+", metavar="KEY=VALUE,...", help="shapes of the calls (default: those of known models)"
    )
    parser.add_argument(
        "--arch", action="append", metavar="ARCH", help="target where there is no GPU; repeatable (default: sm_90a)"
    )
    parser.add_argument("--batches", metavar="N,N,...", help="batch sizes (default: those declared for the operator)")
    parser.add_argument("--minutes", type=float, metavar="N", help="time limit of the whole search (default: none)")
    parser.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="GPUs, or without a GPU processes, that measure (default: 1)"
    )
    parser.add_argument(
        "--engine", default="auto", help="where configs are measured: auto, inline, processes or ray (default: auto)"
    )
    parser.add_argument(
        "--objective", default="auto", help="what ranks configs: auto, gpu, model or counters (default: auto)"
    )
    parser.add_argument("--margin", type=float, help="relative gain required over the default config (default: 0.05)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="table to merge into (default: OP.json in CUTE_SSM_TUNING_DIR, or else in ~/.config/cute_ssm/tuning)",
    )
    parser.add_argument(
        "--journal", type=Path, metavar="FILE", help="measurements to resume from (default: beside the table)"
    )


def main(options: argparse.Namespace) -> int:
    """Search, merge every row as it is found, and print a table; 1 if a call could not be searched."""
    from cute_ssm import workloads
    from cute_ssm.runtime import toolchain
    from cute_ssm.spec import digest
    from cute_ssm.tuner import engines, objectives, tune
    from cute_ssm.tuner.journal import Journal
    from cute_ssm.tuning import tables
    from cute_ssm.workloads.progress import Progress

    if options.gpus < 1:
        raise ValueError(describe("--gpus", "a positive number", options.gpus))
    workloads.registered(options.op)  # refuses an unknown operator before anything is printed
    objective = objectives.create(options.objective)
    on = objective.on()
    out = table_path(options)
    print(place(out), flush=True)
    problems = list(problems_of(options, on["objective"] == "gpu"))
    journal = Journal(
        options.journal or out.with_suffix(".journal.jsonl"), digest(sorted(on.items()), toolchain.sources_digest())
    )
    engine = engines.create(options.engine, on["objective"], options.gpus)
    progress = Progress(len(problems))
    compiles = _compile_jobs() if on["objective"] == "gpu" else None
    margin = tune.MARGIN if options.margin is None else options.margin
    tuner = tune.Tuner(engine, objective, journal, margin, compiles, lambda text: progress.step(text, 0))
    solved = []
    try:
        for one in tuner.solve(problems, None if options.minutes is None else 60 * options.minutes):
            progress.step(one.problem.case.text())
            solved.append(one)
            if one.row is not None:
                tables.merge(out, [one.row])
    finally:
        progress.close()
        engine.close()
        journal.close()
    print("\n".join(report(solved, objective.how)))
    left = len(problems) - len(solved)
    print(f"{out}: {summary(solved, tuner.margin)}{f'; {left} calls were not reached' if left else ''}")
    return int(any(one.error for one in solved))


def problems_of(options: argparse.Namespace, on_gpu: bool) -> Iterator[Problem]:
    """Yield the problem of every call, those that ask the tables the same question once."""
    from cute_ssm import workloads
    from cute_ssm.tuner.problems import problem
    from cute_ssm.workloads import cli

    batches = cli.numbers("--batches", options.batches)
    if options.shapes:
        declared = [workloads.workload(options.op, keys, batches) for keys in shapes(options.op, options.shapes)]
    else:
        declared = workloads.of_operator(options.op, batches)
    targets = _targets(options.arch, on_gpu)
    sm_count = cli.sm_count(targets) if on_gpu else None
    seen = set()
    for arch, workload in itertools.product(targets, declared):
        for keys in workload.calls():
            found = problem(options.op, keys, arch, sm_count)
            question = str({k: v for k, v in found.row({}, {}).items() if k != "evidence"})
            if question not in seen:
                seen.add(question)
                yield found


def shapes(op: str, items: Iterable[str]) -> list[dict[str, Any]]:
    """Return every combination of the values of parameters: ``nheads=16,128 T=1,6`` are four.

    Raises
    ------
    ValueError
        If an item is no ``key=value``.
    """
    parts = []
    for item in items:
        key, equals, values = item.partition("=")
        if not (key and equals and values):
            raise ValueError(describe("--shapes", "KEY=VALUE or KEY=VALUE,VALUE", repr(item)))
        parts.append([(key, value) for value in values.split(",")])
    from cute_ssm import workloads

    found = []
    for chosen in itertools.product(*parts):
        known = workloads.parameters(op)
        unknown = [key for key, _ in chosen if key not in known]
        if unknown:
            raise ValueError(describe("--shapes", f"parameters among {', '.join(known)}", unknown[0]))
        found.append({key: type(known[key])(value) for key, value in chosen})
    return found


def table_path(options: argparse.Namespace) -> Path:
    """Return the table to merge into.

    Raises
    ------
    ValueError
        If its folder cannot be written, or if there is no home to put it in: said before a search, not after it.
    """
    from cute_ssm import env

    path = Path(options.out) if options.out is not None else None
    if path is None:
        folder = env.settings().tuning_dir or env.own_tuning_dir()
        if folder is None:
            raise ValueError(describe("--out", "a file", "none, and no home folder to put one into"))
        path = folder / f"{options.op}.json"
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(describe("--out", "a file that can be written", str(path)))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(describe("--out", "a file in a folder that can be written", str(path)))
    return path


def place(out: Path) -> str:
    """Return a line that says where rows go, and who reads them."""
    from cute_ssm import env

    folder = out.absolute().parent
    if folder == env.settings().tuning_dir:
        return f"better configs go into {out}; operators read them there"
    return f"better configs go into {out}; operators read them there if CUTE_SSM_TUNING_DIR={folder} is set"


def summary(solved: Iterable[Solved], margin: float) -> str:
    """Return how many configs beat the rule's, and how many calls keep it."""
    rows = [one.row for one in solved if one.row is not None]
    better = sum(bool(row["config"]) for row in rows)
    kept = len(rows) - better
    return f"{better} configs better than the rule's by {margin:.0%}, {kept} calls for which the rule's is kept"


def report(solved: Iterable[Solved], how: str) -> list[str]:
    """Return lines for people: each call, the time of the rule's config and of the best, and what that is."""
    lines = [f"us of the rule, of the best, their ratio ({how}); configs tried; call; config if it goes into the table"]
    for one in solved:
        if one.outcome is None or one.row is None:
            lines.append(f"FAILED {one.problem.case.text()}: {one.error}")
            continue
        outcome, config = one.outcome, one.row["config"]
        words = " ".join(f"{name}={value}" for name, value in config.items()) or "the rule's"
        tried = f"{outcome.tried}{'' if outcome.complete else '+'}"
        times = f"{outcome.start_cost:8.2f} {outcome.cost:8.2f} {one.gain:5.2f}"
        lines.append(f"{times} {tried:>5}  {one.problem.case.text()}: {words}")
    return lines


def _targets(names: list[str] | None, on_gpu: bool) -> list[Arch]:
    from cute_ssm import arch as archs
    from cute_ssm import runtime

    if on_gpu:
        if names:
            raise ValueError(describe("--arch", "none with a GPU, whose own target is measured", ", ".join(names)))
        return [runtime.target()]
    return [archs.by_name(name) for name in dict.fromkeys(names or ["sm_90a"])]


def _compile_jobs() -> int:
    return max(1, min(16, os.cpu_count() or 1))
