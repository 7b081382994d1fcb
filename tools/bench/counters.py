"""Count what operators cost on the emulator: ``python tools/bench/counters.py`` prints a table.

Results go to ``--out FILE``; the committed ones are ``results/counters.json``, from which ``--docs`` rewrites the
table of docs/performance/counters.md between its marks.  With ``--table`` nothing is counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib import metadata
from pathlib import Path

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import outputs, report
from bench.outputs import ROOT, commit

RESULTS = outputs.RESULTS / "counters.json"
PAGE = ROOT / "docs" / "performance" / "counters.md"

ARCHS = ("sm_90a", "sm_100a")


def record(only: list[str], before: Path = RESULTS) -> dict:
    """Count every case of the operators `only`, or of all, on every target; rows of others stay as in the file."""
    sys.path.insert(0, str(ROOT / "tools"))
    from count import count

    kept = json.loads(before.read_text())["rows"] if only and before.exists() else []
    known = {identity(row["op"], row["keys"], row["arch"]): row for row in kept}
    now, rows = commit(), []
    for op, keys in cases():
        for arch in ARCHS:
            keys = {k: str(v) for k, v in keys.items()}
            row = known.get(identity(op, keys, arch))
            if not only or op in only:
                row = count(op, keys, arch) | {"commit": now}
                row.pop("tensors")  # names and per-tensor bytes can be had again from tools/count.py
                for kernel in row["kernels"]:
                    kernel.pop("name")
            if row is not None:
                rows.append(row)
    versions = {name: metadata.version(name) for name in ("nvidia-cutlass-dsl", "torch", "numpy")}
    return {
        "method": "tools/count.py: PTX warp instructions and 32-byte sectors in the emulator; nothing here is a time",
        "versions": {"python": platform.python_version(), **versions},
        "rows": rows,
    }


def cases() -> list[tuple[str, dict]]:
    """What is counted: operators and the parameters of their calls."""
    from cute_ssm import workloads

    return [(op, keys) for op in workloads.OPERATORS for keys in workloads.counted(op)]


def identity(op: str, keys: dict, arch: str) -> tuple:
    """What makes a row: the same call of the same operator for the same target, whatever is left to its defaults."""
    from cute_ssm import workloads

    return op, arch, *sorted((k, str(v)) for k, v in {**workloads.parameters(op), **keys}.items())


def table(results: dict) -> str:
    """Markdown table of the recorded counts."""
    lines = [
        "| operator | call | target | issue slots / unit | DRAM / floor | L2 / floor | registers | spills |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        hidden = {"ngroups", "input_dtype", "dt_dtype", "update"}
        usual = {("T", "1"), ("layout", "tied"), ("rounding", "nearest")}
        keys = {k: str(v) for k, v in row["keys"].items() if k not in hidden}
        shown = {k: v for k, v in keys.items() if (v != "0" or k.startswith("config.")) and (k, v) not in usual}
        call = ", ".join(f"{k}={v}" for k, v in shown.items())
        registers = max(kernel["registers"] for kernel in row["kernels"])
        spills = sum(kernel["spill_bytes"] for kernel in row["kernels"])
        slots = row["issue_slots_per_unit"]
        lines.append(
            f"| `{row['op']}` | {call} | {row['arch']} | {slots:.{0 if slots >= 100 else 2}f} | "
            f"{row['dram_over_floor']:.3f} | {row['l2_over_floor']:.3f} | {registers} | {spills} |"
        )
    return "\n".join(lines)


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
    options = parser.parse_args(argv)
    if options.table and (options.out or options.only):
        parser.error("--table: expected neither --out nor --only, as nothing is counted")
    results = json.loads(RESULTS.read_text()) if options.table else record(options.only, options.out or RESULTS)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    if options.docs:
        committed = json.loads(RESULTS.read_text())
        report.write_page("counters", f"{table(committed)}\n\n({about(committed)})", PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
