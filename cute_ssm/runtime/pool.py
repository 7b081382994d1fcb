"""Compile many kernels in several processes, because the compiler runs one compile per process at a time."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cute_ssm.errors import CuteSsmError
from cute_ssm.runtime import registry

if TYPE_CHECKING:
    from cute_ssm.arch import Arch
    from cute_ssm.spec import Config, Spec


@dataclass(frozen=True)
class Outcome:
    """The result for one kernel: compiled, already present (not `compiled`), or the error."""

    kernel: tuple[Spec, Config, Arch]
    compiled: bool
    error: str = ""


def executor(jobs: int) -> Executor:
    """Return a pool of spawned processes, which share only the import path with this one."""
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def compile_all(
    kernels: Sequence[tuple[Spec, Config, Arch]], jobs: int | None = None, bundle: Path | None = None
) -> Iterator[Outcome]:
    """Compile kernels into the cache or a bundle, and yield the outcome of each as it completes.

    Parameters
    ----------
    kernels : sequence of (Spec, Config, Arch)
    jobs : int, optional
        Number of processes.  Default: one per core.  1: compile in this process.
    bundle : Path, optional
        Folder of shared libraries instead of the cache.
    """
    jobs = min(jobs or os.cpu_count() or 1, max(1, len(kernels)))
    named = [(kernel, registry.kernel_path(kernel[0])) for kernel in kernels]
    if jobs == 1:
        yield from (_one(kernel, path, bundle) for kernel, path in named)
        return
    with executor(jobs) as pool:
        futures = [pool.submit(_one, kernel, path, bundle) for kernel, path in named]
        yield from (future.result() for future in as_completed(futures))


def _one(kernel: tuple[Spec, Config, Arch], path: str, bundle: Path | None) -> Outcome:
    from cute_ssm.runtime import lookup

    registry.register(type(kernel[0]), path)  # classes outside of this package are unknown to a new process
    try:
        if bundle is None:
            return Outcome(kernel, lookup.prepare(*kernel))
        if lookup.in_bundle(bundle, *kernel):
            return Outcome(kernel, False)
        lookup.bundle_to(bundle, *kernel)
        return Outcome(kernel, True)
    except CuteSsmError as error:
        return Outcome(kernel, False, str(error))
