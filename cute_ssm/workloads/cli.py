"""``python -m cute_ssm warmup``: compile the kernels of declared calls before they are needed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cute_ssm import arch as archs
from cute_ssm.errors import UnsupportedArchError, describe

if TYPE_CHECKING:
    from pathlib import Path

    from cute_ssm.arch import Arch
    from cute_ssm.workloads.plan import Kernel


def add_arguments(parser: argparse.ArgumentParser, targets: str = "CUTE_SSM_ARCH, else that of the GPU") -> None:
    """Declare the options, which tools/build_aot.py shares; ``targets`` describes the default of ``--arch``."""
    parser.add_argument(
        "--specs", default="all", metavar="FILE|MODEL", help="file of specs, name of a model, or all (default: all)"
    )
    parser.add_argument(
        "--arch", action="append", choices=tuple(archs.ARCHS), help=f"target; repeatable (default: {targets})"
    )
    parser.add_argument("--batches", metavar="N,N,...", help="batch sizes (default: those declared for the operator)")
    parser.add_argument("--jobs", type=int, metavar="N", help="compiling processes (default: one per core)")


def main(options: argparse.Namespace) -> int:
    """Compile into the cache on disk; 1 if a kernel does not compile."""
    return build(options, targets(options.arch), None)


def build(options: argparse.Namespace, targets: Sequence[Arch], bundle: Path | None) -> int:
    """Compile what the options declare into the cache, or into a bundle; return an exit code."""
    from cute_ssm.workloads import plan

    if options.jobs is not None and options.jobs < 1:
        raise ValueError(describe("--jobs", "a positive number", options.jobs))
    kernels = plan.read(options.specs, targets, numbers("--batches", options.batches), sm_count(targets))
    return compile_and_report(kernels, options.jobs, bundle)


def compile_and_report(kernels: Sequence[Kernel], jobs: int | None, bundle: Path | None) -> int:
    """Compile with a progress bar, and say what became of the kernels."""
    from cute_ssm import env
    from cute_ssm.runtime import pool
    from cute_ssm.workloads.progress import Progress

    counts, failed = [0, 0], []
    progress = Progress(len(kernels))
    for outcome in pool.compile_all(kernels, jobs, bundle):
        progress.step(outcome.kernel[0].text())
        if outcome.error:
            failed.append(outcome)
        else:
            counts[outcome.compiled] += 1
    progress.close()
    for outcome in failed:
        print(f"FAILED: {outcome.error}", file=sys.stderr)
    where = env.settings().cache_dir if bundle is None else bundle
    print(f"{where}: {len(kernels)} kernels, {counts[1]} compiled, {counts[0]} there before, {len(failed)} failed")
    return int(bool(failed))


def targets(names: Sequence[str] | None) -> list[Arch]:
    """Return the targets of these names, by default that of the GPU or of CUTE_SSM_ARCH.

    Raises
    ------
    ValueError
        If none is named and there is no GPU.
    """
    from cute_ssm import runtime

    if names:
        return [archs.by_name(name) for name in dict.fromkeys(names)]
    try:
        return [runtime.target()]
    except UnsupportedArchError:
        fix = "name one: there is no GPU to ask"
        raise ValueError(describe("--arch", f"one of {', '.join(archs.ARCHS)}", "none", fix)) from None


def sm_count(targets: Sequence[Arch]) -> int | None:
    """Return the number of SMs of this machine's GPU if the only target is its own; else None."""
    import torch

    if len(targets) != 1 or not torch.cuda.is_available():
        return None
    try:
        own = archs.of_device(torch.device("cuda"))
    except UnsupportedArchError:
        return None
    return torch.cuda.get_device_properties(0).multi_processor_count if own == targets[0] else None


def numbers(name: str, text: str | None) -> list[int] | None:
    """Return the positive integers of an option, or None if it is not given."""
    if text is None:
        return None
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ValueError(describe(name, "positive numbers separated by commas", repr(text)))
    return found
