"""Tables and plots of benchmark lines: ``python tools/bench/report.py [FILE.jsonl ...] [--readme] [--plots FOLDER]``.

Without files: all of ``results/*.jsonl``.  Prints a Markdown table per file; ``--readme`` rewrites the README's part
between the marks ``modelled`` and ``measured`` from the files of that kind.  ``--plots`` writes, for every operator and
device, time against batch and share of a copy's bandwidth against batch (needs the extra 'bench').
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.cases import SHOWN

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results")
README = ROOT / "README.md"
Line = dict[str, Any]
NOTES = {
    "modelled": "**Modelled, not measured**: by `tools/gpumodel`, whose constants are published figures fitted to no "
    "hardware. Good for comparing configurations; no number here is a claim about a GPU.",
    "measured": "Measured by `tools/bench/run.py`: CUDA graphs over rotated arguments of three times the L2, median.",
}


def read(paths: Iterable[Path]) -> list[Line]:
    """Return the lines of files.

    Raises
    ------
    ValueError
        A file is no list of benchmark lines; the message names it and the line.
    """
    found = []
    for path in paths:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                line = json.loads(text)
                line["how"], line["us"]["median"], line["op"], line["case"], line["batch"], line["device"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: no benchmark line ({type(error).__name__}: {error})") from None
            found.append(line)
    return found


def figure(us: float) -> str:
    """Microseconds with three digits."""
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 100 else f"{us:.0f}"


def table(lines: Sequence[Line], batches: Sequence[int] = SHOWN) -> str:
    """Return a Markdown table: a row per case and device, time and share of a copy per batch, and peers' ratios."""
    columns = [b for b in batches if any(line["batch"] == b for line in lines)]
    rivals = sorted({name for line in lines for name, found in line["peers"].items() if "ratio" in found})
    heads = [f"batch {b}: us, of copy" for b in columns]
    heads += [f"{name} / ours, batch {columns[-1]}" for name in rivals] if columns else []
    out = ["| operator | case | device | " + " | ".join(heads) + " |", "|---" * (3 + len(heads)) + "|"]
    rows: dict[tuple[str, str, str], dict[int, Line]] = {}
    for line in lines:
        rows.setdefault((line["op"], line["case"], line["device"]), {})[line["batch"]] = line
    for (op, case, device), by_batch in sorted(rows.items()):
        if not any(b in by_batch for b in columns):
            continue
        cells = [
            f"{figure(by_batch[b]['us']['median'])}, {by_batch[b]['of_copy']:.0%}" if b in by_batch else ""
            for b in columns
        ]
        last = by_batch.get(columns[-1], {"peers": {}})
        cells += [f"{found['ratio']:.2f}" if "ratio" in (found := last["peers"].get(n, {})) else "" for n in rivals]
        out.append("| " + " | ".join([f"`{op}`", case, device, *cells]) + " |")
    return "\n".join(out)


def about(lines: Sequence[Line]) -> str:
    """Say where lines come from: how, commits, versions, clocks."""
    how = {line["how"] for line in lines}
    commits = sorted({line["commit"][:10] + line["commit"][40:] for line in lines})
    versions = lines[0]["versions"]
    said = f"commit {', '.join(commits)}; " + ", ".join(f"{k} {v}" for k, v in versions.items())
    if "measured" in how:
        copy = sorted({f"{line['device']}: {line['copy_gbs']} GB/s" for line in lines if "copy_gbs" in line})
        said += "; a copy of half a gibibyte reaches, " + ", ".join(copy)
    return said


def write_readme(kind: str, lines: Sequence[Line], readme: Path = README) -> bool:
    """Rewrite the README between the marks of a kind; False if it has no such marks, or nothing changes."""
    begin, end = f"<!-- {kind}:begin -->", f"<!-- {kind}:end -->"
    text = readme.read_text(encoding="utf-8")
    if begin not in text or not lines:
        return False
    head, _, rest = text.partition(begin)
    new = f"{head}{begin}\n{NOTES[kind]}\n\n{table(lines)}\n\n({about(lines)})\n{end}{rest.partition(end)[2]}"
    readme.write_text(new, encoding="utf-8")
    return new != text


def plots(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Write a PNG for every operator and device: time, and share of a copy's bandwidth, against batch."""
    from cute_ssm.demo.report import pyplot as import_pyplot

    pyplot = import_pyplot("bench")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for op, device, how in sorted({(line["op"], line["device"], line["how"]) for line in lines}):
        mine = [line for line in lines if (line["op"], line["device"], line["how"]) == (op, device, how)]
        chart, (left, right) = pyplot.subplots(1, 2, figsize=(14, 5.2))
        colours = {case: f"C{i % 10}" for i, case in enumerate(sorted({line["case"] for line in mine}))}
        for case, colour in colours.items():
            points = sorted((line for line in mine if line["case"] == case), key=lambda line: line["batch"])
            batch = [line["batch"] for line in points]
            style = "-" if list(colours).index(case) < 10 else "--"
            left.plot(batch, [p["us"]["median"] for p in points], style, color=colour, marker="o", ms=3, label=case)
            if how == "measured":
                low, high = ([p["us"][q] for p in points] for q in ("p10", "p90"))
                left.fill_between(batch, low, high, color=colour, alpha=0.15, linewidth=0)
            right.plot(batch, [100 * p["of_copy"] for p in points], style, color=colour, marker="o", ms=3)
            for n, rival in enumerate(sorted({name for p in points for name in p["peers"]} - {"copy"})):
                timed = [(p["batch"], p["peers"][rival]["us"]["median"]) for p in points
                         if "us" in p["peers"].get(rival, {})]  # fmt: skip
                if timed:
                    left.plot(*zip(*timed), ":", color=colour, marker="xv^s"[n % 4], ms=4, label=f"{rival}: {case}")
        for axis, label in ((left, "microseconds"), (right, "% of a copy's bandwidth")):
            axis.set_xscale("log", base=2)
            batches = sorted({line["batch"] for line in mine})
            axis.set_xticks(batches, [str(b) for b in batches])
            axis.set_xlabel("batch")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
        left.set_yscale("log")
        right.set_ylim(0, 105)
        said = "MODELLED, constants not fitted to hardware" if how == "modelled" else "measured"
        chart.suptitle(f"{op} on {device}: {said}")
        chart.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False)
        chart.tight_layout()
        path = folder / f"{how}-{device.lower().replace(' ', '-')}-{op}.png"
        chart.savefig(path, dpi=85, bbox_inches="tight")
        pyplot.close(chart)
        written.append(path)
    return written


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, print tables, rewrite, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--readme", action="store_true", help="rewrite the README's tables")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write PNG files")
    options = parser.parse_args(argv)
    files = options.files or sorted(RESULTS.glob("*.jsonl"))
    try:
        lines = read(files)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not lines:
        parser.error(f"no lines in {', '.join(map(str, files)) or RESULTS}; tools/bench/run.py makes them")
    for kind in ("modelled", "measured"):
        mine = [line for line in lines if line["how"] == kind]
        if mine:
            print(f"## {kind}\n\n{NOTES[kind]}\n\n{table(mine)}\n\n({about(mine)})\n")
            if options.readme:
                write_readme(kind, mine)
    if options.plots:
        for path in plots(lines, options.plots):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
