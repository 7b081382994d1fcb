"""Count what operators cost on the emulator: ``python tools/bench/counters.py`` prints a table.

Results go to ``--out FILE``; the committed ones are ``results/counters.json``, from which ``--docs`` rewrites the
table of docs/performance/counters.md between its marks.  With ``--table`` nothing is counted.

A row has the digests of its kernels' PTX (tools/digest.py).  ``--check`` compiles the kernels of all rows, or of some
operators' by ``--only``, and names the rows that are of other kernels; ``--stale --out FILE`` counts these anew.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import outputs, report
from bench.outputs import ROOT, commit

RESULTS = outputs.RESULTS / "counters.json"
PAGE = ROOT / "docs" / "performance" / "counters.md"

ARCHS = ("sm_90a", "sm_100a")


def record(only: list[str], before: Path = RESULTS, stale: bool = False) -> dict:
    """Count every case of the operators `only`, or of all, on every target; rows of others stay as in the file.

    With `stale`, so do rows whose kernels are the same.
    """
    sys.path.insert(0, str(ROOT / "tools"))
    from count import count

    kept = json.loads(before.read_text())["rows"] if (only or stale) and before.exists() else []
    known = {identity(row["op"], row["keys"], row["arch"]): row for row in kept}
    now, rows = commit(), []
    for op, keys, arch in calls():
        row = known.get(identity(op, keys, arch))
        if (not only or op in only) and not (stale and row is not None and of_these_kernels(row, op, keys, arch)):
            said = " ".join(f"{key}={value}" for key, value in keys.items())
            chosen = {"configs": configs(op, keys, arch), "digests": digests(op, keys, arch)}
            row = as_row(count(op, keys, arch)) | {"call": said, **chosen, "commit": now}
        if row is not None:
            rows.append(row)
    versions = {name: metadata.version(name) for name in ("nvidia-cutlass-dsl", "torch", "numpy")}
    return {
        "method": "tools/count.py: warp instructions and 32-byte sectors in the emulator, and machine code; no times",
        "versions": {"python": platform.python_version(), **versions},
        "rows": rows,
    }


def as_row(counted: dict) -> dict:
    """Return what the results keep of a count; names and bytes of tensors can be had again from tools/count.py."""
    kernels = [{name: value for name, value in kernel.items() if name != "name"} for kernel in counted["kernels"]]
    return {name: value for name, value in counted.items() if name != "tensors"} | {"kernels": kernels}


def kernels(op: str, keys: dict[str, str], arch: str) -> list[tuple]:
    """Return the distinct kernels that a case runs, which take no compile to know: (spec, config, target) each."""
    from cute_ssm import arch as archs
    from cute_ssm import tuning
    from cute_ssm.workloads import plan

    fields = {k.removeprefix("config."): int(v) for k, v in keys.items() if k.startswith("config.")}
    shapes = {k: v for k, v in keys.items() if not k.startswith("config.")}
    with tuning.override(**fields):
        return list(dict.fromkeys(plan.of_call(op, shapes, archs.by_name(arch))))


def configs(op: str, keys: dict[str, str], arch: str) -> list[dict]:
    """Return the configs of the kernels that a case runs."""
    from cute_ssm.workloads import plan

    return [plan.as_entry(*kernel)["config"] for kernel in kernels(op, keys, arch)]


def digests(op: str, keys: dict[str, str], arch: str) -> list[str]:
    """Return the digests of the kernels that a case runs; those that are not in the cache on disk are compiled."""
    sys.path.insert(0, str(ROOT / "tools"))
    import digest

    return [digest.digest(ptx) for ptx in digest.compiled(kernels(op, keys, arch))]


def of_these_kernels(row: dict, op: str, keys: dict[str, str], arch: str) -> bool:
    """Whether the kernels that a case runs are those that its row was counted with."""
    return row["configs"] == configs(op, keys, arch) and row.get("digests") == digests(op, keys, arch)


def check(results: dict, only: list[str]) -> list[str]:
    """Return the rows of the operators `only`, or of all, that are missing or were counted with other kernels."""
    known = {identity(row["op"], row["keys"], row["arch"]): row for row in results["rows"]}
    stale = []
    for op, keys, arch in calls():
        row = known.get(identity(op, keys, arch))
        if (not only or op in only) and (row is None or not of_these_kernels(row, op, keys, arch)):
            stale.append(f"{op} {' '.join(f'{key}={value}' for key, value in keys.items())} {arch}")
    return stale


def cases() -> list[tuple[str, dict]]:
    """What is counted: operators and the parameters of their calls."""
    from cute_ssm import workloads

    return [(op, keys) for op in workloads.OPERATORS for keys in workloads.counted(op)]


def calls() -> Iterator[tuple[str, dict[str, str], str]]:
    """Yield the operator, parameters and target of every row."""
    for op, keys in cases():
        for arch in ARCHS:
            yield op, {key: str(value) for key, value in keys.items()}, arch


def identity(op: str, keys: dict, arch: str) -> tuple:
    """What makes a row: the same call of the same operator for the same target, whatever is left to its defaults."""
    from cute_ssm import workloads

    return op, arch, *sorted((k, str(v)) for k, v in {**workloads.parameters(op), **keys}.items())


COLUMNS = (
    "operator", "call", "target", "PTX slots / unit", "machine slots / unit", "DRAM / floor", "L2 / floor",
    "registers", "spills", "LDL, STL", "code KB", "loop KB",
)  # fmt: skip


def table(results: dict) -> str:
    """Markdown table of the recorded counts."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([*lines, *map(line, results["rows"])])


