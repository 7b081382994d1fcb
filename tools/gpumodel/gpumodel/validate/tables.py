"""Results of a validation as JSON and Markdown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..constants import MACHINES
from ..fit import Errors
from .points import Point, Refused
from .sweeps import Sweep

NOTE = (
    "Times modelled by gpumodel beside published ones. No modelled time is a measurement; the published ones were "
    "measured by others, on their GPUs."
)
WITHIN = 0.05  # regret of a sweep's winner that counts as found


def result(
    modelled: Sequence[tuple[Point, float]],
    refused: Sequence[Refused],
    sweeps: Sequence[Sweep],
    fitted: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return a validation as types of JSON."""
    gpus = sorted({point.gpu for point, _ in modelled})
    return {
        "note": NOTE,
        "points": [
            {
                "name": point.name, "source": point.source, "where": point.where, "gpu": point.gpu,
                "kernel": point.kernel, "keys": dict(point.keys), "protocol": dataclasses.asdict(point.conditions),
                "half": point.half, "published": point.us, "modelled": round(us, 3), "ratio": round(us / point.us, 4),
            }
            for point, us in modelled
        ],
        "refused": [refusal._asdict() for refusal in refused],
        "sweeps": [sweep.as_json() for sweep in sweeps],
        "fit": fitted,
        "constants": {gpu: dataclasses.asdict(MACHINES[gpu]) for gpu in gpus},
    }  # fmt: skip


def text(found: Mapping[str, Any]) -> str:
    """Return a result as JSON with a line per point."""
    parts = []
    for key, value in found.items():
        if isinstance(value, list):
            items = ",\n".join(json.dumps(item) for item in value)
            parts.append(f'"{key}": [\n{items}\n]' if items else f'"{key}": []')
        else:
            parts.append(f'"{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def errors(found: Mapping[str, Any]) -> dict[str, dict[str, Errors]]:
    """Return the errors of each source, and of ``"all"``: of all points, and of the halves "fit" and "held out"."""
    groups: dict[str, dict[str, list[float]]] = {}
    for point in found["points"]:
        for source in (point["source"], "all"):
            halves = groups.setdefault(source, {"all": [], "fit": [], "held out": []})
            halves["all"].append(point["ratio"])
            halves[point["half"]].append(point["ratio"])
    return {source: {half: Errors.of(ratios) for half, ratios in halves.items()} for source, halves in groups.items()}


def row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def percent(value: float) -> str:
    return "" if value != value else f"{value:.1%}".replace("%", " %")


def summary(found: Mapping[str, Any]) -> str:
    """Return a Markdown table: a row per source."""
    lines = [
        row(("source", "points", "median error", "bias", "held out: points", "median error", "bias")),
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    by_source = errors(found)
    for source in [*sorted(name for name in by_source if name != "all"), "all"]:
        if source not in by_source:
            continue
        every, held = by_source[source]["all"], by_source[source]["held out"]
        cells = [source, every.n, percent(every.median_error), f"{every.bias:.2f}", held.n]
        cells += [percent(held.median_error), f"{held.bias:.2f}" if held.n else ""]
        lines.append(row(cells))
    return "\n".join(lines)


def points_table(found: Mapping[str, Any]) -> str:
    """Return a Markdown table: a row per point."""
    lines = [row(("point", "half", "published us", "modelled us", "ratio")), "|---|---|---:|---:|---:|"]
    for point in found["points"]:
        us = (f"{point[key]:.2f}" for key in ("published", "modelled"))
        lines.append(row((point["name"], point["half"], *us, f"{point['ratio']:.2f}")))
    return "\n".join(lines)


def sweeps_table(found: Mapping[str, Any]) -> str:
    """Return a Markdown table: a row per sweep."""
    lines = [
        row(("sweep", "configurations", "published winner", "its modelled rank", "modelled winner", "regret")),
        "|---|---:|---|---:|---|---:|",
    ]
    for sweep in found["sweeps"]:
        lines.append(
            row((sweep["name"], len(sweep["modelled"]), sweep["published winner"], sweep["rank"],
                 sweep["modelled winner"], percent(sweep["regret"])))
        )  # fmt: skip
    within = sum(sweep["regret"] <= WITHIN for sweep in found["sweeps"])
    lines += ["", f"Within {percent(WITHIN)}: {within} of {len(found['sweeps'])}."]
    return "\n".join(lines)


def fit_table(found: Mapping[str, Any]) -> str:
    """Return Markdown of what was fitted."""
    if not found["fit"]:
        return "No constant was fitted on these points."
    lines = [row(("constant", "before", "after", "bounds", "source of the bounds")), "|---|---:|---:|---|---|"]
    for name, change in found["fit"]["constants"].items():
        low, high = change["bounds"]
        cells = (f"`{name}`", f"{change['before']:.4g}", f"{change['after']:.4g}", f"{low:g} to {high:g}")
        lines.append(row((*cells, change["source"])))
    lines += ["", row(("half", "points", "median error before", "after", "bias before", "after")),
              "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for half in ("fit", "held out"):
        e = found["fit"]["errors"].get(half)
        if e and e["n"]:
            lines.append(row((half, e["n"], percent(e["before"][0]), percent(e["after"][0]),
                              f"{e['before'][1]:.2f}", f"{e['after'][1]:.2f}")))  # fmt: skip
    return "\n".join(lines)


PARTS = {"summary": summary, "sweeps": sweeps_table, "fit": fit_table, "points": points_table}


def rendered(page: str, found: Mapping[str, Any]) -> str:
    """Return a page with the tables of a result between their marks.

    Raises
    ------
    ValueError
        If the page lacks a mark.
    """
    for name, table in PARTS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin not in page or end not in page:
            raise ValueError(f"page: expected the marks {begin} and {end}")
        head, _, rest = page.partition(begin)
        page = f"{head}{begin}\n{table(found)}\n{end}{rest.partition(end)[2]}"
    return page


def markdown(found: Mapping[str, Any]) -> str:
    """Return all tables."""
    titles = {"summary": "By source", "sweeps": "Published tuning tables", "fit": "Fit", "points": "Points"}
    parts = [f"## {titles[name]}\n\n{table(found)}" for name, table in PARTS.items()]
    if found["refused"]:
        listed = "\n".join(f"- {item['name']}: {item['why']}" for item in found["refused"])
        parts.append(f"## Not modelled\n\n{listed}")
    return "\n\n".join([found["note"], *parts]) + "\n"
