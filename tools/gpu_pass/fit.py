"""Take the results of passes in: ``python tools/gpu_check.py fit pass1.tar.gz pass2.tar.gz``.

With ``--dry-run`` nothing is written: all goes into a copy, and the files that would change are named.

- Times go to ``tools/bench/results/measured.jsonl``, in the place of earlier ones of the same calls on the same GPU.
- ``tools/bench/results/pass-DEVICE.json`` records what the steps found: failures, errors, the GPU's arithmetic beside
  the emulator's, and the fit.
- Tuned configs go into the package's tables; measured rows replace modelled ones.
- Constants of the machine model are fitted to the times and stored beside it, with the error that is left.  That error
  raises the margin by which a modelled config must beat the rule's; rows of the tables that gain less are withdrawn.
- Tables and plots of docs/performance are written anew.

Rehearsals, and passes on devices that are not there, are refused: their times are none.  A dry run takes them.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import passes as pages
from bench import report

from cute_ssm.tuning import tables
from gpu_pass import arithmetic, observed, probes, records, tuning
from gpumodel import validated

ROOT = Path(__file__).resolve().parents[2]
SHIM = "gpushim "  # that a device's name begins with which is not there
# of a checkout, what takes results
TAKING = (
    "README.md",
    "cute_ssm/tuning/tables.json",
    "docs/performance",
    "tools/bench/results",
    "tools/gpumodel/gpumodel",
)


@dataclass
class Results:
    """What an archive holds."""

    path: Path
    about: dict[str, Any]
    files: dict[str, bytes]

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a file, none if it is absent; a line that was cut short is left out."""
        return records.parsed(self.files.get(name, b"").decode("utf-8", "replace"))

    def items(self) -> dict[str, list[dict[str, Any]]]:
        """Return the last line of every item, by step."""
        found = {}
        for name in self.files:
            if name.startswith("items-"):
                last = {line["item"]: line for line in self.lines(name)}
                found[name.removeprefix("items-").removesuffix(".jsonl")] = list(last.values())
        return found


def read(path: Path, dry: bool = False) -> Results:
    """Return the contents of an archive.

    Parameters
    ----------
    dry : bool
        Take a rehearsal too; a GPU of the model with as many SMs stands for one that is not there.

    Raises
    ------
    ValueError
        It is no pass on a GPU.
    """
    try:
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar.getmembers() if member.isfile()}
        about = json.loads(files["about.json"])
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: expected the archive of a pass, got {type(error).__name__}: {error}") from None
    if not dry and (about["rehearsal"] or about["device"].startswith(SHIM)):
        raise ValueError(f"{path}: expected a pass on a GPU, got a rehearsal on {about['device']}; see --dry-run")
    if about["device"].startswith(SHIM):
        name = observed.machine_like(about["arch"], about["sms"])
        files = {
            file: data.replace(json.dumps(about["device"]).encode(), json.dumps(name).encode())
            if file.endswith((".json", ".jsonl")) else data for file, data in files.items()
        }  # fmt: skip
        about["device"] = name
    return Results(path, about, files)


def take_times(found: Sequence[Results], path: Path) -> list[dict[str, Any]]:
    """Merge times into a file of benchmark lines, and return those of the passes."""

    def identity(line: dict[str, Any]) -> tuple[Any, ...]:
        return line["device"], line["op"], line["case"], line["batch"]

    new = [line for results in found for line in results.lines("times.jsonl")]
    if new:
        old = report.read([path]) if path.exists() else []
        merged = {identity(line): line for line in [*old, *new]}
        ordered = sorted(merged.values(), key=identity)
        path.write_text("".join(json.dumps(line) + "\n" for line in ordered), encoding="utf-8")
    return new


def take_tables(found: Sequence[Results], path: Path) -> int:
    """Merge tuned configs into a table, and return how many."""
    rows = [row for results in found for row in json.loads(results.files.get(tuning.TABLE, b"[]"))]
    if rows:
        tables.merge(path, rows)
    return len(rows)


def beside_emulator(found: Iterable[Results], arch: str) -> dict[str, Any]:
    """Return how the GPU's arithmetic compares with what ``ptxsim`` assumes of it.

    Of approximate functions: the share of samples within the documented errors.  Of matrix sums: the share whose bits
    are those of ``arithmetic="hardware"``.
    """
    judged: dict[str, Any] = {"within": {}, "equal": {}}
    for results in found:
        for name, data in results.files.items():
            if name.startswith("approximate-"):
                with np.load(io.BytesIO(data)) as arrays:
                    part = within_documents(arrays["inputs"], arrays["outputs"])
                for function, share in part.items():
                    judged["within"][function] = min(share, judged["within"].get(function, 1.0))
            elif name.startswith("matrix-"):
                operands = name.removeprefix("matrix-").removesuffix(".npz")
                with np.load(io.BytesIO(data)) as arrays:
                    judged["equal"][operands] = equal_sums(operands, dict(arrays), arch)
    return judged


