"""Run the test suites of other packages over `cute_ssm.compat`: ``python tools/peer_suites/run.py``.

    python tools/peer_suites/run.py --fetch                    # their files, into .peers
    python tools/peer_suites/run.py fla-gated-delta-rule       # one suite, both backends
    python tools/peer_suites/run.py --out tools/bench/results/peer_suites.json
    python tools/peer_suites/run.py --docs                     # the table of docs/peers.md, from the committed results

Every suite runs in a process of its own, in the emulator (``kernel``) and by PyTorch alone (``reference``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, ""):  # run as a file
    sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tools" / "ptxsim")]

from bench import outputs, report  # noqa: E402

from peer_suites import sources  # noqa: E402
from peer_suites.outcomes import FAILED, LEFT_OUT, NO_KERNEL, NOT_SHOWN, PASSED, STALE  # noqa: E402
from peer_suites.suites import BACKENDS, KERNEL, PEERS, SUITES, Peer, Suite  # noqa: E402

RESULTS = outputs.RESULTS / "peer_suites.json"
PAGE = ROOT / "docs" / "peers.md"
ARCH = "sm_90a"
GIB = 10  # of a process


def missing(suite: Suite) -> str | None:
    """Return why a suite cannot run here; None if it can."""
    if not (sources.FOLDER / suite.peer / suite.file).exists():
        return f"{suite.file} of {suite.peer}: python tools/peer_suites/run.py --fetch"
    for name in suite.needs:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            return f"{name}: pip install 'cute-ssm[peers]'"
    return None


def run(suite: Suite, backend: str, arch: str = ARCH, seconds: int | None = None) -> dict[str, Any]:
    """Run a suite, and return what became of its cases.

    Parameters
    ----------
    seconds : int, optional
        Processor time that a case may take, instead of the suite's own.

    Returns
    -------
    dict
        ``suite``, ``backend``, ``arch``, ``seconds`` that a case could take, ``outcomes`` (numbers of cases),
        ``reasons`` (numbers, of those not passed),
        ``launches`` of kernels, ``failures`` (what failed, with messages) and ``output`` of pytest.

    Raises
    ------
    RuntimeError
        The run ended before its cases did.
    """
    seconds = suite.seconds if seconds is None else seconds
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "cases.json"
        command = [sys.executable, "-m", "pytest", "-p", "peer_suites.plugin", "-c", os.devnull, "--noconftest", "-q"]
        command += [f"--rootdir={sources.FOLDER}", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short"]
        command += ["--suite", suite.name, "--backend", backend, "--arch", arch, "--seconds", str(seconds)]
        command += ["--report", str(result), str(sources.FOLDER / suite.peer / suite.file)]
        places = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tools" / "ptxsim"), os.environ.get("PYTHONPATH", "")]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            command, env=variables, cwd=scratch, capture_output=True, text=True, preexec_fn=bounded_memory
        )
        output = done.stdout + done.stderr
        if done.returncode not in (0, 1, 5) or not result.exists():
            raise RuntimeError(f"{suite.name}: pytest ended with {done.returncode}\n{output[-4000:]}")
        cases = json.loads(result.read_text())
    outcomes = Counter(case["outcome"] for case in cases.values())
    reasons: dict[str, Counter[str]] = {}
    for case in cases.values():
        if case["reason"] and case["outcome"] != FAILED:
            reasons.setdefault(case["outcome"], Counter())[case["reason"].strip()] += 1
    failures = {name: case["reason"] for name, case in cases.items() if case["outcome"] in (FAILED, STALE)}
    return {
        "suite": suite.name, "backend": backend, "arch": arch if backend == KERNEL else None, "seconds": seconds,
        "outcomes": dict(sorted(outcomes.items())), "reasons": {k: dict(v) for k, v in sorted(reasons.items())},
        "launches": sum(case["launches"] for case in cases.values()), "failures": failures, "output": output,
    }  # fmt: skip


def not_shown(row: dict[str, Any], results: dict[str, Any]) -> str | None:
    """Return what is wrong with the number of cases that a run skipped or gave up; None if it is small or as recorded.

    Parameters
    ----------
    row : dict
        Of `run`.
    results : dict
        Of the committed file.
    """
    count = Counter(row["outcomes"])
    passed, lost = count[PASSED] + count[NO_KERNEL], sum(count[outcome] for outcome in NOT_SHOWN)
    same = (old for old in results["rows"] if (old["suite"], old["backend"]) == (row["suite"], row["backend"]))
    before = next((sum(old["outcomes"].get(outcome, 0) for outcome in NOT_SHOWN) for old in same), 0)
    if passed and lost <= max(before, passed // 10):
        return None
    return f"{passed} cases passed; {lost} were skipped or went over the bounds, {before} in the committed results"


def bounded_memory() -> None:
    """Bound the memory of this process, so that a case that is too large for the machine fails alone."""
    resource.setrlimit(resource.RLIMIT_AS, (GIB << 30, GIB << 30))


def record(rows: Iterable[dict[str, Any]], before: Path) -> dict[str, Any]:
    """Return results to write: those of `before`, with these rows in place of older ones."""
    kept = json.loads(before.read_text())["rows"] if before.exists() else []
    known = {(row["suite"], row["backend"]): row for row in kept}
    for row in rows:
        made = {name: value for name, value in row.items() if name not in ("output", "failures")}
        known[row["suite"], row["backend"]] = made | {"failures": row["failures"], "commit": outputs.commit()}
    order = [(name, backend) for name in SUITES for backend in BACKENDS]
    versions = {name: metadata.version(name) for name in ("torch", "triton", "numpy")}
    return {
        "method": "tools/peer_suites: tests as their projects publish them, over cute_ssm.compat, without a GPU",
        "bounds": {"gib": GIB},
        "versions": {"python": platform.python_version(), **versions},
        "rows": [known[key] for key in order if key in known],
    }


def page(results: dict[str, Any]) -> str:
    """Return what the page of the docs has between its marks."""
    lines = ["| suite | runs as | passed | not applicable | skipped by itself | over the bounds | failed | left out |"]
    lines += ["| --- | --- | --: | --: | --: | --: | --: | --: |"]
    for row in results["rows"]:
        count = Counter(row["outcomes"])
        how = f"kernels, {row['arch']} emulated" if row["backend"] == KERNEL else "reference in PyTorch"
        passed = f"{count[PASSED]}" + f" + {count['passed without a kernel']} refusals" * (
            count["passed without a kernel"] > 0
        )
        bounds = count["over the time"] + count["over the memory"]
        numbers = (count["not applicable"], count["skipped by the suite"], bounds, count[FAILED] + count[STALE])
        cells = " | ".join(map(str, (*numbers, count[LEFT_OUT])))
        lines.append(f"| `{row['suite']}` | {how} | {passed} | {cells} |")
    done = {(row["suite"], row["backend"]) for row in results["rows"]}
    rest = [f"`{name}` ({way})" for name, suite in SUITES.items() for way in suite.backends if (name, way) not in done]
    if rest:
        lines += ["", f"Not run for these results: {', '.join(rest)}."]
    lines += ["", "Cases that are not applicable, and those that a suite skips by itself:", ""]
    lines += ["| suite | cases | why |", "| --- | --: | --- |"]
    said = set()
    for row in results["rows"]:
        for outcome in ("not applicable", "skipped by the suite"):
            for reason, number in row["reasons"].get(outcome, {}).items():
                if (row["suite"], reason) not in said:
                    said.add((row["suite"], reason))
                    lines.append(f"| `{row['suite']}` | {number} | {reason} |")
    lines += ["", "Where the files of suites come from:", "", "| peer | package | tests |", "| --- | --- | --- |"]
    lines += [f"| {name} | {peer.package} {peer.version} | {origin(peer)} |" for name, peer in PEERS.items()]
    return "\n".join(lines)


def origin(peer: Peer) -> str:
    """Return where a peer's tests are, in words."""
    if peer.repository is None:
        return f"{peer.tests}"
    return f"[{peer.commit}]({peer.repository}/tree/{peer.commit}): {peer.tests}"