def line(row: dict) -> str:
    """Return the line of a row; of several kernels, the sums of what adds up and the greatest of the rest."""
    codes = [kernel["machine_code"] for kernel in row["kernels"]]
    cells = [
        f"`{row['op']}`",
        f"`{row['call']}`",
        row["arch"],
        figure(row["issue_slots_per_unit"]),
        machine_slots(row["machine_slots_per_unit"]),
        f"{row['dram_over_floor']:.3f}",
        f"{row['l2_over_floor']:.3f}",
        str(max(kernel["registers"] for kernel in row["kernels"])),
        str(sum(kernel["spill_bytes"] for kernel in row["kernels"])),
        f"{sum(code['local_loads'] for code in codes)}, {sum(code['local_stores'] for code in codes)}",
        f"{sum(code['code_bytes'] for code in codes) / 1024:.1f}",
        f"{max(code['largest_loop_bytes'] for code in codes) / 1024:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def figure(slots: float) -> str:
    """Instructions of a unit, in at least three digits."""
    return f"{slots:.{0 if slots >= 100 else 2}f}"


def machine_slots(bounds: list[float] | None) -> str:
    """The least and the most instructions of the machine code, or one figure where both are shown alike."""
    if bounds is None:
        return "not known"
    least, most = map(figure, bounds)
    return least if least == most else f"{least} to {most}"


def summary(results: dict) -> str:
    """Markdown table: of every operator, the range over its rows of machine slots by PTX slots, and of sizes."""
    lines = ["| operator | machine / PTX slots | code KB | loop KB |", "|---|---|---|---|"]
    for op in dict.fromkeys(row["op"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["op"] == op]
        known = [row for row in rows if row["machine_slots"] is not None]
        least = min((row["machine_slots"][0] / row["issue_slots"] for row in known), default=None)
        most = max((row["machine_slots"][1] / row["issue_slots"] for row in known), default=None)
        ratio = "not known" if least is None else f"{least:.2f} to {most:.2f}"
        codes = [kernel["machine_code"] for row in rows for kernel in row["kernels"]]
        sizes = [[code[name] / 1024 for code in codes] for name in ("code_bytes", "largest_loop_bytes")]
        lines.append("| " + " | ".join([f"`{op}`", ratio, *(report.span(s, "{:.1f}") for s in sizes)]) + " |")
    return "\n".join(lines)


def page(results: dict) -> str:
    """Return what the page of the docs has between its marks."""
    return f"{summary(results)}\n\n{table(results)}\n\n({about(results)})"


def about(results: dict) -> str:
    """Say where the counts come from: commits and versions."""
    commits = sorted({row["commit"][:10] + row["commit"][40:] for row in results["rows"]})
    return f"commit {', '.join(commits)}; " + ", ".join(f"{k} {v}" for k, v in results["versions"].items())


def main(argv: list[str] | None = None) -> int:
    """Count unless told not to, and print a table; write what was asked for, and nothing else."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="OP", default=[], help="count the cases of these operators alone")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"write results, e.g. to {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--table", action="store_true", help="count nothing: the table of the committed results")
    parser.add_argument("--docs", action="store_true", help="rewrite the table of the docs from the committed results")
    parser.add_argument("--check", action="store_true", help="count nothing: name the rows that are of other kernels")
    parser.add_argument("--stale", action="store_true", help="count only the rows that are of other kernels")
    options = parser.parse_args(argv)
    if options.table and (options.out or options.only):
        parser.error("--table: expected neither --out nor --only, as nothing is counted")
    if options.check:
        stale = check(json.loads(RESULTS.read_text()), options.only)
        print("\n".join(f"of other kernels: {row}" for row in stale) or "every row is of the kernels that run now")
        return int(bool(stale))
    if options.table:
        results = json.loads(RESULTS.read_text())
    else:
        results = record(options.only, options.out or RESULTS, options.stale)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    if options.docs:
        committed = json.loads(RESULTS.read_text())
        report.write_page("counters", page(committed), PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
