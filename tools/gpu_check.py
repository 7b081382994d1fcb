"""Everything that a GPU can show, in one command and within a given time: ``python tools/gpu_check.py --minutes 8``.

Steps, each a command with a share of the time, a log, and a line in the summary: the environment; the emulator's
results beside the GPU's, bit by bit; the tests, those of the emulator on the GPU (``pytest --gpu``); memcheck and
racecheck of compute-sanitizer on a call of every operator; the benchmarks; a round of tuning.  All that they write lies
under ``--out``, and is there after each step, so that what was done stays when time runs out.  The exit code is 0 if
every step that ran passed.

    python tools/gpu_check.py --dry-run        # prints the commands, needs no GPU
    python tools/gpu_check.py --only compare   # some of the steps
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATHS = [str(ROOT / path) for path in (".", "tools", "tools/ptxsim", "tools/gpumodel")]
sys.path[:0] = PATHS

from cute_ssm import workloads  # noqa: E402

RESERVE_S = 10.0  # for the summary
EMULATED = ("tests/ops", "tests/compat", "tests/integrations", "tests/serving", "tests/test_gpu.py")
CPU_ONLY = "not test_reference and not configuration_of_the_reference"


@dataclass
class Step:
    """One command.

    Attributes
    ----------
    name : str
    command : list of str
    share : float
        Weight of the time it may take of what is left, beside those of the steps after it.
    needs : str
        A program without which it is left out.
    last : str
        Pattern of the line of its log that the summary shows; the last line that matches.
    """

    name: str
    command: list[str]
    share: float
    needs: str = ""
    last: str = r"\S"


@dataclass
class Done:
    """What became of a step: "passed", "failed", "out of time" or "left out"."""

    name: str
    status: str
    seconds: float
    line: str
    limit_s: float = 0.0
    log: str = ""
    returncode: int | None = None
    extra: dict = field(default_factory=dict)


Runner = Callable[[Sequence[str], Path, float, Mapping[str, str]], "int | None"]


def run(command: Sequence[str], log: Path, limit_s: float, environment: Mapping[str, str]) -> int | None:
    """Run a command into a log; return its code, or None if it was ended because its time was over."""
    with open(log, "w", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=dict(environment), start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 15)  # the tests' workers too
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, 9)
                    process.wait()


def steps(out: Path, minutes: float, quick: bool, jobs: int) -> list[Step]:
    """Return the steps in order; the sure and the short ones first."""
    python = sys.executable
    own = [python, str(Path(__file__).resolve())]
    tests = [path for path in EMULATED if (ROOT / path).exists()]
    pytest = [python, "-m", "pytest", "--gpu", "-q", "-p", "no:cacheprovider", "-n", str(jobs), "--maxfail=50"]
    pytest += [f"--junitxml={out / 'tests.xml'}", "-k", "kernel or gpu" if quick else CPU_ONLY, *tests]
    found = [
        Step("environment", [python, "-m", "cute_ssm", "env"], 0.2, last=r"nothing is wrong|BROKEN|note:"),
        Step("driver", ["nvidia-smi", "-q"], 0.1, needs="nvidia-smi", last=r"Product Name"),
        Step("compare", [*own, "compare", str(out / "compare.json"), *(["--quick"] if quick else [])], 1.5),
        Step("tests", pytest, 4.0, last=r"\d+ (passed|failed|error)"),
    ]
    sanitize = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    for tool, line in (("memcheck", "ERROR SUMMARY"), ("racecheck", "RACECHECK SUMMARY")):
        command = [*sanitize, tool, *own, "one", *workloads.OPERATORS]
        found.append(Step(tool, command, 1.0, needs="compute-sanitizer", last=line))
    bench = [python, str(ROOT / "tools" / "bench" / "run.py"), "--quick", "--out", str(out / "bench.jsonl")]
    found.append(Step("benchmarks", [*bench, "--minutes", f"{minutes * 0.3:.2f}"], 3.0))
    for op in workloads.OPERATORS if not quick else workloads.OPERATORS[:1]:
        first = workloads.of_operator(op)[0]
        third = len(first.batches) // 3
        shapes = [f"{key}={value}" for key, value in first.keys]
        shapes.append(f"{workloads.batch_key(op)}={first.batches[third]},{first.batches[2 * third]}")
        tune = [python, "-m", "cute_ssm", "tune", op, "--out", str(out / "tuned.json"), "--shapes", *shapes]
        tune += ["--minutes", f"{minutes * 0.1:.2f}", "--journal", str(out / f"tune-{op}.jsonl")]
        found.append(Step(f"tune {op}", tune, 1.0, last=r"better than"))
    return found


def carry_out(
    found: Sequence[Step], out: Path, minutes: float, runner: Runner = run, clock: Callable[[], float] = time.monotonic
) -> list[Done]:
    """Run the steps within a time, writing the summary after each."""
    out.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [environment.get("PYTHONPATH", "")])])
    environment.setdefault("CUTE_SSM_CACHE_DIR", str(out / "kernels"))
    environment |= {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    end, done = clock() + 60 * minutes - RESERVE_S, []
    for i, step in enumerate(found):
        done.append(_carry_out(step, found[i:], out, end - clock(), runner, clock, environment))
        write_summary(done, out)
    return done


def _carry_out(
    step: Step, left: Sequence[Step], out: Path, seconds: float, runner: Runner, clock: Callable[[], float],
    environment: Mapping[str, str],
) -> Done:  # fmt: skip
    if step.needs and shutil.which(step.needs) is None:
        return Done(step.name, "left out", 0.0, f"{step.needs} is not installed")
    if seconds <= 1:
        return Done(step.name, "left out", 0.0, "the time was over")
    log = out / (re.sub(r"\W+", "-", step.name) + ".log")
    limit = max(min(seconds, 20.0), seconds * step.share / sum(later.share for later in left) * 1.5)
    limit = min(limit, seconds)
    start = clock()
    try:
        code = runner(step.command, log, limit, environment)
    except OSError as error:
        return Done(step.name, "failed", clock() - start, str(error), limit)
    status = "out of time" if code is None else "passed" if code == 0 else "failed"
    return Done(step.name, status, clock() - start, _line(log, step.last), limit, log.name, code)


def _line(log: Path, pattern: str) -> str:
    """The last line of a log that matches."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if re.search(pattern, line)), "")