def main(argv: list[str] | None = None) -> int:
    """Read the command line; fetch, run, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("suites", nargs="*", choices=[[], *SUITES], metavar="SUITE")
    parser.add_argument("--fetch", action="store_true", help="fetch the files of suites, or of those named")
    parser.add_argument("--clone", action="append", default=[], metavar="PEER=FOLDER", help="a clone to fetch from")
    parser.add_argument("--backend", choices=BACKENDS)
    parser.add_argument("--arch", default=ARCH)
    parser.add_argument("--seconds", type=int, help="processor time of a case, instead of the suite's")
    parser.add_argument("--out", type=Path, help="results; rows of other suites stay as in the file")
    parser.add_argument("--docs", action="store_true", help="rewrite the table of docs/peers.md")
    options = parser.parse_args(argv)
    chosen = [SUITES[name] for name in options.suites or SUITES]
    if options.docs:
        report.write_page("peers", page(json.loads(RESULTS.read_text())), PAGE)
        return 0
    if options.fetch:
        clones = dict(each.split("=", 1) for each in options.clone)
        for name in sorted({suite.peer for suite in chosen}):
            clone = Path(clones[name]) if name in clones else None
            print(sources.fetch(name, PEERS[name], clone))
        return 0
    failed = False
    for suite in chosen:
        why = missing(suite)
        if why:
            parser.error(why)
        for backend in [options.backend] if options.backend else suite.backends:
            row = run(suite, backend, options.arch, options.seconds)
            print(f"{suite.name} {backend}: {row['outcomes']}", flush=True)
            failed |= bool(row["failures"])
            for case, reason in row["failures"].items():
                print(f"  {case}: {reason}")
            if options.out:
                options.out.write_text(json.dumps(record([row], options.out), indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
