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

MAMBA1 = {"nheads": 1, "dim": 4096, "dstate": 16, "state_dtype": "float32", "layout": "dense"}
SCAN = {"dstate": 16, "config.lanes": 1, "config.warps": 4, "config.splits": 1}
STEP = {"nheads": 16, "dim": 64, "dstate": 128, "ngroups": 1, "state_dtype": "float16"}
REPLAY = {"nheads": 16, "dim": 64, "dstate": 128, "ngroups": 1, "T": 6, "W": 16, "z": 1}
CASES = [  # (operator, keys)
    ("selective_state_update", {"batch": 8, **STEP}),
    ("selective_state_update", {"batch": 64, **STEP}),
    ("selective_state_update", {"batch": 64, **STEP, "state_dtype": "bfloat16"}),
    ("selective_state_update", {"batch": 64, **STEP, "state_dtype": "float32"}),
    ("selective_state_update", {"batch": 64, **STEP, "dim": 80}),
    ("selective_state_update", {"batch": 1, **STEP}),
    ("selective_state_update", {"batch": 64, **STEP, "z": 1}),
    ("selective_state_update", {"batch": 16, **MAMBA1}),
    *(("selective_state_update", {"batch": 64, **STEP, **mode}) for mode in (
        {"state_dtype": "int8"},
        {"state_dtype": "float8_e4m3fn"},
        {"state_dtype": "int16"},
        {"rounding": "stochastic"},
        {"state_dtype": "bfloat16", "rounding": "stochastic"},
        {"state_dtype": "int8", "rounding": "stochastic"},
        {"varlen": 1},
        {"T": 6},
        {"T": 6, "state_dtype": "float32"},
        {"T": 6, "state_dtype": "int8"},
        {"T": 6, "state_dtype": "float8_e4m3fn"},
        {"T": 6, "rounding": "stochastic"},
        {"T": 6, "intermediates": 1},
        {"T": 6, "intermediates": 1, "state_dtype": "int8"},
        {"T": 6, "varlen": 1},
    )),
    ("selective_state_update", {"batch": 64, **STEP, "T": 6, "config.matmul": 0}),
    ("selective_state_update", {"batch": 16, "T": 6, **MAMBA1}),
    *(("checkpointing_ssu", {"batch": 64, **REPLAY, "state_dtype": dtype, "pnat": pnat})
        for pnat in (8, 12)
        for dtype in ("bfloat16", "float16", "float32", "int8", "float8_e4m3fn", "int16")),
    ("checkpointing_ssu", {"batch": 64, **REPLAY, "pnat": 12, "rounding": "stochastic"}),
    ("checkpointing_ssu", {"batch": 64, **REPLAY, "pnat": 12, "state_dtype": "int8", "rounding": "stochastic"}),
    ("checkpointing_ssu", {"batch": 512, **REPLAY, "pnat": 8}),
    ("checkpointing_ssu", {"batch": 1, **REPLAY, "pnat": 8, "state_dtype": "bfloat16"}),
    ("checkpointing_ssu", {"batch": 1, **REPLAY, "pnat": 8}),
    ("gated_delta_rule_mtp", {"B": 16, "T": 4}),
    ("gated_delta_rule_mtp", {"B": 16, "T": 8}),
    ("gated_delta_rule_mtp", {"B": 16, "T": 4, "verify": 0}),
    ("gated_delta_rule_mtp", {"B": 16, "T": 4, "state_dtype": "bfloat16"}),
    ("gated_delta_rule_mtp", {"B": 16, "T": 4, "verify": 0, "buffer": 1}),
    ("gated_delta_rule_mtp", {"B": 16, "T": 1, "verify": 0}),
    ("gated_delta_rule_mtp", {"B": 16, "T": 1, "verify": 0, "config.sequential": 0}),
    ("gated_delta_rule_mtp", {"B": 16, "T": 2}),
    ("gated_delta_rule_mtp", {"B": 16, "T": 2, "config.sequential": 1}),
    ("gated_delta_rule_mtp", {"B": 1, "T": 1, "verify": 0}),
    ("gated_delta_rule_mtp", {"B": 1, "T": 1, "verify": 0, "config.sequential": 0}),
    ("gated_delta_rule_replay", {"B": 16, "T": 4}),
    ("gated_delta_rule_replay", {"B": 16, "T": 4, "pnat": 0}),
    ("gated_delta_rule_replay", {"B": 16, "T": 4, "state_dtype": "bfloat16"}),
    ("gated_delta_rule_replay", {"B": 16, "T": 8, "W": 24}),
    ("selective_scan", {"batch": 1, "dim": 128, "length": 1024, **SCAN}),
    ("selective_scan", {"batch": 2, "dim": 128, "length": 1024, "varlen": 1, **SCAN}),
    ("selective_scan", {"batch": 1, "dim": 128, "length": 4096, **SCAN}),
    ("selective_scan", {"batch": 1, "dim": 1536, "length": 2048, "config.splits": 1}),
    ("selective_scan", {"batch": 1, "dim": 1536, "length": 2048}),
]  # fmt: skip
ARCHS = ("sm_90a", "sm_100a")


def record(only: list[str], before: Path = RESULTS) -> dict:
    """Count every case of the operators `only`, or of all, on every target; rows of others stay as in the file."""
    sys.path.insert(0, str(ROOT / "tools"))
    from count import count

    kept = json.loads(before.read_text())["rows"] if only and before.exists() else []
    known = {identity(row["op"], row["keys"], row["arch"]): row for row in kept}
    now, rows = commit(), []
    for op, keys in CASES:
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
