"""The command ``python -m gpumodel.validate``: published times beside modelled ones."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptxsim.errors import PtxError

from ..constants import MACHINES, with_value
from ..fit import AT_ALL, Errors, fit
from . import sweeps, tables
from .packages import Absent
from .points import PUBLISHED, Point, Refused, read
from .times import Library

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gpumodel"
WRONG = (Absent, PtxError, ValueError, KeyError, ImportError, RuntimeError, OSError, AttributeError, TypeError)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parsed = argparse.ArgumentParser(prog="python -m gpumodel.validate", description=__doc__)
    parsed.add_argument("--peers", type=Path, default=CACHE / "peers", help="folder of packages, see the README")
    parsed.add_argument("--cache", type=Path, default=CACHE / "recordings", help="folder of recordings")
    parsed.add_argument(
        "--points", type=Path, nargs="+", metavar="FILE", help="files of points, in place of those here"
    )
    parsed.add_argument("--only", metavar="TEXT", help="points whose name has it")
    parsed.add_argument(
        "--fit",
        nargs="+",
        metavar="CONSTANT[=START]",
        help="fit constants on the half 'fit', and show what is won; without a start, from its present value",
    )
    parsed.add_argument("--fit-on", nargs="+", metavar="TEXT", help="of the points, those whose name has one of these")
    parsed.add_argument("--rounds", type=int, default=3, help="of the fit")
    parsed.add_argument("--sweeps", action="store_true", help="rank the configurations of published tuning tables")
    parsed.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    parsed.add_argument("--page", type=Path, metavar="FILE", help="rewrite the tables of a Markdown page")
    parsed.add_argument("--render", type=Path, metavar="FILE", help="model nothing: show a result that --out wrote")
    return parsed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 if a point could not be modelled."""
    options = parser().parse_args(argv)
    if options.render:
        found = json.loads(options.render.read_text(encoding="utf-8"))
    else:
        found = validated(options)
    if options.out:
        options.out.write_text(tables.text(found), encoding="utf-8")
    if options.page:
        options.page.write_text(tables.rendered(options.page.read_text(encoding="utf-8"), found), encoding="utf-8")
    else:
        print(tables.markdown(found))
    return 1 if found["refused"] else 0


def validated(options: argparse.Namespace) -> dict[str, Any]:
    """Model the points, and return the result."""
    points: list[Point] = []
    refused: list[Refused] = []
    for path in options.points or [PUBLISHED]:
        more, wrong = read(path)
        points += [point for point in more if options.only is None or options.only in point.name]
        refused += wrong
    for point in refused:
        say(f"{point.name}: {point.why}")
    library = Library(options.peers, options.cache)
    modelled: list[tuple[Point, float]] = []
    for point in points:
        try:
            us = library.modelled(point, MACHINES[point.gpu])
        except WRONG as error:
            refused.append(Refused(point.name, f"{type(error).__name__}: {error}"))
            say(f"{point.name}: {refused[-1].why}")
            continue
        modelled.append((point, us))
        say(f"{point.name}: published {point.us:.2f}, modelled {us:.2f}, ratio {us / point.us:.3f}")
    swept = (
        list(sweeps.run(options.peers, lambda p: library.modelled(p, MACHINES[p.gpu]), say)) if options.sweeps else []
    )
    fitted = None
    if options.fit:
        used = [point for point, _ in modelled if any(text in point.name for text in options.fit_on or [""])]
        fitted = fit_of(used, library, options.fit, options.rounds)
    return tables.result(modelled, refused, swept, fitted)


def fit_of(points: Sequence[Point], library: Library, given: Sequence[str], rounds: int) -> dict[str, Any]:
    """Fit constants on the points of the half "fit", and return what was found as types of JSON.

    A constant is ``NAME`` or ``NAME=START`` with names of `gpumodel.fit.fit`.  Those of one GPU are fitted on its
    points, apart from those of another.
    """
    found: dict[str, Any] = {"constants": {}, "errors": {}, "points": {}}
    starts = {name: start for name, _, start in (text.partition("=") for text in given)}
    for where in dict.fromkeys(name.partition(AT_ALL)[2] for name in starts):
        used = [point for point in points if where in ("", point.gpu)]
        machines = {gpu: MACHINES[gpu] for gpu in dict.fromkeys(point.gpu for point in used)}
        mine = [name for name in starts if name.partition(AT_ALL)[2] == where]
        for name in (name for name in mine if starts[name]):
            for gpu in machines:
                machines[gpu] = with_value(machines[gpu], name.partition(AT_ALL)[0], float(starts[name]))
        observed = [library.observation(point) for point in used]
        one = fit(observed, list(machines.values()), mine, rounds, say).as_json()
        for key in ("constants", "points"):
            found[key].update(one[key])
    half = {point.name: point.half for point in points}
    for key in ("fit", "held out"):
        pairs = [pair for name, pair in found["points"].items() if half[name] == key]
        before, after = (Errors.of([pair[i] for pair in pairs]) for i in (0, 1))
        if pairs:
            found["errors"][key] = {"n": len(pairs), "before": list(before[1:]), "after": list(after[1:])}
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
