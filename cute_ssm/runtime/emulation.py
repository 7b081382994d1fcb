"""Kernels for the emulator `ptxsim`, and calls that are only planned (`planned`).

This package never imports ptxsim itself: kernels run there only inside a session that the user has opened.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cute_ssm import arch as archs
from cute_ssm.env import logger, settings
from cute_ssm.runtime import compiler, lookup, registry
from cute_ssm.runtime.store import EMULATED, Key, Store

if TYPE_CHECKING:
    from cute_ssm.arch import Arch
    from cute_ssm.spec import Config, Spec

_memory: dict[tuple[Spec, Config | None, str], Any] = {}
_local = threading.local()  # .plan and .session: what this thread has open, by `planned` and `opened`


@dataclass
class Plan:
    """Takes the place of an emulator session while calls are planned.

    Attributes
    ----------
    arch : str
        Name of the target.
    sm_count : int or None
        Of the GPU; None: that of the target's reference board.
    kernels : list
        (spec, config, target) of every requested kernel, in order.
    """

    arch: str
    sm_count: int | None = None
    kernels: list[tuple[Spec, Config, Arch]] = field(default_factory=list)


@contextmanager
def planned(arch: Arch, sm_count: int | None = None) -> Iterator[Plan]:
    """Make operators on CPU tensors validate their arguments and select kernels, without running anything.

    Nothing is compiled or written.  Applies to the current thread.
    """
    before = _local.__dict__.get("plan")
    _local.plan = Plan(arch.name, sm_count)
    try:
        yield _local.plan
    finally:
        _local.plan = before


@contextmanager
def opened(session: Any) -> Iterator[Any]:
    """Make operators on CPU tensors run their kernels through `session`, as inside ``ptxsim.emulate()``.

    The tests use it to run on a GPU what runs in the emulator otherwise.  Applies to the current thread.

    Parameters
    ----------
    session : object
        `arch` and `sm_count` as of a session of the emulator; ``kernel(spec, config, arch)`` returns a kernel that
        takes CPU tensors.
    """
    before = _local.__dict__.get("session")
    _local.session = session
    try:
        yield session
    finally:
        _local.session = before


def emulator() -> Any | None:
    """Return the open `Plan` or session of this thread, or None."""
    for name in ("plan", "session"):
        found = _local.__dict__.get(name)
        if found is not None:
            return found
    module = sys.modules.get("ptxsim")
    return module.current() if module is not None else None


def emulated(spec: Spec, config: Config | None = None, arch: Arch | None = None) -> Any:
    """Return the kernel of a spec for CPU tensors inside ``ptxsim.emulate()``, as `get` does for CUDA tensors.

    Kernels are cached in memory and on disk, so that other processes need not compile them.

    Parameters
    ----------
    spec, config
        As for `get`.
    arch : Arch, optional
        Compile target.  Default: that of the open session, else as for `get`.

    Returns
    -------
    object
        A ``ptxsim.CompiledKernel``, called like the function of `get`; it also has the PTX and register counts.
    """
    if arch is None:
        session = emulator()
        arch = lookup.target() if session is None else archs.by_name(session.arch)
    plan = _local.__dict__.get("plan")
    if plan is not None:
        plan.kernels.append((spec, config if config is not None else registry.default_config(spec, arch), arch))
        return _nothing
    session = _local.__dict__.get("session")
    if session is not None:
        return session.kernel(spec, config if config is not None else registry.default_config(spec, arch), arch)
    kernel = _memory.get((spec, config, arch.name))
    if kernel is not None:
        return kernel
    spec.check()
    with compiler.LOCK:
        chosen = config if config is not None else registry.default_config(spec, arch)
        kernel = _memory.get((spec, chosen, arch.name))
        if kernel is None:
            kernel = _memory[spec, chosen, arch.name] = _find(Key(spec, chosen, arch))
        _memory[spec, config, arch.name] = kernel
    return kernel


def forget() -> None:
    """Clear the kernels in memory, not those on disk."""
    with compiler.LOCK:
        lookup.forget()
        _memory.clear()


def _nothing(*_: Any) -> None:
    """The kernel of a plan, which does nothing."""


class _Logged:
    """A kernel that logs its calls."""

    def __init__(self, key: Key, kernel: Any):
        self._key, self._kernel = key, kernel

    def __call__(self, *arguments: Any) -> Any:
        lookup.log_call(f"emulator {self._key.arch.name}", self._key.name, arguments)
        return self._kernel(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


def _find(key: Key) -> Any:
    ptxsim = import_module("ptxsim")

    def make() -> lookup.Compiled:
        start = time.perf_counter()
        with compiler.refusal(key.spec, key.config, key.arch):
            kernel = registry.kernel_class(key.spec)(key.spec, key.config, key.arch)
            early = getattr(kernel, "reads_before_wait", ())
            compiled = ptxsim.compile(kernel, *kernel.fakes(), arch=key.arch.name, reads_before_wait=early)
        seconds = time.perf_counter() - start
        logger().info("compiled %s for the emulator of %s in %.2f s", key.name, key.arch.name, seconds)
        return lookup.Compiled(compiled, compiled.dump(), seconds)

    folder = settings().cache_dir
    if folder is None:
        kernel = make().kernel
    else:
        kind = lookup.Kind(f".{ptxsim.image_format()}{EMULATED}", ptxsim.restore, make)
        kernel = lookup.load_or_compile(Store(folder), key, kind)
    return _Logged(key, kernel) if settings().log == "calls" else kernel
