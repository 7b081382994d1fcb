"""A plugin of pytest: notes which kernels tests run on a GPU, without compiling or running one.

    python -m gpushim --devices sm_90a:132 pytest --gpu -p gpu_pass.pytest_kernels --kernels-out FILE tests/ops

The reference computes what a kernel would have, so that tests go on to their next call.  One that looks at what only a
kernel has fails, which matters to nobody: what it ran before is noted.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cute_ssm import arch as archs
from cute_ssm import runtime
from cute_ssm.ops._calls import CallPath, Checked
from cute_ssm.runtime import registry
from cute_ssm.workloads import plan

SMALL = 1 << 16  # elements of a call on a device: for more, the reference would take seconds


class Noted(dict[plan.Kernel, None]):
    """The kernels of the tests' calls, in order; those of classes that tests define are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: set[Any] = set()  # specs whose results a test on a device has had, enough to reach its next one

    def note(self, *kernel: Any) -> None:
        """Add a kernel."""
        if registry.kernel_path(kernel[0]).startswith("cute_ssm."):
            self[kernel] = None

    def run(self, _: CallPath, __: Any, call: Checked) -> None:
        """Take the place of `CallPath.run`."""
        device, session = call.operands[0].device, runtime.emulator()
        if device.type == "cuda":
            if call.units:
                arch = runtime.target(device)
                sm_count = torch.cuda.get_device_properties(device).multi_processor_count
                self.note(call.spec, call.choose(arch, sm_count), arch)
            small = sum(one.numel() for one in call.operands if isinstance(one, torch.Tensor)) < SMALL
            if small and call.spec not in self.computed and not torch.cuda.is_current_stream_capturing():
                self.computed.add(call.spec)
                with contextlib.suppress(RuntimeError), torch.no_grad(), torch.device(device):
                    call.reference()  # written for CPU tensors, and made for others as far as may be
            return
        if call.units and session is not None:
            arch = archs.by_name(session.arch)
            config = call.choose(arch, session.sm_count)
            self.note(call.spec, config, arch)
            session.launches += [None] * config.launches  # which tests count
        with torch.no_grad():
            call.check_contents()
            call.reference()

    def kernel(self, _: Any, spec: Any, config: Any, arch: Any) -> Any:
        """Take the place of `hardware.Session.kernel`, which tests of kernels ask directly."""
        self.note(spec, config, arch)
        return lambda *_: None


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the option."""
    parser.addoption("--kernels-out", metavar="FILE", required=True, help="write specs of the kernels there")


def pytest_configure(config: pytest.Config) -> None:
    """Take the place of what runs kernels, in a process that does nothing else."""
    import hardware
    import shim

    noted = config.stash[NOTED] = Noted()
    CallPath.run = lambda *call: noted.run(*call)  # type: ignore[method-assign]
    hardware.Session.kernel = lambda *call: noted.kernel(*call)  # type: ignore[method-assign]
    shim.active = lambda: False  # tests take the sizes that they take on a GPU


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compute each result anew."""
    item.config.stash[NOTED].computed.clear()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the file."""
    entries = [plan.as_entry(*kernel) for kernel in session.config.stash[NOTED]]
    Path(session.config.getoption("--kernels-out")).write_text(json.dumps(entries, indent=1) + "\n")


NOTED = pytest.StashKey[Noted]()
