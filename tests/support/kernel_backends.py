"""The ways that a call on CPU tensors runs: the reference, and the kernel in the emulator or, by ``--gpu``, on the GPU.

Tests take the fixture `backend`::

    def test_kernel(case, backend):
        with backend("sm_100a"):
            verify(case)

    @both
    def test_reference_and_kernel(case, backend): ...

With ``pytest --arithmetic hardware`` approximate functions err in the emulator as the hardware's documents allow.

What needs an emulator, since only that counts or finds races, opens ``ptxsim.emulate`` itself.
"""

from __future__ import annotations

import contextlib
from typing import Any

import hardware
import pytest

gpu = False  # by conftest: the tests were started with --gpu
arithmetic: Any = "exact"  # by conftest: that of --arithmetic


def kernel(arch: str = "sm_90a", checks: bool = True, **options: Any) -> contextlib.AbstractContextManager[Any]:
    """Run kernels in the emulator, or on the GPU.

    Parameters
    ----------
    arch : str
        Target; on a GPU that is another, the test is skipped.
    checks : bool
        Whether the emulator looks for races and for reads of what was never written.
    **options
        Of ``ptxsim.emulate``, such as `sm_count`, `schedule` and `async_mode`.  A GPU takes `sm_count` alone.
        `arithmetic` is that of the command line.
    """
    if gpu:
        return hardware.session(arch, options.get("sm_count"))
    options = {"racecheck": checks, "initcheck": checks, "arithmetic": arithmetic, **options}
    return pytest.importorskip("ptxsim").emulate(arch=arch, **options)


def reference(arch: str = "sm_90a", checks: bool = True, **options: Any) -> contextlib.AbstractContextManager[Any]:
    """Run the reference, whatever the options are."""
    return contextlib.nullcontext()


def runs_a_kernel(item: pytest.Item) -> bool:
    """Whether `arithmetic` matters to a test: it takes the fixture `backend`, of kernels, or is marked ``accuracy``."""
    if "accuracy" in item.keywords:
        return True
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return "backend" in item.fixturenames and parameters.get("backend") != "reference"


BACKENDS = {"reference": reference, "kernel": kernel}
both = pytest.mark.parametrize("backend", list(BACKENDS), indirect=True)
