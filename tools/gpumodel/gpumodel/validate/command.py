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

from ..constants import MACHINES
from ..fit import Fit, fit
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
        "--fit", nargs="+", metavar="CONSTANT", help="fit constants on the half 'fit', and show what is won"
    )
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
        fitted = fit_of([point for point, _ in modelled], library, options.fit, options.rounds).as_json()
    return tables.result(modelled, refused, swept, fitted)


def fit_of(points: Sequence[Point], library: Library, names: Sequence[str], rounds: int) -> Fit:
    """Fit constants on the points of the half "fit"."""
    machines = [MACHINES[gpu] for gpu in dict.fromkeys(point.gpu for point in points)]
    return fit([library.observation(point) for point in points], machines, names, rounds, say)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
