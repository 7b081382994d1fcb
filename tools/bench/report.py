"""Tables and plots of benchmark lines: ``python tools/bench/report.py [FILE.jsonl ...] [--docs] [--plots FOLDER]``.

Without files: all of ``results/*.jsonl``.  Prints a Markdown table of each kind.  ``--docs`` rewrites the tables of
docs/performance between their marks, and the plots beside them; ``--plots`` writes the plots elsewhere.  Plots need the
extra 'bench'.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import passes
from bench.cases import SHOWN

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results")
DOCS = ROOT / "docs" / "performance"
MOST_CURVES = 6  # of a panel
Line = dict[str, Any]
NOTES = {
    "modelled": "**Modelled, not measured**: by `tools/gpumodel`, whose constants are published figures, none "
    "fitted to a measurement of this project. Good for comparing configurations; no number here is a claim about a "
    "GPU.",
    "measured": "Measured by `tools/bench/circumstances.py`: CUDA graphs of calls one behind the other over rotated "
    "arguments of three times the L2, median.",
}
UNMEASURED = """\
!!! warning "Nothing was measured on a GPU"
    No kernel of this package has run on a GPU yet. This section holds what can be known without one: exact counts, and
    times from a machine model of published figures. No number here is a claim about a GPU."""
NOTHING = "No such result is recorded yet."
AXES = {
    "of-copy": "% of the bandwidth of a copy",
    "best-peer": "time of the best peer / ours (above 1: ours is faster)",
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


def summary(lines: Sequence[Line], batches: Sequence[int] = SHOWN) -> str:
    """Return a Markdown table: a row per operator and device, the range of its cases per batch."""
    out = [
        "| operator | device | " + " | ".join(f"batch {b}: of copy" for b in batches) + " | best peer / ours |",
        "|---" * (3 + len(batches)) + "|",
    ]
    for op, device in sorted({(line["op"], line["device"]) for line in lines}):
        mine = [line for line in lines if (line["op"], line["device"]) == (op, device)]
        cells = [span([line["of_copy"] for line in mine if line["batch"] == b], "{:.0%}") for b in batches]
        ratios = [ratio for line in mine if (ratio := best_peer(line)) is not None]
        out.append("| " + " | ".join([f"`{op}`", device, *cells, span(ratios, "{:.2f}")]) + " |")
    return "\n".join(out)


def span(values: Sequence[float], form: str) -> str:
    """Return the least and the greatest value."""
    low, high = ((form.format(pick(values)) if values else "") for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def best_peer(line: Line) -> float | None:
    """Return the time of the fastest peer over ours, or None if no peer was timed."""
    ratios = [found["ratio"] for name, found in line["peers"].items() if name != "copy" and "ratio" in found]
    return min(ratios, default=None)


def write_page(mark: str, text: str, page: Path) -> bool:
    """Replace what is between the marks of a page; False if nothing changes.

    Raises
    ------
    ValueError
        If the page lacks a mark.
    """
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    old = page.read_text(encoding="utf-8")
    if begin not in old or end not in old:
        raise ValueError(f"{page.name}: expected the marks {begin} and {end}; add them where the table belongs")
    head, _, rest = old.partition(begin)
    new = f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    page.write_text(new, encoding="utf-8")
    return new != old


def pages(lines: Sequence[Line], folder: Path = DOCS, results: Path = RESULTS) -> Iterator[tuple[str, str, Path]]:
    """Yield what the documents show of lines: the mark, the text between, and the page."""
    for kind, note in NOTES.items():
        mine = [line for line in lines if line["how"] == kind]
        whole = f"{note}\n\n{table(mine)}\n\n({about(mine)})" if mine else NOTHING
        yield f"{kind}-summary", summary(mine) if mine else NOTHING, folder / "index.md"
        yield kind, whole, folder / f"{kind}.md"
    devices = sorted({line["device"] for line in lines if line["how"] == "measured"})
    measured = f"Times of {', '.join(devices)} are measured: see [Measured times](measured.md)."
    yield "status", measured if devices else UNMEASURED, folder / "index.md"
    front = f"Times of {', '.join(devices)} are [measured](docs/performance/measured.md). What is known without a GPU:"
    nothing = "**Nothing was measured on a GPU.** What is known without one:"
    yield "status", front if devices else nothing, folder.parents[1] / "README.md"
    timed = [line for line in lines if "variants" in line]
    yield "measured-variants", passes.variants(timed) if timed else NOTHING, folder / "measured.md"
    yield "passes", passes.page(passes.read(results)) or NOTHING, folder / "measured.md"
    yield "host", host(json.loads((results / "host.json").read_text())), folder / "index.md"


def host(results: dict[str, Any]) -> str:
    """Return a Markdown table of what tools/bench/host.py recorded."""
    rows = [f"| {name.strip()} | {us:.1f} |" for name, us in results["microseconds"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n".join(["| call | microseconds |", "|---|---|", *rows, "", f"({versions})"])


def panels(lines: Sequence[Line]) -> dict[str, dict[str, list[Line]]]:
    """Return lines by model, and then by the rest of the case's name; at most `MOST_CURVES` of these share a panel."""
    found: dict[str, dict[str, list[Line]]] = {}
    for line in sorted(lines, key=lambda line: (line["case"], line["batch"])):
        model, mark, rest = re.split(r" (T=|length=)", line["case"], maxsplit=1)
        found.setdefault(model, {}).setdefault(f"{mark}{rest}", []).append(line)
    split = {}
    for model, curves in found.items():
        names = list(curves)
        for first in range(0, len(names), MOST_CURVES):
            part = names[first : first + MOST_CURVES]
            split[model + (f" ({first // MOST_CURVES + 1})" if len(names) > MOST_CURVES else "")] = {
                name: curves[name] for name in part
            }
    return split


