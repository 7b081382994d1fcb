"""`Driver`: the CUDA runtime of this process, as compiled objects see it; kernels run in ptxsim."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ptxsim import MemoryFault, cubin, load
from ptxsim.launch import Options, Session
from ptxsim.memory import Part
from ptxsim.pdl import contains_wait

from .checks import (
    MOST_SHARED,
    PLAIN_SHARED,
    REGISTERS,
    SM_CTAS,
    SM_SHARED,
    SM_THREADS,
    WARP,
    Attribute,
    Config,
    Device,
    Dims,
    Error,
    Function,
    Refusal,
    check_launch,
    problems_of_maps,
)

_P, _I, _U = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
_SIGNATURES = {
    "cudaLaunchKernelExC": (_P, _P, _P),
    "cudaLibraryLoadData": (_P, _P, _P, _P, _U, _P, _P, _U),
    "cudaLibraryGetKernel": (_P, _P, _P),
    "cudaKernelSetAttributeForDevice": (_P, _I, _I, _I),
    "cudaFuncSetAttribute": (_P, _I, _I),
    "cudaGetDevice": (_P,),
    "cudaSetDevice": (_I,),
    "cudaGetDeviceCount": (_P,),
    "cudaDeviceGetAttribute": (_P, _I, _I),
    "cuKernelGetAttribute": (_P, _I, _P, _I),
    "cuDeviceGet": (_P, _I),
    "missing": (_P,),
}
_STATIC_SHARED, _LOCAL, _NUM_REGISTERS = 1, 3, 4  # of CUfunction_attribute
LEGACY, PER_THREAD = 1, 2  # handles of streams that every device has, beside 0


@dataclass
class LoadedKernel:
    """A kernel of a loaded library; ``settings`` are its attributes by (device, attribute)."""

    kernel: cubin.Kernel
    arch: int
    library: int
    loaded: Any
    settings: dict[tuple[int, int], int] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """A launch that the driver accepted."""

    kernel: str
    device: int
    config: Config
    cluster: Dims
    params: bytes
    captured: bool

    @property
    def grid(self) -> Dims:
        return self.config.grid

    @property
    def shared(self) -> int:
        return self.config.shared

    @property
    def stream(self) -> int:
        return self.config.stream

    @property
    def pdl(self) -> bool:
        return bool(self.config.integer(Attribute.PROGRAMMATIC_STREAM_SERIALIZATION))


class Allocation(NamedTuple):
    """Memory of a device."""

    nbytes: int
    device: int


class Capture(NamedTuple):
    """A stream that is captured, and what a replay does."""

    stream: int
    nodes: list[Callable[[], None]]


def _write(pointer: int, value: int, kind: Any = ctypes.c_int) -> None:
    kind.from_address(pointer).value = value


class Driver:
    """The devices of this process, and what was done with them.

    Parameters
    ----------
    devices : sequence of Device
    folder : Path
        Keeps the PTX of compiled kernels.
    library : Path
        What `build.runtime` made.
    options
        Options of the emulator, such as ``racecheck``.

    Attributes
    ----------
    launches : list of Launch
        Every launch that was accepted.
    refusals : list of str
        What was refused, with the code that the caller got.
    problems : list of str
        What no driver refuses, and is wrong all the same.
    faults : list of Exception
        Errors of the emulator, whose caller got an error code.
    ptx : Path
        Folder with the PTX of compiled kernels, by the digest of the fat binary that was assembled from it.
    execute : bool
        False: launches are checked and not run.
    reported_shared : int
        Bytes that ``cuKernelGetAttribute`` adds to the static shared memory of a kernel: 0, or 1024 where the driver
        counts its own kilobyte.
    """

    def __init__(self, devices: Sequence[Device], folder: Path, library: Path, **options: Any):
        self.devices = list(devices)
        self.launches: list[Launch] = []
        self.refusals: list[str] = []
        self.problems: list[str] = []
        self.faults: list[BaseException] = []
        self.ptx = folder / "ptx"
        self.ptx.mkdir(parents=True, exist_ok=True)
        self.execute, self.reported_shared = True, 0
        self._allocations: dict[int, Allocation] = {}
        self.collect: Callable[[], None] = lambda: None  # forgets allocations that PyTorch has freed
        self.capture: Capture | None = None
        self.streams: dict[int, int | None] = {0: None, LEGACY: None, PER_THREAD: None}  # device by handle
        self.kernels: dict[int, LoadedKernel] = {}
        self.libraries: dict[int, tuple[list[cubin.Image], Any]] = {}
        self._sessions = [Session(Options(sm_count=d.sm_count, **options), arch=d.arch) for d in self.devices]
        self._handles = itertools.count(0x7F00_0000_0010, 16)
        self._thread, self._lock = threading.local(), threading.RLock()
        self._failing: Error | None = None
        self.runtime = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)  # before the runtime of bundles
        self._fill(self.runtime)

    @property
    def allocations(self) -> dict[int, Allocation]:
        """The memory of all devices, by address."""
        self.collect()
        return self._allocations

    def _fill(self, library: ctypes.CDLL) -> None:
        """Give the library its functions."""
        self._keep: list[Any] = []
        for name, types in _SIGNATURES.items():
            self._hook(library, name, _I, types, self._guarded(getattr(self, f"_{name}")))
        words = {code: ctypes.create_string_buffer(code.name.encode()) for code in Error}
        other = ctypes.create_string_buffer(b"cudaErrorUnknown")
        addresses = {int(code): ctypes.addressof(text) for code, text in words.items()}
        self._keep += [words, other]
        self._hook(library, "cudaGetErrorName", _P, (_I,), lambda code: addresses.get(code, ctypes.addressof(other)))

    def _hook(self, library: ctypes.CDLL, name: str, result: Any, types: tuple[Any, ...], function: Any) -> None:
        callback = ctypes.CFUNCTYPE(result, *types)(function)
        self._keep.append(callback)
        _P.in_dll(library, f"hook_{name}").value = ctypes.cast(callback, _P).value

    def _guarded(self, function: Callable[..., None]) -> Callable[..., int]:
        """Return a function that returns an error code whatever is raised: nothing may pass through C."""

        def called(*arguments: Any) -> int:
            try:
                with self._lock:
                    function(*arguments)
            except Refusal as refusal:
                self.refusals.append(str(refusal))
                return refusal.code
            except MemoryFault as error:
                self.faults.append(error)
                return Error.cudaErrorIllegalAddress
            except BaseException as error:
                self.faults.append(error)
                return Error.cudaErrorLaunchFailure
            return Error.cudaSuccess

        return called

    # ------------------------------------------------------------------------------------------- for the user
    def clear(self) -> None:
        """Forget what was noted."""
        for notes in (self.launches, self.refusals, self.problems, self.faults):
            notes.clear()

    def new_handle(self) -> int:
        """Return a number that no other object has."""
        return next(self._handles)

    def know(self, address: int, allocation: Allocation) -> None:
        """Let kernels of a device touch this memory."""
        self._allocations[address] = allocation

    def forget(self, address: int) -> None:
        """End what `know` began."""
        self._allocations.pop(address, None)

    @property
    def device(self) -> int:
        """The current device of this thread."""
        return getattr(self._thread, "device", 0)

    @device.setter
    def device(self, number: int) -> None:
        self._thread.device = self._known(number)

    @contextlib.contextmanager
    def failing(self, code: Error) -> Iterator[None]:
        """Return an error from every launch in this context."""
        before, self._failing = self._failing, code
        try:
            yield
        finally:
            self._failing = before

    @contextlib.contextmanager
    def capturing(self, stream: int, nodes: list[Callable[[], None]]) -> Iterator[None]:
        """Collect what this process does on a stream, instead of doing it."""
        if self.capture is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self.capture = Capture(stream, nodes)
        try:
            yield
        finally:
            self.capture = None

    def _known(self, device: int) -> int:
        if not 0 <= device < len(self.devices):
            raise Refusal(Error.cudaErrorInvalidDevice, f"device {device} of {len(self.devices)}")
        return device

    # ------------------------------------------------------------------------------------------------ devices
    def _missing(self, name: int) -> None:
        raise Refusal(Error.cudaErrorNotSupported, f"{ctypes.string_at(name).decode()} is not modelled")

    def _cudaGetDeviceCount(self, out: int) -> None:
        _write(out, len(self.devices))

    def _cudaGetDevice(self, out: int) -> None:
        _write(out, self.device)

    def _cudaSetDevice(self, device: int) -> None:
        self.device = device

    def _cuDeviceGet(self, out: int, ordinal: int) -> None:
        _write(out, self._known(ordinal))

    def _cudaDeviceGetAttribute(self, out: int, attribute: int, device: int) -> None:
        own = self.devices[self._known(device)]
        known = {1: 1024, 8: PLAIN_SHARED, 10: WARP, 16: own.sm_count, 39: SM_THREADS, 75: own.capability[0]}
        known |= {76: own.capability[1], 81: SM_SHARED, 82: REGISTERS, 97: MOST_SHARED, 106: SM_CTAS}
        known |= {111: cubin.RESERVED}
        if attribute not in known:
            raise Refusal(Error.cudaErrorNotSupported, f"device attribute {attribute} is not modelled")
        _write(out, known[attribute])

    # ---------------------------------------------------------------------------------------------- libraries
    def _cudaLibraryLoadData(self, out: int, code: int, *options: Any) -> None:
        if self.capture is not None:
            raise Refusal(Error.cudaErrorStreamCaptureUnsupported, "a library is loaded while a stream is captured")
        data = cubin.at(code)
        ptx, handle = self.ptx / cubin.digest(data), self.new_handle()
        self.libraries[handle] = cubin.images(data), load(ptx.read_text()) if ptx.exists() else None
        _write(out, handle, ctypes.c_uint64)

    def _cudaLibraryGetKernel(self, out: int, library: int, name: int) -> None:
        if library not in self.libraries:
            raise Refusal(Error.cudaErrorInvalidResourceHandle, f"no library {library}")
        wanted = ctypes.string_at(name).decode()
        for handle, known in self.kernels.items():
            if (known.library, known.kernel.name) == (library, wanted):
                return _write(out, handle, ctypes.c_uint64)
        images, loaded = self.libraries[library]
        for image in images:
            if wanted in image.kernels:
                handle = self.new_handle()
                self.kernels[handle] = LoadedKernel(image.kernels[wanted], image.arch, library, loaded)
                return _write(out, handle, ctypes.c_uint64)
        raise Refusal(Error.cudaErrorSymbolNotFound, f"no kernel {wanted}")

    def _kernel(self, handle: int, device: int) -> LoadedKernel:
        """Return a kernel that has code for a device."""
        kernel = self.kernels.get(handle)
        if kernel is None:
            raise Refusal(Error.cudaErrorInvalidResourceHandle, f"{handle} is no kernel")
        own = self.devices[self._known(device)]
        if kernel.arch != own.number:
            raise Refusal(Error.cudaErrorNoKernelImageForDevice, f"code for sm_{kernel.arch}, the device is {own.arch}")
        return kernel

    def _cuKernelGetAttribute(self, out: int, attribute: int, handle: int, device: int) -> None:
        kernel = self._kernel(handle, device).kernel
        known = {_STATIC_SHARED: kernel.static_shared + self.reported_shared, _LOCAL: kernel.frame}
        known[_NUM_REGISTERS] = kernel.registers
        if attribute not in known:
            raise Refusal(Error.cudaErrorNotSupported, f"kernel attribute {attribute} is not modelled")
        _write(out, known[attribute])

    def _cudaKernelSetAttributeForDevice(self, handle: int, attribute: int, value: int, device: int) -> None:
        kernel = self._kernel(handle, device)
        if attribute not in list(Function):
            raise Refusal(Error.cudaErrorNotSupported, f"setting kernel attribute {attribute} is not modelled")
        legal = {
            Function.MAX_DYNAMIC_SHARED: range(MOST_SHARED - kernel.kernel.static_shared + 1),
            Function.CARVEOUT: range(-1, 101),
            Function.NON_PORTABLE_CLUSTER: range(2),
        }
        if value not in legal[Function(attribute)]:
            raise Refusal(Error.cudaErrorInvalidValue, f"{Function(attribute).name} is set to {value}")
        kernel.settings[device, attribute] = value

    def _cudaFuncSetAttribute(self, handle: int, attribute: int, value: int) -> None:
        self._cudaKernelSetAttributeForDevice(handle, attribute, value, self.device)

    # ----------------------------------------------------------------------------------------------- launches
    def _cudaLaunchKernelExC(self, config: int, handle: int, arguments: int) -> None:
        raw = ctypes.string_at(config, 56)
        first, count = struct.unpack_from("<QI", raw, 40)
        attributes = {}
        for i in range(count):
            one = ctypes.string_at(first + 72 * i, 72)
            attributes[struct.unpack_from("<I", one)[0]] = one[8:]
        self.launch(handle, Config.read(raw, attributes), arguments)

    def launch(self, handle: int, config: Config, arguments: int) -> None:
        """Check a launch; run it, or add it to the capture of its stream."""
        device = self.device
        kernel = self._kernel(handle, device)
        if config.stream not in self.streams or self.streams[config.stream] not in (None, device):
            raise Refusal(
                Error.cudaErrorInvalidResourceHandle, f"stream {config.stream:#x} is not one of device {device}"
            )
        settings = {attribute: value for (of, attribute), value in kernel.settings.items() if of == device}
        check_launch(kernel.kernel, config, self.devices[device], settings)
        if self._failing is not None:
            raise Refusal(self._failing, "asked for by failing()")
        pointers = (_P * len(kernel.kernel.params)).from_address(arguments)
        values = [ctypes.string_at(at, param.size) for param, at in zip(kernel.kernel.params, pointers)]
        captured = self.capture is not None and config.stream == self.capture.stream
        made = Launch(kernel.kernel.name, device, config, config.cluster(kernel.kernel), b"".join(values), captured)
        self._note_problems(kernel, made, values)
        params = self._params(kernel, values)
        self.launches.append(made)
        if captured:
            self.capture.nodes.append(lambda: self._run(kernel, made, params))
        else:
            self._run(kernel, made, params)

    def _note_problems(self, kernel: LoadedKernel, launch: Launch, values: list[bytes]) -> None:
        found = list(problems_of_maps(kernel.kernel, values))
        if self.capture is not None and not launch.captured:
            found.append(f"launched on stream {launch.stream:#x} while {self.capture.stream:#x} is captured")
        if kernel.loaded is not None and launch.pdl and not contains_wait(self._declared(kernel)):
            found.append("may start before the kernel ahead of it ends, and never waits for it")
        self.problems += [f"{launch.kernel}: {words}" for words in found]

    def _declared(self, kernel: LoadedKernel) -> Any:
        """Return a kernel as its PTX declares it."""
        if kernel.loaded is None:
            raise LookupError(f"no PTX of {kernel.kernel.name} is known: compile it with gpushim installed")
        return kernel.loaded.program(kernel.kernel.name).kernel

    def _params(self, kernel: LoadedKernel, values: list[bytes]) -> np.ndarray:
        """Return the parameter block of the PTX, after a comparison with that of the binary.

        The assembler moves tensor maps, so that parameters correspond by number, not by offset.
        """
        declared, binary = self._declared(kernel), kernel.kernel
        if [param.size for param in declared.params] != [param.size for param in binary.params]:
            raise RuntimeError(f"the PTX of {binary.name} has parameters {declared.params}, the binary {binary.params}")
        if declared.reqntid and binary.reqntid and tuple(declared.reqntid) != tuple(binary.reqntid):
            raise RuntimeError(f"the PTX of {binary.name} asks for block {declared.reqntid}, not {binary.reqntid}")
        block = np.zeros(max(declared.param_bytes, 16), np.uint8)
        for param, value in zip(declared.params, values):
            block[param.offset : param.offset + param.size] = np.frombuffer(value, np.uint8)
        return block

    def _run(self, kernel: LoadedKernel, launch: Launch, params: np.ndarray) -> None:
        """Run a kernel, which may touch the memory of its own device alone."""
        if not self.execute:
            return
        with self._lock:
            session = self._sessions[launch.device]
            own = [(at, a.nbytes) for at, a in list(self.allocations.items()) if a.nbytes and a.device == launch.device]
            session.memory.parts = [(Part(f"cuda:{launch.device}@{at:x}", at, size), None) for at, size in own]
            session.memory.rebuild()
            session.launches.clear()
            session.launch(
                kernel.loaded, launch.kernel, launch.grid, launch.config.block, params, launch.shared, launch.cluster
            )
