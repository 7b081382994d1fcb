"""Everything that a GPU can show, within minutes: ``python tools/gpu_check.py --minutes 12``.

Where a command may take ten minutes at most, two commands share the work:

    python tools/gpu_check.py --part 1 --minutes 6 --out pass1    # results lie in pass1, and packed in pass1.tar.gz
    python tools/gpu_check.py --part 2 --minutes 6 --out pass2
    python tools/gpu_check.py fit pass1.tar.gz pass2.tar.gz       # elsewhere: takes the results in

Steps run in processes of their own, most valuable first: every mode of every operator beside the reference; graphs,
streams, dependent launches, no hidden waits; memcheck; results beside the emulator's; times beside peers and a copy;
errors of approximate functions and matrix sums; then profiles, tests (``pytest --gpu``), tuning, racecheck and
initcheck, and more times.  A failure is written when it happens, to ``failures.jsonl``; the archive is written anew
after each step, so that what was reached counts.  The exit code is 0 if nothing failed.

    python tools/gpu_check.py --dry-run             # prints the commands, needs no GPU
    python tools/gpu_check.py --only smoke times    # some of the steps
    python tools/gpu_check.py emulate --arch sm_90a # beforehand: the emulator's results, to compare with
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATHS = [str(ROOT / path) for path in (".", "tools", "tools/ptxsim", "tools/gpumodel")]
sys.path[:0] = PATHS

from gpu_pass import plan, records, runner  # noqa: E402

ITEM_STEPS = ("smoke", "launching", "emulated", "times", "times-more", "arithmetic", "tuning", "sanitized", "one")


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks for."""
    argv = sys.argv[1:] if argv is None else argv
    inner = {"about": about, "step": step, "emulate": emulate, "fit": fit}
    if argv and argv[0] in inner:
        return inner[argv[0]](argv[1:])
    return whole(argv)


def whole(argv: list[str]) -> int:
    """Carry out the steps."""
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=12.0, help="time for everything (default: 12)")
    parser.add_argument("--part", type=int, choices=plan.PARTS, help="the steps of one command of two (default: all)")
    parser.add_argument("--out", type=Path, default=Path("gpu_pass"), help="folder of all results")
    parser.add_argument("--tar", type=Path, help="archive of the results (default: OUT.tar.gz)")
    parser.add_argument("--jobs", type=int, default=max(1, min(4, (os.cpu_count() or 2) // 2)), help="test processes")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="steps whose names contain one of these")
    parser.add_argument("--stall", type=float, default=60.0, help="seconds without a result after which a step hangs")
    parser.add_argument("--rehearse", action="store_true", help="small sizes and few repeats, and nothing else changed")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    options = parser.parse_args(argv)
    out = options.out.absolute()
    found = chosen(options, out, options.jobs)
    if not found:
        parser.error(f"--only: expected words in names of steps, got {' '.join(options.only)}")
    if options.dry_run:
        for one in found:
            print(f"{one.part} {one.name:28} {' '.join(one.command)}")
        return 0
    began, start = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), time.monotonic()
    limit = min(runner.STARTING * options.stall, 30 * options.minutes)  # half of the time
    try:
        command = [sys.executable, str(Path(__file__).resolve()), "about"]
        told = subprocess.run(command, env=environment(out), capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        print(f"gpu_check: CUDA does not open the GPU within {limit:g} seconds", file=sys.stderr)
        return 2
    if told.returncode:
        print(told.stderr, end="", file=sys.stderr)
        return 2
    known = json.loads(told.stdout.splitlines()[-1])
    if known["driver"].get("compute_mode", "Default") != "Default":  # one process at a time may open the GPU
        found = chosen(options, out, 1)
    asked = {"part": options.part, "minutes": options.minutes, "rehearsal": options.rehearse, "began": began}
    out.mkdir(parents=True, exist_ok=True)
    (out / "about.json").write_text(json.dumps({**known, **asked}, indent=1) + "\n")
    archive = (options.tar or out.with_name(f"{out.name}.tar.gz")).absolute()
    doer = runner.Pass(out, archive, environment(out), ROOT, options.stall)
    signal.signal(signal.SIGTERM, doer.end)
    done = doer.carry_out(found, 60 * options.minutes - (time.monotonic() - start))
    print(runner.write_summary(done, out, archive), end="")
    return int(any(one.status == "failed" for one in done))


def chosen(options: argparse.Namespace, out: Path, jobs: int) -> list[plan.Step]:
    """Return the steps that the command line asks for."""
    found = plan.of_parts(plan.steps(out, options.rehearse, jobs), options.part)
    return [one for one in found if not options.only or any(word in one.name for word in options.only)]


def about(argv: list[str]) -> int:
    """Print what results depend on: GPU, versions, commit.  In a process of its own, as a sick driver may hang here."""
    argparse.ArgumentParser(prog="gpu_check.py about").parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("gpu_check: needs a GPU that torch sees; --dry-run prints what it would do", file=sys.stderr)
        return 2
    from bench import roof
    from bench.outputs import commit
    from bench.run import versions

    properties = torch.cuda.get_device_properties(0)
    found = {
        "device": properties.name, "arch": "sm_{}{}a".format(*torch.cuda.get_device_capability(0)),
        "sms": properties.multi_processor_count, "clocks": roof.clocks(0), "versions": versions(), "commit": commit(),
        "driver": roof.asked(("driver_version", "compute_mode", "mig.mode.current"), 0), "programs": programs(),
    }  # fmt: skip
    print(json.dumps(found))
    return 0


def programs() -> dict[str, str]:
    """Return the paths of programs that some steps need, and of a C compiler, by which Triton links launchers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    found = {name: plan.located(name) for name in ("nvidia-smi", "ncu", "compute-sanitizer")}
    return {name: path or "not installed" for name, path in (*found.items(), ("C compiler", compiler))}


def environment(out: Path) -> dict[str, str]:
    """Return the variables of the steps' processes."""
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [found.get("PYTHONPATH", "")])])
    found.setdefault("CUTE_SSM_CACHE_DIR", str(out / "kernels"))
    threads = max(1, (os.cpu_count() or 1) // 4)  # of the reference, beside as many processes of tests
    # of the plugins of pytest, those that the command names: others may be of any age, and one that breaks ends it
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return found | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads), **alone}