def plots(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Write SVG files for every operator: share of a copy's bandwidth, and the best peer's time over ours, by batch.

    A panel for every model and device.
    """
    written = []
    for op, how in sorted({(line["op"], line["how"]) for line in lines}):
        mine = [line for line in lines if (line["op"], line["how"]) == (op, how)]
        shares = {"of-copy": lambda line: 100 * line["of_copy"], "best-peer": best_peer}
        for name, value in shares.items():
            shown = [line for line in mine if value(line) is not None]
            if shown:
                written.append(figure_of(op, how, name, shown, value, folder / f"{how}-{op}-{name}.svg"))
    return written


def figure_of(
    op: str, how: str, name: str, lines: Sequence[Line], value: Callable[[Line], float | None], path: Path
) -> Path:
    """Draw a figure of small multiples: a row per device, a column per model."""
    from cute_ssm.demo.report import pyplot as import_pyplot

    pyplot = import_pyplot("bench")
    devices = sorted({line["device"] for line in lines}, reverse=True)
    groups = panels(lines)
    batches = sorted({line["batch"] for line in lines})
    labels = sorted({label for curves in groups.values() for label in curves})
    size = (max(2.4 * len(groups) + 0.6, 4.0), 2.1 * len(devices) + 0.9)
    style = {"svg.hashsalt": path.stem, "svg.fonttype": "none", "font.size": 8, "font.sans-serif": ["DejaVu Sans"]}
    with pyplot.rc_context(style):
        chart, axes = pyplot.subplots(
            len(devices), len(groups), sharex=True, sharey=True, squeeze=False, figsize=size, layout="constrained"
        )
        for axis, (device, (model, curves)) in zip(axes.flat, itertools.product(devices, groups.items())):
            for label, points in curves.items():
                number = labels.index(label) % 10  # a case has the same colour in all panels
                found = [(p["batch"], value(p)) for p in points if p["device"] == device]
                if found:
                    axis.plot(*zip(*found), "-", color=f"C{number}", marker="osD^vPX<>p"[number], ms=3.5, label=label)
            axis.set_xscale("log", base=2)
            axis.set_xticks(batches, [str(b) for b in batches])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.set_title(f"{model}, {device}", fontsize=8)
            if name == "best-peer":
                axis.set_yscale("log", base=2)
                axis.minorticks_off()
                axis.axhline(1, color="black", linewidth=0.8)
            if device == devices[0]:
                axis.legend(fontsize=6, frameon=False)
        if name == "of-copy":
            axes[0][0].set_ylim(0, 105)
            axes[0][0].set_yticks([0, 25, 50, 75, 100])
        else:
            low, high = axes[0][0].get_ylim()
            ticks = [tick for tick in (0.125, 0.25, 0.5, 1, 2, 4, 8) if low <= tick <= high]
            axes[0][0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        chart.supxlabel("batch", fontsize=8)
        chart.supylabel(AXES[name], fontsize=8)
        said = "modelled, not measured" if how == "modelled" else "measured"
        chart.suptitle(f"{op}: {said}", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        chart.savefig(path, metadata={"Date": None, "Description": fingerprint(lines)})
        pyplot.close(chart)
    return path


def fingerprint(lines: Sequence[Line]) -> str:
    """Return a digest of what a figure is drawn from, which the figure carries."""
    drawn = sorted((line["case"], line["device"], line["batch"], line["of_copy"], best_peer(line)) for line in lines)
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16]


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, print tables, rewrite, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--docs", action="store_true", help="rewrite tables and plots of docs/performance")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write SVG files")
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
    if options.docs:
        for mark, text, page in pages(lines):
            write_page(mark, text, page)
    for folder in [*([DOCS / "plots"] if options.docs else []), *([options.plots] if options.plots else [])]:
        for path in plots(lines, folder):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
