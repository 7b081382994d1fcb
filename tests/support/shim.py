"""GPUs that are not there: ``pytest --shim sm_90a,sm_100a``, or ``python -m gpushim pytest``.

Tests that need a GPU then run as on one, with kernels in the emulator: see tools/gpushim.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator

import pytest
import torch

from cute_ssm import arch as archs
from cute_ssm import runtime, workloads
from cute_ssm.ops import operators
from cute_ssm.workloads.maker import moved


def active() -> bool:
    """Whether the GPUs of this process are those of gpushim."""
    return "gpushim" in sys.modules and sys.modules["gpushim"].installed()


def install(config: pytest.Config) -> None:
    """Give this process the GPUs that were asked for, and a cache of kernels of its own."""
    import gpushim

    if gpushim.installed():
        raise pytest.UsageError("--shim: this process has GPUs of gpushim already")
    folder = config.cache.mkdir("gpushim")
    os.environ["CUTE_SSM_CACHE_DIR"] = str(folder / "kernels")  # objects whose PTX is known
    targets = [archs.by_name(name) for name in config.getoption("--shim").split(",")]
    gpushim.install([gpushim.Device(target.name, target.sm_count) for target in targets], folder)


def mark(items: Iterable[pytest.Item]) -> None:
    """Skip tests that time a GPU, and mark `slow` what the emulator takes minutes for, where GPUs are of gpushim."""
    for item in items if active() else ():
        if "timed" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="times a GPU"))
        if "long" in item.keywords:
            item.add_marker("slow")


def fewer(on_gpu: int, here: int) -> int:
    """Return how often a test repeats something: on a GPU, or on one of gpushim, where a launch may take a second."""
    return here if active() else on_gpu


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Fail if the driver notes a problem, unless the test clears it."""
    import gpushim

    driver = gpushim.driver()
    driver.device = 0
    driver.clear()
    yield
    faults, problems = list(driver.faults), list(driver.problems)
    driver.clear()
    if faults:
        raise faults[0]
    if problems:
        pytest.fail("\n".join(problems))


def forget() -> None:
    """Let the next call of every operator be a first one: forget kernels, and the plans that hold them."""
    runtime.forget()
    for one in operators():
        path = one.module("operator")._path
        path.plans.clear()
        path.loose_plans.clear()


def on_device(call: workloads.Call, device: int = 0) -> workloads.Call:
    """Return a call whose tensors have been moved to a GPU."""
    call.arguments = {
        name: moved(value, f"cuda:{device}") if isinstance(value, torch.Tensor) else value
        for name, value in call.arguments.items()
    }
    return call


def tensors(call: workloads.Call) -> dict[str, torch.Tensor]:
    """Return the arguments of a call that are tensors."""
    return {name: value for name, value in call.arguments.items() if isinstance(value, torch.Tensor)}
