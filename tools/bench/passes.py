"""What passes over a GPU found, as Markdown: the files ``results/pass-DEVICE.json`` that `gpu_check.py fit` writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
MOST_FAILURES = 20
VARIANTS = ("chained", "dependent", "apart", "evicted", "warm")


def read(folder: Path) -> list[Record]:
    """Return the recorded passes of a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("pass-*.json"))]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def page(records: Sequence[Record]) -> str:
    """Return what the document shows of passes."""
    return "\n\n".join(part for record in records for part in parts(record))


def parts(record: Record) -> list[str]:
    """Return the paragraphs and tables of a device."""
    about = record["about"][0]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    found = [f"### {about['device']}", f"{told(record)} ({_source(about['commit'])}; {about['began']}; {versions})"]
    rows = [(f"`{one['name']}`", one["status"], f"{one['seconds']:.0f}", one["line"]) for one in record["steps"]]
    found.append(table(("step", "outcome", "seconds", "in short"), rows))
    if record["failures"]:
        shown = record["failures"][:MOST_FAILURES]
        rows = [(f"`{one['step']}`", one["name"], _short(one["error"])) for one in shown]
        left = len(record["failures"]) - len(shown)
        found.append(table(("step", "failure", "error"), rows) + (f"\n\n{left} more." if left else ""))
    if record["errors"]:
        rows = [(name, f"{error:.2g}") for name, error in sorted(record["errors"].items())]
        found.append(table(("largest error, as a part of the largest value", ""), rows))
    return [*found, *arithmetic(record), *model(record)]


def arithmetic(record: Record) -> list[str]:
    """Return tables of the GPU's arithmetic."""
    beside, found, rows = record.get("beside_emulator", {}), [], []
    for part in sorted(record["functions"]):
        for name, one in record["functions"][part].items():
            low, high = one["range"][:2]
            within = beside.get("within", {}).get(name)
            rows.append((
                f"{name} of {low:.3g} to {high:.3g}", f"{one['min']:.2f} to {one['max']:.2f}", f"{one['rms']:.3f}",
                f"{one['exact']:.1%}", "" if within is None else f"{within:.1%}",
            ))  # fmt: skip
    if rows:
        head = ("function", "errors, ulp", "rms", "correctly rounded", "of samples within the documents")
        found.append(table(head, rows))
    rows = []
    for operands, one in sorted(record["sums"].items()):
        equal = beside.get("equal", {}).get(operands)
        share = "" if equal is None else f"{equal:.1%}"
        rows.append((operands, f"{one['min']:.2f} to {one['max']:.2f}", f"{one['rms']:.3f}", share))
    if rows:
        head = ("matrix sums of", "errors, ulp of the largest term", "rms", "of samples equal to the emulator's")
        found.append(table(head, rows))
    return found


def model(record: Record) -> list[str]:
    """Return tables of the fit."""
    if "fit" not in record:
        return []
    fit = record["fit"]
    rows = [(f"`{name}`", f"{c['before']:.4g}", f"{c['after']:.4g}") for name, c in fit["constants"].items()]
    constants = table((f"constant of the model, {fit['machine']}", "before", "fitted"), rows)
    rows = [
        (name, c["n"], f"{c['before'][0]:.1%}, {c['before'][1]:.2f}", f"{c['after'][0]:.1%}, {c['after'][1]:.2f}")
        for name, c in fit["errors"].items() if c["n"]
    ]  # fmt: skip
    return [constants, table(("points", "", "median error, bias before", "after"), rows)]


def told(record: Record) -> str:
    """Return a pass in a sentence."""
    counts: dict[str, int] = {}
    for one in record["steps"]:
        counts[one["status"]] = counts.get(one["status"], 0) + 1
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"Steps: {said}; {len(record['failures'])} failures."


def variants(lines: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of benchmark lines: microseconds by circumstance, and those of peers that stand apart."""
    rivals = sorted({name for line in lines for name, one in line["peers"].items() if "variants" in one})
    head = ["operator", "case", "device", "batch", *VARIANTS, *(f"{name}, apart" for name in rivals)]
    rows = []
    for line in sorted(lines, key=lambda line: (line["op"], line["case"], line["device"], line["batch"])):
        own = [_us(line["variants"].get(name)) for name in VARIANTS]
        others = [_us(line["peers"].get(name, {}).get("variants", {}).get("apart")) for name in rivals]
        rows.append((f"`{line['op']}`", line["case"], line["device"], line["batch"], *own, *others))
    return table(head, rows)


def _us(one: dict[str, float] | None) -> str:
    return "" if one is None else f"{one['median']:.2f}" if one["median"] < 100 else f"{one['median']:.0f}"


def _source(commit: str) -> str:
    return commit if commit.startswith("no commit") else f"commit {commit[:10]}{commit[40:]}"


def _short(text: str) -> str:
    return text.replace("\n", " ").replace("|", "/")[:160]