def step(argv: list[str]) -> int:
    """Run one step of items in this process."""
    parser = argparse.ArgumentParser(prog="gpu_check.py step")
    parser.add_argument("step", choices=ITEM_STEPS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--name", default="", help="of the file of items, if not that of the step; or an operator")
    parser.add_argument("--emulated", type=Path, help="file of the emulator's results")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    name = options.name if options.step == "sanitized" and options.name else options.step
    if options.step == "sanitized":  # an access beyond a tensor must not fall into a neighbour's memory
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    recorder = records.Records(options.out, name, options.seconds)  # its clock runs while CUDA is opened
    try:
        found = items_of(options)
    except Exception as error:
        records.fail(options.out, name, "preparation", f"{type(error).__name__}: {error}", traceback.format_exc())
        raise
    if options.step in ("sanitized", "one") and not records.device_is_alive():
        print(f"{name}: the tool around this process refuses the device", file=sys.stderr)
        return records.FAILED
    return recorder.run(found)


def items_of(options: argparse.Namespace) -> list[records.Item]:
    """Return the items of a step."""
    from gpu_pass import arithmetic, checks, emulated, times, tuning

    if options.step in ("times", "times-more"):
        return times.items(options.out, options.step == "times", options.rehearse)
    if options.step == "arithmetic":
        return arithmetic.items(1 << 7 if options.rehearse else 1 << 20, options.out)
    if options.step == "tuning":
        return tuning.items(options.out, options.rehearse, options.seconds)
    if options.step == "emulated":
        return emulated.items(options.emulated or plan.EMULATED)
    if options.step == "one":
        return [item for item in checks.sanitized() if item.name.startswith(options.name)]
    return {"smoke": checks.smoke, "launching": checks.launching, "sanitized": checks.sanitized}[options.step]()


def emulate(argv: list[str]) -> int:
    """Write the file of the emulator's results."""
    from gpu_pass import emulated

    from cute_ssm import arch as archs

    parser = argparse.ArgumentParser(prog="gpu_check.py emulate", description=emulated.__doc__.split("\n")[0])
    parser.add_argument("--arch", default="sm_90a", choices=sorted(archs.ARCHS))
    parser.add_argument("--sms", type=int, help="of the GPU (default: that of the target's reference board)")
    parser.add_argument("--out", type=Path, default=plan.EMULATED)
    parser.add_argument("--arithmetic", default="hardware", help="of the emulator (default: hardware)")
    options = parser.parse_args(argv)
    emulated.write(options.out, options.arch, options.sms or archs.by_name(options.arch).sm_count, options.arithmetic)
    print(f"{options.out}: {options.out.stat().st_size >> 10} KiB")
    return 0


def fit(argv: list[str]) -> int:
    """Take results in."""
    from gpu_pass import fit as taking

    return taking.main(argv)


if __name__ == "__main__":
    sys.exit(main())
