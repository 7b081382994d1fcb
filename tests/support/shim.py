"""GPUs that are not there: ``pytest --shim sm_90a,sm_100a``, in a process of its own.

Tests that need a GPU then run as on one, with kernels in the emulator: see tools/gpushim.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

from cute_ssm import arch as archs
from cute_ssm import workloads
from cute_ssm.workloads.maker import moved


def install(config: pytest.Config) -> None:
    """Give this process the GPUs that were asked for, and a cache of kernels of its own."""
    import gpushim

    folder = config.cache.mkdir("gpushim")
    os.environ["CUTE_SSM_CACHE_DIR"] = str(folder / "kernels")  # objects whose PTX is known
    targets = [archs.by_name(name) for name in config.getoption("--shim").split(",")]
    gpushim.install([gpushim.Device(target.name, target.sm_count) for target in targets], folder)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Fail if the driver notes a problem, unless the test clears it."""
    import gpushim

    driver = gpushim.driver()
    driver.device = 0
    for notes in (driver.launches, driver.refusals, driver.problems, driver.faults):
        notes.clear()
    yield
    if driver.faults:
        raise driver.faults[0]
    if driver.problems:
        pytest.fail("\n".join(driver.problems))


def on_device(call: workloads.Call, device: int = 0) -> workloads.Call:
    """Return a call whose tensors have been moved to a GPU."""
    call.arguments = {
        name: moved(value, f"cuda:{device}") if isinstance(value, torch.Tensor) else value
        for name, value in call.arguments.items()
    }
    return call
