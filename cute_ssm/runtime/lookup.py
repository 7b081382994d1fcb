"""`get`: the callable of a spec, from memory, a bundle, the disk cache or the compiler, in this order.

The compiler is imported only if no bundle has a library of the kernel.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cute_ssm import arch as archs
from cute_ssm.env import logger, settings
from cute_ssm.errors import CuteSsmError, NotInBundleError, UnsupportedArchError, describe
from cute_ssm.runtime import bundles, compiler, registry, toolchain
from cute_ssm.runtime.compiler import Function
from cute_ssm.runtime.store import BadObjectError, Key, Store

if TYPE_CHECKING:
    import torch

    from cute_ssm.arch import Arch
    from cute_ssm.spec import Config, Spec

LOADING = threading.Lock()  # of launches that may load the kernel's library
_memory: dict[tuple[Spec, Config | None, str], Function] = {}
_targets: dict[torch.device | None, Arch] = {}
_logged_specs: set[Spec] = set()  # specs whose run by the reference has been logged


def get(spec: Spec, config: Config | None = None, arch: Arch | None = None) -> Function:
    """Return the function that runs a kernel on CUDA tensors and torch's current stream.

    Parameters
    ----------
    spec : Spec
        What the kernel computes.
    config : Config, optional
        How it computes it.  Default: the choice of the kernel class.
    arch : Arch, optional
        Compile target.  Default: CUTE_SSM_ARCH, else that of the current CUDA device.

    Returns
    -------
    callable
        A raw ``tvm_ffi.Function`` with the arguments of the kernel's ``__call__``, without the stream.

    Raises
    ------
    UnsupportedSpecError, UnsupportedArchError, CompileError
        Nothing has been stored.  Where there is no compiler, it is a `NotInBundleError`.
    """
    if arch is None:
        arch = target()
    function = _memory.get((spec, config, arch.name))
    return function if function is not None else _miss(spec, config, arch)


def target(device: torch.device | None = None) -> Arch:
    """Return CUTE_SSM_ARCH if set, else the compile target of a CUDA device, by default the current one."""
    known = _targets.get(device)
    if known is None:
        known = settings().arch or _own_target(device)
        if device is not None and device.index is not None:
            _targets[device] = known
    return known


def compile_to(folder: str | Path, spec: Spec, config: Config | None = None, arch: Arch | None = None) -> Path:
    """Compile a kernel to an object in a bundle for CUTE_SSM_AOT_DIR; return the object's path.

    Raises
    ------
    CuteSsmError
        If the folder cannot be written.
    """
    return _store_in(folder, spec, config, arch, ".o", lambda data: data)


def bundle_to(folder: str | Path, spec: Spec, config: Config | None = None, arch: Arch | None = None) -> Path:
    """Compile a kernel to a shared library in a bundle, which needs no compiler; return the library's path.

    Raises
    ------
    CuteSsmError
        If the folder cannot be written, or there is no linker.
    """
    return _store_in(folder, spec, config, arch, ".so", bundles.link)


def in_bundle(folder: str | Path, spec: Spec, config: Config, arch: Arch) -> bool:
    """Return whether this tool-chain has put an intact library of a kernel into a bundle."""
    try:
        return Store(Path(folder).absolute()).read(Key(spec, config, arch), ".so") is not None
    except BadObjectError:
        return False


def _store_in(
    folder: str | Path,
    spec: Spec,
    config: Config | None,
    arch: Arch | None,
    suffix: str,
    convert: Callable[[bytes], bytes],
) -> Path:
    """Compile a kernel, and store what `convert` makes of its object; return the path."""
    arch = arch or target()
    spec.check()
    store = Store(Path(folder).absolute())
    with compiler.LOCK:
        key = Key(spec, config or registry.default_config(spec, arch), arch)
        with store.lock(key) as held:
            data, seconds = _compile(key)
            if not (held and store.write(key, convert(data), seconds, suffix)):
                raise CuteSsmError(
                    describe("folder", "a folder that can be written", repr(str(folder)), "see the warning above")
                )
    return store.path(key, suffix)


def prepare(spec: Spec, config: Config, arch: Arch) -> bool:
    """Ensure that a kernel is in the disk cache; return whether it had to be compiled.

    Raises
    ------
    CuteSsmError
        If the disk cache is off, or cannot be written.
    """
    spec.check()
    toolchain.check()
    folder = settings().cache_dir
    if folder is None:
        raise CuteSsmError(describe("CUTE_SSM_CACHE", "1", "0", "preparing kernels needs the disk cache"))
    with compiler.LOCK:
        store, key = Store(folder), Key(spec, config, arch)
        if _readable(store, key):
            return False
        with store.lock(key) as held:
            try:
                if held and store.read(key) is not None:
                    return False
            except BadObjectError as error:
                store.quarantine(key, error)
            data, seconds = _compile(key)
            if not (held and store.write(key, data, seconds)):
                raise CuteSsmError(describe("CUTE_SSM_CACHE_DIR", "a folder that can be written", repr(str(folder))))
    return True


def _readable(store: Store, key: Key) -> bool:
    try:
        return store.read(key) is not None
    except BadObjectError:
        return False


def forget() -> None:
    """Clear the kernels in memory."""
    with compiler.LOCK:
        _memory.clear()
        _targets.clear()
        _logged_specs.clear()


def _own_target(device: torch.device | None) -> Arch:
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedArchError(
            describe(
                "arch", "a target or a CUDA device", "neither", "pass arch=cute_ssm.arch.SM_90A or set CUTE_SSM_ARCH"
            )
        )
    return archs.of_device(torch.device("cuda") if device is None else device)


def _miss(spec: Spec, config: Config | None, arch: Arch) -> Function:
    spec.check()
    with compiler.LOCK:
        chosen = config if config is not None else registry.default_config(spec, arch)
        function = _memory.get((spec, chosen, arch.name))
        if function is None:
            key = Key(spec, chosen, arch)
            _refuse_capture(key)
            function = _logged(key, bundles.find(key) or _find(key))
            _memory[spec, chosen, arch.name] = function
        _memory[spec, config, arch.name] = function
    return function


def _refuse_capture(key: Key) -> None:
    """Raise `CuteSsmError` if the current stream is being captured: CUDA loads no kernels then."""
    import torch

    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
        raise CuteSsmError(
            describe(
                "CUDA graph",
                "a capture of calls whose kernels are loaded",
                f"a first call, whose kernel {key.name} must be loaded",
                "make each call once before the capture: docs/guides/cuda-graphs.md",
            )
        )


def _find(key: Key) -> Function:
    if bundles.folders() and toolchain.installed(toolchain.DSL) is None:
        raise NotInBundleError(
            describe(
                "bundle",
                f"{key.name} for {key.arch.name} in {' or '.join(map(str, bundles.folders()))}",
                "no library of it that can be used here, and no compiler",
                f"give its call to tools/build_aot.py, or install {toolchain.DSL}; CUTE_SSM_LOG=compile says more",
            )
        )
    toolchain.check()
    toolchain.stack()  # imports the compiler here, so that logged load and compile times exclude the import
    for folder in settings().aot_dirs:
        function = _from_bundle(Store(folder), key)
        if function is not None:
            return function
    cache = settings().cache_dir
    kind = _objects(key)
    found: Function = kind.make().kernel if cache is None else load_or_compile(Store(cache), key, kind)
    return found


def _from_bundle(store: Store, key: Key) -> Function | None:
    try:
        function: Function | None = _stored(store, key, _objects(key))
    except BadObjectError as error:
        logger().warning("%s cannot be used: %s", store.path(key), error)
        return None
    if function is None:
        logger().info("the bundle %s has no %s for tool-chain %s", store.root, key.name, toolchain.stack())
    return function


class Compiled(NamedTuple):
    """A newly compiled kernel, the bytes to store, and the compile time in seconds."""

    kernel: Any
    data: bytes
    seconds: float


class Kind(NamedTuple):
    """A kind of stored kernel: suffix of the file, how bytes are loaded, and how a kernel is compiled."""

    suffix: str
    load: Callable[[bytes], Any]
    make: Callable[[], Compiled]


def load_or_compile(store: Store, key: Key, kind: Kind) -> Any:
    """Return a kernel from the disk, or compile and store it.

    Reading takes no lock, so that it works on a read-only disk.  Compiling and moving a bad object need the lock.
    """
    try:
        kernel = _stored(store, key, kind)
    except BadObjectError:
        kernel = None
    if kernel is not None:
        return kernel
    with store.lock(key) as held:
        try:
            kernel = _stored(store, key, kind)
        except BadObjectError as error:
            if held:
                store.quarantine(key, error, kind.suffix)
            else:
                store.damaged(key, error, kind.suffix)
        if kernel is None:
            kernel, data, seconds = kind.make()
            if held:
                store.write(key, data, seconds, kind.suffix)
    return kernel


def _stored(store: Store, key: Key, kind: Kind) -> Any | None:
    start = time.perf_counter()
    data = store.read(key, kind.suffix)
    if data is None:
        return None
    try:
        kernel = kind.load(data)
    except Exception as error:
        raise BadObjectError(f"loading it failed: {error}") from error
    logger().info("loaded %s in %.1f ms", store.path(key, kind.suffix), (time.perf_counter() - start) * 1e3)
    return kernel


def _objects(key: Key) -> Kind:
    """Return the kind of kernels for GPUs."""

    def make() -> Compiled:
        data, seconds = _compile(key)
        return Compiled(compiler.load(data, key.function), data, seconds)

    return Kind(".o", lambda data: compiler.load(data, key.function), make)


def _compile(key: Key) -> tuple[bytes, float]:
    start = time.perf_counter()
    data = compiler.export(compiler.compile_kernel(key.spec, key.config, key.arch), key.function)
    seconds = time.perf_counter() - start
    logger().info("compiled %s for %s in %.2f s, %d bytes", key.name, key.arch.name, seconds, len(data))
    return data, seconds


def by_reference(spec: Spec, arguments: Iterable[Any]) -> None:
    """Log that a call with CPU tensors is about to run the PyTorch reference."""
    if settings().log == "off":
        return
    if spec not in _logged_specs:
        _logged_specs.add(spec)
        logger().info("no kernel for %s: the reference runs CPU tensors outside ptxsim.emulate()", spec.text())
    if settings().log == "calls":
        log_call("reference", spec.text(), arguments)


def log_call(backend: str, name: str, arguments: Iterable[Any]) -> None:
    """Log the backend of a call, its name and its arguments."""
    logger().debug("%s: %s(%s)", backend, name, ", ".join(map(_brief, arguments)))


def _logged(key: Key, function: Function) -> Function:
    """Wrap a function to log its arguments before it runs, if CUTE_SSM_LOG asks for it."""
    if settings().log != "calls":
        return function

    def logged(*arguments: Any) -> Any:
        log_call(f"cuda {key.arch.name}", key.name, arguments)
        return function(*arguments)

    return logged


def _brief(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is None:
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(shape)}:{list(value.stride())}@{value.data_ptr():#x}"
