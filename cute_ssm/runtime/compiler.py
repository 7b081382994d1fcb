"""Compile a spec, config and target to object code, and load object code as a callable."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from cute_ssm.errors import CompileError, CuteSsmError
from cute_ssm.runtime import registry, toolchain

if TYPE_CHECKING:
    from cute_ssm.arch import Arch
    from cute_ssm.spec import Config, Spec

Function = Callable[..., Any]


# The compiler is not thread-safe.  Every compile holds this lock, the emulator's included.
LOCK = threading.RLock()


def compile_kernel(spec: Spec, config: Config, arch: Arch) -> Any:
    """Compile a kernel.  The caller holds `LOCK`.

    Returns
    -------
    object
        The compiler's result.  Without a GPU of this target it can be exported, but not called.

    Raises
    ------
    CompileError
        If compilation fails; the message contains spec, config, target and the compiler's error.
    """
    toolchain.check()
    with refusal(spec, config, arch):
        import cutlass.cute as cute

        kernel = registry.kernel_class(spec)(spec, config, arch)
        return cute.compile(kernel, *kernel.fakes(), options=toolchain.OPTIONS.format(arch=arch.name))


@contextlib.contextmanager
def refusal(spec: Spec, config: Config, arch: Arch) -> Iterator[None]:
    """Convert errors of tracing and compiling to `CompileError`; this package's own errors pass unchanged."""
    try:
        yield
    except CuteSsmError:
        raise
    except Exception as error:
        words = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
        raise CompileError(
            f"compiling {registry.kernel_path(spec)} for {arch.name} failed\n"
            f"spec:   {spec}\nconfig: {config}\n{type(error).__name__}: {words}"
        ) from error


def export(compiled: Any, name: str) -> bytes:
    """Return a compiled kernel as an object file with a function `name`."""
    with _scratch(b"") as path:
        compiled.export_to_c(path, function_name=name)
        with open(path, "rb") as file:
            return file.read()


def load(data: bytes, name: str) -> Function:
    """Return the function `name` of an object file, a raw ``tvm_ffi.Function`` that keeps the code alive.

    Newly compiled kernels are loaded here too: the compiler's own result cannot be called without a GPU of its target,
    and is slower to call with one.
    """
    from cutlass.cute.runtime import load_module

    with _scratch(data) as path:
        function: Function = load_module(path, enable_tvm_ffi=True)[name]
    return function


@contextlib.contextmanager
def _scratch(data: bytes) -> Iterator[str]:
    """Yield the path of a file with these contents, in memory if possible, so that a full disk does not matter."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("cute_ssm")
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            yield f"/proc/self/fd/{descriptor}"
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "kernel.o")
            with open(path, "wb") as file:
                file.write(data)
            yield path