def write_summary(done: Sequence[Done], out: Path) -> str:
    """Write what was done so far, for programs and for people; return the latter."""
    (out / "summary.json").write_text(json.dumps([asdict(one) for one in done], indent=1) + "\n")
    width = max(len(one.name) for one in done)
    lines = [f"{one.status:11} {one.seconds:6.1f} s  {one.name:{width}}  {one.line}"[:158] for one in done]
    counts = {
        status: sum(one.status == status for one in done) for status in ("passed", "failed", "out of time", "left out")
    }
    lines.append(
        ", ".join(f"{count} {status}" for status, count in counts.items() if count) + f"; everything is in {out}"
    )
    text = "\n".join(lines) + "\n"
    (out / "summary.txt").write_text(text)
    return text


def one(ops: Sequence[str]) -> int:
    """Make one call of each operator on the GPU, for a sanitizer."""
    import torch

    for op in ops:
        workloads.build(op, workloads.small(op), "cuda").run()
        torch.cuda.synchronize()
        print(f"{op}: done", flush=True)
    return 0


def compare(path: Path, quick: bool) -> int:
    """Run calls in the emulator and on the GPU, from the same bits by the same configs; write how far they agree."""
    import torch

    import ptxsim
    from cute_ssm import arch as archs
    from cute_ssm.workloads import plan

    device = torch.device("cuda")
    target, sms = archs.of_device(device), torch.cuda.get_device_properties(device).multi_processor_count
    rows = []
    for op in workloads.OPERATORS:
        for keys in workloads.checked(op)[: 1 if quick else None]:
            here, there = workloads.build(op, keys), on_device(workloads.build(op, keys), device)
            with ptxsim.emulate(arch=target.name, sm_count=sms):
                here.run()
            there.run()
            torch.cuda.synchronize()
            got = there.results()
            outputs = {name: agreement(value, got[name].cpu()) for name, value in here.results().items()}
            kernels = [kernel[0].text() for kernel in plan.of_call(op, keys, target, sms)]
            rows.append({"op": op, "keys": keys, "kernels": kernels, "outputs": outputs})
            path.write_text(json.dumps(rows, indent=1) + "\n")
            print(op, keys, {name: round(value["equal"], 6) for name, value in outputs.items()}, flush=True)
    far = [row for row in rows if any(value["worst"] > 2.0**-6 for value in row["outputs"].values())]
    shares = [value["equal"] for row in rows for value in row["outputs"].values()]
    print(
        f"{len(rows)} calls, {min(shares):.6f} to {max(shares):.6f} of the values equal bit for bit, {len(far)} far off"
    )
    return int(bool(far))


def on_device(call: workloads.Call, device: object) -> workloads.Call:
    """The same call on copies of its arguments on a device."""
    import torch

    from cute_ssm.workloads.maker import moved

    call.arguments = {
        name: moved(value, device) if isinstance(value, torch.Tensor) else value
        for name, value in call.arguments.items()
    }
    return call


def agreement(a: object, b: object) -> dict[str, float]:
    """Share of the values that are equal bit for bit, and the largest distance, as part of the largest value."""
    import torch

    bits = a.contiguous().view(torch.uint8).view(*a.shape, a.element_size())
    equal = (bits == b.contiguous().view(torch.uint8).view_as(bits)).all(-1)
    x, y = a.float(), b.float()
    finite = x.isfinite() & y.isfinite()
    largest = float(x[finite].abs().max()) if bool(finite.any()) else 1.0
    worst = float((x - y)[finite].abs().max()) / max(largest, 1e-30) if bool(finite.any()) else 0.0
    if not torch.equal(x.isnan(), y.isnan()):
        worst = float("inf")
    return {"equal": float(equal.float().mean()), "worst": worst}


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks for."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "one":
        return one(argv[1:])
    if argv and argv[0] == "compare":
        return compare(Path(argv[1]), "--quick" in argv)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything (default: 8)")
    parser.add_argument("--quick", action="store_true", help="fewer tests and calls")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder of all results")
    parser.add_argument("--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)), help="test processes")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="steps whose names contain one of these")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    options = parser.parse_args(argv)
    out = options.out.absolute()
    found = steps(out, options.minutes, options.quick, options.jobs)
    if options.only:
        found = [step for step in found if any(word in step.name for word in options.only)]
        if not found:
            parser.error(f"--only: expected words in names of steps, got {' '.join(options.only)}")
    if options.dry_run:
        for step in found:
            print(f"{step.name:30} {' '.join(step.command)}")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("gpu_check: needs a GPU that torch sees; --dry-run prints what it would do", file=sys.stderr)
        return 2
    done = carry_out(found, out, options.minutes)
    print(write_summary(done, out), end="")
    return int(any(one.status == "failed" for one in done))


if __name__ == "__main__":
    sys.exit(main())
