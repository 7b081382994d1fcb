"""Benchmarks: every declared call beside its peers on a GPU, or, without one, by the machine model.

    python tools/bench/run.py [--ops OP ...] [--models NAME ...] [--batches N ...] [--quick] [--minutes N]
    python tools/bench/run.py --model [--machines H200 B200]     # no GPU: modelled, and labelled so

One JSON line per call goes to ``--out`` (default: ``measured-DEVICE.jsonl`` or ``modelled.jsonl`` in the working
directory, which must not exist) as it is done; with ``--resume``, calls that the file holds for this commit are left
out.  ``report.py`` makes tables and plots of the lines.

A line: op, model, case, keys, batch; ``how``: "measured" or "modelled", and for the latter ``fitted`` and whether it
was replayed whole (``exact``); arch, device, clocks, versions, commit; ``us``: median, p10, p90 of a call; bytes that
it must move, ``gbs`` of them, ``of_copy``: share of the bandwidth of a large copy; ``peers``: for each ``us`` and
``ratio``, its time by ours, or why it is ``absent``; of measured ones, ``variants`` by circumstance
(`bench.circumstances`), here and for each peer.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import cases, triton_peers
from bench.cases import Case
from bench.circumstances import Clockwork, Effort
from bench.outputs import commit, destination

SAMPLES = {False: 40, True: 12}  # by --quick
GATE_REQUESTS = 2
COARSE = 2.0**-5  # of the largest value; larger errors are not rounding


def versions() -> dict[str, str]:
    """Versions of what a time depends on, and of the peers that are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("cute-ssm", "nvidia-cutlass-dsl", "triton", "flashinfer-python", "fla-core", "mamba-ssm"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


# --------------------------------------------------------------------------------------------------------- by the model
def modelled(case: Case, batch: int, gpu: str) -> dict[str, Any]:
    """Return the line of a call by the machine model."""
    from cute_ssm.runtime.companions import require
    from cute_ssm.tuner.modelled import time_op

    result, target = time_op(case.op, case.call(batch), gpu), require("gpumodel").machine_of(gpu).arch
    found, absent = triton_peers.modelled(case.op, case.call(batch), gpu)
    rivals: dict[str, Any] = {name: {"absent": reason} for name, reason in absent.items()}
    for name, own in found.items():
        rivals[name] = {
            "us": dict.fromkeys(("median", "p10", "p90"), round(own, 3)),
            "ratio": round(own / result.us, 3),
        }
    us = dict.fromkeys(("median", "p10", "p90"), round(result.us, 3))
    kernels = [
        {
            "grid": list(kernel.grid), "threads": kernel.block[0], "registers": kernel.registers,
            "shared_bytes": kernel.shared_bytes, "ctas_per_sm": kernel.resident_ctas,
            "bytes_in_flight": round(kernel.timing.bytes_in_flight()),
            "waits": waits_of(kernel),
        }
        for kernel in result.kernels
    ]  # fmt: skip
    return case.line(
        batch, how="modelled", fitted=result.fitted, exact=result.exact, device=gpu,
        arch=target, us=us, bytes=result.bytes, gbs=round(result.bytes / result.us / 1e3, 1),
        of_copy=round(result.of_roof, 4), copy_us=round(result.roof_us, 3), kernels=kernels, peers=rivals,
    )  # fmt: skip


def waits_of(kernel: Any) -> dict[str, float]:
    """Share of its warps' lives that each reason to wait takes, the largest ones."""
    total = sum(last - first for first, last in kernel.timing.lives.values())
    reasons: dict[str, float] = {}
    for (_, reason), clocks in kernel.timing.stalls.items():
        reasons[reason] = reasons.get(reason, 0.0) + clocks / total
    largest = sorted(reasons.items(), key=lambda item: -item[1])[:5]
    return {reason: round(share, 3) for reason, share in largest}


# ------------------------------------------------------------------------------------------------------------- measured
def gate(case: Case, device: torch.device) -> None:
    """Compare our results for a few requests with those of the reference.

    Raises
    ------
    CuteSsmError
        They differ by more than rounding explains.
    """
    from cute_ssm import workloads
    from cute_ssm.errors import CuteSsmError

    keys = case.call(min(GATE_REQUESTS, *case.batches))
    here, there = workloads.build(case.op, keys), workloads.build(case.op, keys)
    for name, value in there.arguments.items():
        if isinstance(value, torch.Tensor):
            there.arguments[name] = moved(value, device)
    here.run()
    there.run()
    for name, want in here.results().items():
        got = there.results()[name].cpu().float().nan_to_num()
        distance, largest = (got - want.float().nan_to_num()).abs().max().item(), want.float().nan_to_num().abs().max()
        if distance > COARSE * largest.item() + (not want.is_floating_point()):
            raise CuteSsmError(f"{case.op} {case.name}: {name} differs from the reference by {distance:.3g}")


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy of a tensor on a device with the same strides, also where these are zero."""
    stored = tensor.as_strided([n if s else 1 for n, s in zip(tensor.shape, tensor.stride())], tensor.stride())
    return stored.to(device).as_strided(tensor.shape, tensor.stride()) if 0 in tensor.stride() else tensor.to(device)


# ------------------------------------------------------------------------------------------------------------- the loop
def done_in(path: Path, now: str) -> set[tuple[str, str, str, int]]:
    """Calls that a file holds for this commit."""
    if not path.exists():
        return set()
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    return {(r["device"], r["op"], r["case"], r["batch"]) for r in lines if r["commit"] == now}


def plan(options: argparse.Namespace) -> Iterator[tuple[Case, int]]:
    """Yield the calls to make: all cases at one batch before the next one, so that a run cut short has all of them."""
    chosen = list(
        cases.declared(options.ops, options.models, options.batches or (cases.QUICK if options.quick else None))
    )
    for batch in sorted({batch for case in chosen for batch in case.batches}):
        for case in chosen:
            if batch in case.batches:
                yield case, batch


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, measure or model, write lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="store_true", help="no GPU: by the machine model")
    parser.add_argument("--machines", nargs="+", default=["H200", "B200"], help="of --model")
    parser.add_argument("--ops", nargs="+")
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--quick", action="store_true", help=f"batches {cases.QUICK}, fewer samples")
    parser.add_argument("--minutes", type=float, help="stop after the call that is under way then")
    parser.add_argument("--resume", action="store_true", help="leave out what the file holds for this commit")
    parser.add_argument(
        "--out", type=Path, help="file of lines, overwritten (default: a new one in the working directory)"
    )
    options = parser.parse_args(argv)
    if not options.model and not torch.cuda.is_available():
        parser.error("there is no GPU here: --model fills the same lines from the machine model")
    try:
        calls = list(plan(options))
        device = "" if options.model else torch.cuda.get_device_name().lower().replace(" ", "-")
        name = "modelled" if options.model else f"measured-{device}"
        path = destination(options.out, f"{name}.jsonl", options.resume)
    except ValueError as error:
        parser.error(str(error))
    bench = None
    if not options.model:
        bench = Clockwork(torch.device("cuda", torch.cuda.current_device()), Effort(samples=SAMPLES[options.quick]))
    path.parent.mkdir(parents=True, exist_ok=True)
    now, about, end = commit(), versions(), time.monotonic() + 60 * (options.minutes or 1e9)
    known = done_in(path, now) if options.resume else set()
    devices = options.machines if bench is None else [bench.about["device"]]
    gated: dict[tuple[str, str], str] = {}
    failures = 0
    with path.open("a" if options.resume else "w", encoding="utf-8") as file:
        for case, batch in calls:
            for device in devices:
                if time.monotonic() > end:
                    print(f"time is up; {path} has what was done", file=sys.stderr)
                    return 3
                if (device, case.op, case.name, batch) in known:
                    continue
                try:
                    line = one(bench, case, batch, device, gated)
                except Exception as error:  # one call that fails must not cost the others
                    failures += 1
                    print(f"{case.op} {case.name} batch {batch}: {type(error).__name__}: {error}", file=sys.stderr)
                    continue
                file.write(json.dumps({**line, "versions": about, "commit": now}) + "\n")
                file.flush()
                show(line)
    return 1 if failures else 0


def one(
    bench: Clockwork | None, case: Case, batch: int, device: str, gated: dict[tuple[str, str], str]
) -> dict[str, Any]:
    """Return the line of a call; a case whose gate has failed is not measured."""
    if bench is None:
        return modelled(case, batch, device)
    key = (case.op, case.name)
    if key not in gated:
        gated[key] = "the gate failed before"
        gate(case, bench.device)
        gated[key] = ""
    if gated[key]:
        raise RuntimeError(gated[key])
    return bench.line(case, batch)


def show(line: dict[str, Any]) -> None:
    """Print a line for people."""
    rivals = ", ".join(f"{name} {found['ratio']:.2f}x" for name, found in line["peers"].items() if "ratio" in found)
    share, us = f"{line['of_copy']:.0%} of a copy", line["us"]["median"]
    print(
        f"{line['how']:8} {line['device'][:12]:12} {line['op']:24} {line['case']:44} {line['batch']:5} "
        f"{us:9.2f} us {share} {rivals}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
