"""The tests that run kernels in the emulator, on the GPU instead: ``pytest --gpu``.

What such a test opens by ``ptxsim.emulate(...)`` is then a `Session` here.  Inside it an operator validates and chooses
as ever, and its kernel, compiled for this GPU, gets copies on the GPU of the whole memory behind every argument, gaps
included, which come back when it has run.  Options that only an emulator has are ignored; a test of another target, and
one that asks a session for what only an emulator knows, is skipped.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ptxsim
from cute_ssm import arch as archs
from cute_ssm import runtime
from cute_ssm.runtime import emulation, registry

_open = threading.local()  # .sessions: those that this thread has open


class Known:
    """Something of which only an emulator knows more."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        pytest.skip(f"only the emulator knows {name!r}")


class Session(Known):
    """Stands for a session of the emulator."""

    def __init__(self, arch: str, sm_count: int | None):
        self.arch, self.sm_count = arch, sm_count
        self.launches: list[Known] = []


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the GPU in the emulator's place until the patch is undone."""
    for module in (runtime, emulation):
        monkeypatch.setattr(module, "emulator", emulator)
        monkeypatch.setattr(module, "emulated", emulated)
    monkeypatch.setattr(ptxsim, "emulate", emulate)


_real_emulator, _real_emulated = emulation.emulator, emulation.emulated


@contextlib.contextmanager
def emulate(arch: str | None = None, sm_count: int | None = None, **_: Any) -> Iterator[Session]:
    """Open a session on the GPU, with the signature of ``ptxsim.emulate``."""
    own = archs.of_device(torch.device("cuda")).name
    if arch not in (None, own):
        pytest.skip(f"the GPU is {own}, the test for {arch}")
    sessions = _open.__dict__.setdefault("sessions", [])
    own_count = torch.cuda.get_device_properties(0).multi_processor_count
    sessions.append(Session(own, sm_count or own_count))
    try:
        yield sessions[-1]
    finally:
        sessions.pop()


def emulator() -> Any | None:
    """Return this thread's session, or what the runtime knows otherwise."""
    sessions = _open.__dict__.get("sessions")
    return sessions[-1] if sessions else _real_emulator()


def emulated(spec: Any, config: Any = None, arch: Any = None) -> Any:
    """Return the kernel for CPU tensors, run on the GPU inside a session; else what the runtime returns."""
    sessions = _open.__dict__.get("sessions")
    if not sessions or isinstance(_real_emulator(), emulation.Plan):
        return _real_emulated(spec, config, arch)
    arch = arch or archs.by_name(sessions[-1].arch)
    chosen = config if config is not None else registry.default_config(spec, arch)
    function = runtime.get(spec, chosen, arch)

    def run(*arguments: Any) -> None:
        sessions[-1].launches += [Known() for _ in range(chosen.launches)]
        round_trip(function, arguments, torch.device("cuda"))

    return run


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
