"""``torch.cuda`` of a build without CUDA: devices, streams, events and graphs of a `Driver`."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import torch

from .driver import Driver
from .tensors import Tensors, new_capsule

_kept: list[Any] = []  # what PyTorch points to, for the life of the process
_thread = threading.local()  # .stream: the current one


class Stream:
    """A stream; what is launched on it has run when the launch returns."""

    driver: Driver

    def __init__(self, device: Any = None, priority: int = 0, handle: int | None = None):
        number = _number(self.driver, device)
        self.device = torch.device("cuda", number)
        self.cuda_stream = self.driver.new_handle() if handle is None else handle
        if handle is None:
            self.driver.streams[self.cuda_stream] = number

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Stream) and self.cuda_stream == other.cuda_stream
        return same and self.device == other.device

    def __hash__(self) -> int:
        return hash((self.cuda_stream, self.device))

    def wait_stream(self, other: Stream) -> None: ...
    def wait_event(self, event: Event) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event


class Event:
    """An event; its time is that of the host."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False):
        self.at = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...
    def wait(self, stream: Stream | None = None) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1e3


class CUDAGraph:
    """What was launched and called in a capture; `replay` does it again, from what its memory holds then."""

    def __init__(self, keep_graph: bool = False):
        self.nodes: list[Callable[[], None]] = []

    def replay(self) -> None:
        for node in self.nodes:
            node()

    def pool(self) -> tuple[int, int]:
        return 0, 0

    def reset(self) -> None:
        self.nodes = []


def _number(driver: Driver, device: Any) -> int:
    """Return the number of a device that is given in one of torch's ways."""
    if device is None:
        return driver.device
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return driver.device if index is None else index


def _current_stream(device: Any = None) -> Stream:
    stream, number = _thread.__dict__.get("stream"), _number(Stream.driver, device)
    return stream if stream is not None and stream.device.index == number else Stream(number, handle=0)


