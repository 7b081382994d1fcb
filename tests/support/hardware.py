"""Kernels of CPU tensors on the GPU, for ``pytest --gpu``: see `kernel_backends`.

Inside `session` an operator validates and chooses as in the emulator, and its kernel, compiled for this GPU, gets
copies on the GPU of the whole memory behind every argument, gaps included, which come back when it has run.  A test of
another target, and one that asks a session for what only an emulator knows, is skipped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cute_ssm import arch as archs
from cute_ssm import runtime
from cute_ssm.errors import NotInBundleError
from cute_ssm.runtime import emulation


class Known:
    """Something of which only an emulator knows more."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        pytest.skip(f"only the emulator knows {name!r}")


class Session(Known):
    """Stands for a session of the emulator."""

    def __init__(self, arch: str, sm_count: int):
        self.arch, self.sm_count = arch, sm_count
        self.launches: list[Known] = []

    def kernel(self, spec: Any, config: Any, arch: Any) -> Callable[..., None]:
        """Return a kernel that takes CPU tensors and runs on the GPU."""
        try:
            function = runtime.get(spec, config, arch)
        except NotInBundleError:
            pytest.skip(f"no compiler here, and not in the bundle: {spec.text()}")

        def run(*arguments: Any) -> None:
            self.launches += [Known() for _ in range(config.launches)]
            round_trip(function, arguments, torch.device("cuda"))

        return run


@contextlib.contextmanager
def session(arch: str, sm_count: int | None = None) -> Iterator[Session]:
    """Run kernels of CPU tensors on the GPU; skip the test if that is another target."""
    own = archs.of_device(torch.device("cuda")).name
    if arch != own:
        pytest.skip(f"the GPU is {own}, the test for {arch}")
    own_count = torch.cuda.get_device_properties(0).multi_processor_count
    with emulation.opened(Session(own, sm_count or own_count)) as found:
        yield found


def round_trip(function: Any, arguments: tuple[Any, ...], device: torch.device) -> None:
    """Call a function with copies of CPU tensors, memory and all, on a device, and copy that memory back."""
    memories: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def there(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        memory = value.untyped_storage()
        if memory.data_ptr() not in memories:
            copy = torch.empty(memory.nbytes(), dtype=torch.uint8, device=device).untyped_storage()
            memories[memory.data_ptr()] = memory, copy.copy_(memory)
        twin = torch.empty(0, dtype=value.dtype, device=device)
        return twin.set_(memories[memory.data_ptr()][1], value.storage_offset(), value.shape, value.stride())

    function(*map(there, arguments))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for memory, copy in memories.values():
        memory.copy_(copy)