def within_documents(inputs: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
    """Return the share of results within the documented errors, by function."""
    from ptxsim.arithmetic import Arithmetic

    found = {}
    for f, name in enumerate(probes.FUNCTIONS):
        low, high = (
            Arithmetic("hardware", lean=lean).approximation(name, "f32", arithmetic.EXACT[name])(inputs[f])
            for lean in ("low", "high")
        )
        found[name] = float(((low <= outputs[f]) & (outputs[f] <= high)).mean())
    return found


def equal_sums(operands: str, arrays: dict[str, np.ndarray], arch: str) -> float:
    """Return the share of matrix sums whose bits the emulator gives, too."""
    import ptxsim
    from cute_ssm import runtime

    probes.register()
    a, b, c = (torch.from_numpy(arrays[name]) for name in "abc")
    given = arithmetic.fragments(a, b, c, operands)
    result = torch.empty_like(given[2])
    with ptxsim.emulate(arch=arch, arithmetic="hardware"):
        runtime.emulated(probes.MatrixSpec(operands))(*given, result)
    return float((result.numpy().view(np.uint32) == arrays["d"].view(np.uint32)).mean())


def summed_up(found: Sequence[Results]) -> dict[str, Any]:
    """Return what is recorded of passes on one GPU: steps, failures, the largest errors, arithmetic, tuned configs."""
    steps, failures, errors, functions, sums, tuned = [], [], {}, {}, {}, []
    for results in found:
        steps += json.loads(results.files.get("summary.json", b"[]"))
        failures += [
            {**{key: line.get(key) for key in ("step", "name", "max_error")}, "error": line["error"][:300]}
            for line in results.lines(records.FAILURES)
        ]
        by_step = results.items()
        for line in by_step.get("smoke", []):
            op = line["item"].split()[0]
            errors[op] = max(errors.get(op, 0.0), line.get("max_error", 0.0))
        for line in by_step.get("arithmetic", []):
            if "functions" in line:
                functions[line["item"]] = line["functions"]
            elif "operands" in line:
                sums[line["operands"]] = {key: line[key] for key in ("count", "max", "min", "mean", "rms")}
        compared = [line for line in by_step.get("emulated", []) if "ratio" in line]
        tuned += [{key: line.get(key) for key in ("item", "us", "rule_us", "tried", "config")}
                  for line in by_step.get("tuning", []) if line["state"] == "passed"]  # fmt: skip
        if compared:
            errors["ratio to the emulator"] = max(line["ratio"] for line in compared)
    return {
        "about": [results.about for results in found], "steps": steps, "failures": failures, "errors": errors,
        "functions": functions, "sums": sums, "tuned": tuned,
    }  # fmt: skip


def file_of(device: str) -> str:
    """Return the name of the file that records passes on a device."""
    return f"pass-{device.lower().replace(' ', '-')}.json"


def main(argv: list[str] | None = None) -> int:
    """Take archives in."""
    parser = argparse.ArgumentParser(prog="gpu_check.py fit", description=__doc__.split("\n")[0])
    parser.add_argument("archives", nargs="+", type=Path, help="of passes on one GPU")
    parser.add_argument("--constants", nargs="*", default=list(observed.CONSTANTS), help="of the model; none: no fit")
    parser.add_argument("--variants", nargs="+", choices=sorted(observed.VARIANTS), default=["chained", "apart"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64], help="of the times of the fit")
    parser.add_argument("--rounds", type=int, default=4, help="of the fit (default: 4)")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout that takes the results (default: this one)")
    parser.add_argument("--dry-run", action="store_true", help="take a rehearsal too, and write nothing")
    options = parser.parse_args(argv)
    try:
        found = [read(path, options.dry_run) for path in options.archives]
    except ValueError as error:
        parser.error(str(error))
    devices = sorted({results.about["device"] for results in found})
    if len(devices) != 1:
        parser.error(f"archives: expected passes on one GPU, got those on {', '.join(devices)}")
    if not options.dry_run:
        return take_in(found, options, options.root)
    with tempfile.TemporaryDirectory() as folder:
        code = take_in(found, options, copied(options.root, Path(folder)))
        for name in changed(options.root, Path(folder)):
            print(f"would write {name}")
    return code


def copied(root: Path, folder: Path) -> Path:
    """Copy what takes results to a folder, and return it."""
    for name in TAKING:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (root / name).is_dir():
            shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(root / name, folder / name)
    return folder


def changed(root: Path, folder: Path) -> list[str]:
    """Return the files of a copy that differ from the original, or that it lacks."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [
        file.as_posix() for file in files
        if not (root / file).exists() or (root / file).read_bytes() != (folder / file).read_bytes()
    ]  # fmt: skip


def take_in(found: Sequence[Results], options: argparse.Namespace, root: Path) -> int:
    """Write the results into a checkout, or a copy of what takes them; return 1 if something failed."""
    device, results_folder = found[0].about["device"], root / "tools" / "bench" / "results"
    times = take_times(found, results_folder / "measured.jsonl")
    print(f"{len(times)} times")
    table = root / "cute_ssm" / "tuning" / "tables.json"
    rows = take_tables(found, table)
    print(f"{rows} rows of tuned configs")
    record = summed_up(found)
    record["beside_emulator"] = beside_emulator(found, found[0].about["arch"])
    problem = ""
    chosen = [line for line in times if line["batch"] in options.batches]
    if chosen and options.constants:
        try:
            fitted = observed.fit(chosen, options.constants, options.variants, options.rounds, print)
        except (ImportError, ValueError) as error:  # everything else is taken in all the same
            problem = f"the model is not fitted: {error}"
        else:
            source = f"{device}, commit {found[0].about['commit'][:10]}"
            path = root / "tools" / "gpumodel" / "gpumodel" / "fitted.json"
            record["fit"] = observed.store(fitted, path, source)
            margin = validated.error(fitted=path)
            print(f"margin of modelled configs: {margin:.1%}; {tables.withdraw(table, margin)} rows gain less")
    (results_folder / file_of(device)).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    documents(root, results_folder)
    print(pages.told(record))
    if problem:
        print(problem, file=sys.stderr)
    return int(bool(record["failures"] or problem))


def documents(root: Path, results_folder: Path) -> None:
    """Write tables and plots of the documents from the recorded results."""
    folder = root / "docs" / "performance"
    lines = report.read(sorted(results_folder.glob("*.jsonl")))
    for mark, text, page in report.pages(lines, folder, results_folder):
        report.write_page(mark, text, page)
    for path in report.plots(lines, folder / "plots"):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