@contextlib.contextmanager
def _on(stream: Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    driver, before = Stream.driver, _thread.__dict__.get("stream")
    device, driver.device = driver.device, stream.device.index
    _thread.stream = stream
    try:
        yield
    finally:
        _thread.stream, driver.device = before, device


@contextlib.contextmanager
def _graph(
    graph: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    stream = stream or Stream()
    with _on(stream), Stream.driver.capturing(stream.cuda_stream, graph.nodes):
        yield


def install(driver: Driver) -> Tensors:
    """Give PyTorch the driver's devices, for the life of the process.

    Raises
    ------
    RuntimeError
        If PyTorch's internals are not those that this was written for.
    """
    if torch.version.cuda is not None or torch.cuda.is_available():
        raise RuntimeError("gpushim needs a build of PyTorch without CUDA, such as torch+cpu")
    tensors = Tensors(driver)
    Stream.driver = driver
    _replace_guard(driver)
    _kept.append(tensors.register())
    _replace_stream_of_dlpack()
    _replace_functions(driver, tensors)
    _check(driver, tensors)
    return tensors


def _replace_guard(driver: Driver) -> None:
    """Register a guard of CUDA devices: that of the CPU, with other virtual functions where devices matter.

    A ``c10::Device`` is two bytes: the type, 1 for CUDA, and the index.
    """
    (path,) = (Path(torch.__file__).parent / "lib").glob("libc10.so")
    registry = (ctypes.c_void_p * 22).in_dll(ctypes.CDLL(str(path)), "_ZN3c104impl26device_guard_impl_registryE")
    start = ctypes.c_void_p.from_address(registry[0]).value - 16  # type information lies before the functions
    table = (ctypes.c_void_p * 48).from_buffer_copy(ctypes.string_at(start, 48 * 8))

    def exchange(_: int, device: int) -> int:
        before, wanted = driver.device, device >> 8 & 0xFF
        if wanted != 0xFF:
            driver.device = wanted
        return 1 | before << 8

    def change(_: int, device: int) -> None:
        exchange(_, device)

    word, this = ctypes.c_uint16, ctypes.c_void_p
    methods = {
        0: ctypes.CFUNCTYPE(ctypes.c_int8, this)(lambda _: 1),  # type
        1: ctypes.CFUNCTYPE(word, this, word)(exchange),  # exchangeDevice
        2: ctypes.CFUNCTYPE(word, this)(lambda _: 1 | driver.device << 8),  # getDevice
        3: ctypes.CFUNCTYPE(None, this, word)(change),  # setDevice
        4: ctypes.CFUNCTYPE(None, this, word)(change),  # uncheckedSetDevice
        15: ctypes.CFUNCTYPE(ctypes.c_int8, this)(lambda _: len(driver.devices)),  # deviceCount
    }
    for slot, method in methods.items():
        table[2 + slot] = ctypes.cast(method, ctypes.c_void_p).value
    guard = (ctypes.c_void_p * 8)(ctypes.addressof(table) + 16)
    _kept.append((table, methods, guard))
    registry[1] = ctypes.addressof(guard)


def _replace_stream_of_dlpack() -> None:
    """Tell those who ask DLPack's exchange API for the current stream, as the objects' entries do."""

    def current(kind: int, device: int, out: int) -> int:
        ctypes.c_void_p.from_address(out).value = _current_stream(device).cuda_stream
        return 0

    api = torch.Tensor.__dlpack_c_exchange_api__
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    at = pointer(api, b"dlpack_exchange_api")
    if ctypes.c_uint32.from_address(at).value != 1:
        raise RuntimeError("gpushim knows version 1 of DLPack's exchange API")
    copy = (ctypes.c_uint64 * 8).from_buffer_copy(ctypes.string_at(at, 64))
    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int32, ctypes.c_void_p)(current)
    copy[6] = ctypes.cast(callback, ctypes.c_void_p).value  # behind version, previous version, and four functions
    _kept.append((api, copy, callback))
    torch.Tensor.__dlpack_c_exchange_api__ = new_capsule(ctypes.addressof(copy), b"dlpack_exchange_api", None)


def _replace_functions(driver: Driver, tensors: Tensors) -> None:
    """Replace what `torch.cuda` would ask CUDA for."""

    def properties(device: Any = None) -> SimpleNamespace:
        own = driver.devices[_number(driver, device)]
        major, minor = own.capability
        return SimpleNamespace(
            name=f"gpushim {own.arch}", major=major, minor=minor, multi_processor_count=own.sm_count,
            total_memory=80 << 30, L2_cache_size=50 << 20, shared_memory_per_block_optin=232448,
            regs_per_multiprocessor=65536,
        )  # fmt: skip

    def set_device(device: Any) -> None:
        driver.device = _number(driver, device)

    def exchange(device: int) -> int:
        before = driver.device
        if device >= 0:
            driver.device = device
        return before

    def forbid_waiting(mode: Any) -> None:
        tensors.forbid_waiting = mode in (2, "error")

    def nothing(*_: Any, **__: Any) -> None: ...

    class Generator(torch.Generator):
        """A generator of the CPU, whatever device is asked for: its numbers are not those of a GPU."""

        def __new__(cls, device: Any = "cpu") -> Any:
            return super().__new__(cls, "cpu")

    torch.Generator = Generator  # type: ignore[misc]
    replaced = {
        "_lazy_init": nothing, "is_available": lambda: True, "is_initialized": lambda: True, "synchronize": nothing,
        "device_count": lambda: len(driver.devices), "current_device": lambda: driver.device, "set_device": set_device,
        "get_device_properties": properties, "get_device_name": lambda device=None: properties(device).name,
        "get_device_capability": lambda device=None: (properties(device).major, properties(device).minor),
        "current_stream": _current_stream, "default_stream": lambda device=None: Stream(device, handle=0),
        "stream": _on, "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "graph": _graph,
        "is_current_stream_capturing": lambda: driver.capture is not None, "set_sync_debug_mode": forbid_waiting,
        "manual_seed": nothing, "manual_seed_all": nothing, "empty_cache": nothing,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8), "set_rng_state": nothing,
        "get_rng_state_all": lambda: [], "mem_get_info": lambda device=None: (70 << 30, 80 << 30),
        "_exchange_device": exchange, "_maybe_exchange_device": exchange,
    }  # fmt: skip
    for name, value in replaced.items():
        setattr(torch.cuda, name, _copied(value) if isinstance(value, FunctionType) else value)
    torch._C._cuda_getDevice, torch._C._cuda_setDevice = lambda: driver.device, _copied(set_device)


def _copied(function: FunctionType) -> FunctionType:
    """Return another function of the same code: ``torch._dynamo`` refuses one that has two names in PyTorch."""
    parts = function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    return FunctionType(*parts)


def _check(driver: Driver, tensors: Tensors) -> None:
    """Raise `RuntimeError` unless tensors, devices and views behave: the internals that this replaces may change."""
    last = len(driver.devices) - 1
    made = torch.arange(6, device=f"cuda:{last}").view(2, 3)[:, 1:]
    held = any(at <= made.data_ptr() < at + a.nbytes and a.device == last for at, a in driver.allocations.items())
    right = made.is_cuda and made.device.index == last and (made + 1).sum().item() == 16 and driver.device == 0
    with torch.cuda.device(last):
        right = right and torch.empty(1, device="cuda").device.index == last
    if not (held and right and driver.device == 0):
        raise RuntimeError(f"gpushim does not know this version of PyTorch, {torch.__version__}")
    del made
