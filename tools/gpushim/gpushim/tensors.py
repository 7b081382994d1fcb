"""CUDA tensors over host memory, in a build of PyTorch without CUDA.

PyTorch's own DLPack import makes a tensor of device type CUDA from a capsule that says so.  Views keep its storage: the
CPU's kernels of ``view``, ``as_strided`` and ``set_`` do not look at the device.  Every other operator runs on the CPU,
on aliases, through a fallback of the dispatcher.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from .driver import Allocation, Driver

_CPU, _CUDA = 1, 2  # of DLPack
_BF16, _FLOAT8 = 4, {torch.float8_e4m3fn: 10, torch.float8_e5m2: 12}
_CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_SET = torch.ops.aten.set_.source_Storage_storage_offset

# Operators that PyTorch's CUDA backend registers as views of the storage they are given.
_VIEWS = (
    "as_strided", "view", "_reshape_alias", "unfold", "view_as_real", "view.dtype",
    "set_.source_Storage_storage_offset", "set_.source_Storage", "set_.source_Tensor",
)  # fmt: skip
# Operators with kernels for any device, before which the fallback would not be asked.
_DIRECT = (
    "convolution", "copy_", "_local_scalar_dense", "equal", "is_pinned", "_copy_from", "_copy_from_and_resize",
    "_fft_c2c",
)  # fmt: skip
_WAITING = {"_local_scalar_dense", "equal", "nonzero", "unique_dim", "_unique2", "masked_select", "is_nonzero"}

new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("kind", ctypes.c_int), ("index", ctypes.c_int), ("ndim", ctypes.c_int),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p), ("offset", ctypes.c_uint64),
    ]  # fmt: skip


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


def _code(dtype: torch.dtype) -> int:
    """Return DLPack's code of a type."""
    if dtype in _FLOAT8:
        return _FLOAT8[dtype]
    if dtype == torch.bool:
        return 6
    if dtype.is_complex:
        return 5
    if dtype.is_floating_point:
        return _BF16 if dtype == torch.bfloat16 else 2
    return 0 if dtype.is_signed else 1


class Tensors:
    """The CUDA tensors of a driver, and what PyTorch's operators do with them.

    ``forbid_waiting``: operators that wait for a device raise, as under ``torch.cuda.set_sync_debug_mode("error")``.
    """

    def __init__(self, driver: Driver):
        self.driver, self.forbid_waiting = driver, False
        self._living: dict[int, tuple[Any, ...]] = {}
        self._serial = itertools.count(1)
        self._deleter = ctypes.cast(driver.runtime.gpushim_free, ctypes.c_void_p).value
        self._freed = driver.runtime.gpushim_freed
        self._freed.restype, self._freed.argtypes = ctypes.c_size_t, [ctypes.c_void_p, ctypes.c_size_t]
        driver.collect = self.collect

    def collect(self) -> None:
        """Let go of the memory of tensors that PyTorch has freed."""
        gone: list[int] = []
        numbers = (ctypes.c_uint64 * 256)()  # not shared with other threads
        while n := self._freed(numbers, len(numbers)):
            gone += numbers[:n]
        owners = [self._living.pop(number) for number in gone]
        for *_, base in owners:
            if base is not None:
                self.driver.forget(base)

    def imported(self, owner: Any, address: int, nbytes: int, kind: int, device: int, base: int | None = None) -> Any:
        """Return bytes at an address as a tensor; ``owner`` lives as long, and so does the allocation at ``base``."""
        self.collect()
        serial, sizes = next(self._serial), (ctypes.c_int64 * 2)(nbytes, 1)
        at = ctypes.addressof(sizes)
        tensor = _DLTensor(address, kind, device, 1, 1, 8, 1, at, at + 8, 0)
        managed = _Managed(tensor, serial, self._deleter)
        self._living[serial] = (owner, sizes, managed, base)
        return torch._C._from_dlpack(new_capsule(ctypes.addressof(managed), b"dltensor", None))

    def _empty(self, dtype: torch.dtype, device: int) -> torch.Tensor:
        """Return a CUDA tensor of this type without elements."""
        serial, sizes = next(self._serial), (ctypes.c_int64 * 2)(0, 1)
        at = ctypes.addressof(sizes)
        tensor = _DLTensor(0, _CUDA, device, 1, _code(dtype), dtype.itemsize * 8, 1, at, at + 8, 0)
        managed = _Managed(tensor, serial, self._deleter)
        self._living[serial] = (None, sizes, managed, None)
        return torch._C._from_dlpack(new_capsule(ctypes.addressof(managed), b"dltensor", None))

    def to_cuda(self, tensor: torch.Tensor, device: int = 0) -> torch.Tensor:
        """Return a CPU tensor's memory as that of a device."""
        tensor = tensor.detach()
        memory = tensor.untyped_storage()
        base = memory.data_ptr()
        if memory.nbytes():
            self.driver.know(base, Allocation(memory.nbytes(), device))
        flat = self.imported(memory, base, memory.nbytes(), _CUDA, device, base)
        place = (flat.untyped_storage(), tensor.storage_offset(), list(tensor.shape), list(tensor.stride()))
        return _SET.redispatch(_CPU_KEYS, self._empty(tensor.dtype, device), *place)

    def alias(self, tensor: torch.Tensor, zeros: bool = False) -> torch.Tensor:
        """Return a CPU tensor over a CUDA tensor's memory, or over as many zeros."""
        memory = tensor.untyped_storage()
        if memory.nbytes() == 0:  # an operator may resize it
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        nbytes = memory.nbytes()
        flat = (
            torch.zeros(nbytes, dtype=torch.uint8)
            if zeros
            else self.imported(tensor, memory.data_ptr(), nbytes, _CPU, 0)
        )
        out = torch.empty(0, dtype=tensor.dtype)
        return out.set_(flat.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())

    def _number(self, device: torch.device) -> int:
        return self.driver.device if device.index is None else device.index

    def run(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Run an operator on the CPU; on a stream that is captured, at each replay."""
        self._check_waiting(op, args)
        if self.driver.capture is None:
            return self._run(op, args, kwargs)
        results = self._run(op, args, kwargs, dry=True)
        self.driver.capture.nodes.append(lambda: self._replay(op, args, kwargs, results))
        return results

    def _run(self, op: Any, args: Any, kwargs: Any, dry: bool = False) -> Any:
        """Run an operator on aliases.

        ``dry``: only for the shapes of its results.  What it reads may come from operators that have not run, and is
        zero, a good index; the shapes of operators that may be captured depend on no value.
        """
        given: list[tuple[torch.Tensor, torch.Tensor]] = []
        devices: list[int] = []

        def lower(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.is_cuda:
                devices.append(self._number(value.device))
                for cpu, gpu in given:
                    if gpu is value:
                        return cpu
                given.append((self.alias(value, zeros=dry), value))
                return given[-1][0]
            if isinstance(value, torch.device) and value.type == "cuda":
                devices.append(self._number(value))
                return torch.device("cpu")
            return value

        positional = [a for a in op._schema.arguments if not a.kwarg_only]
        numbers = (int, float)  # that stand for tensors without dimensions
        lowered = [
            torch.tensor(value) if isinstance(value, numbers) and str(a.type) == "Tensor" else value
            for value, a in zip(tree_map(lower, list(args)), positional)
        ]
        result = op(*lowered, **tree_map(lower, kwargs))
        device = devices[0] if devices else self.driver.device
        for cpu, gpu in given:
            if cpu.untyped_storage().nbytes() > gpu.untyped_storage().nbytes():  # the operator resized it
                grown = self.to_cuda(cpu, device)
                place = (grown.untyped_storage(), cpu.storage_offset(), list(cpu.shape), list(cpu.stride()))
                _SET.redispatch(_CPU_KEYS, gpu, *place)
        asked = kwargs.get("device")
        stays = asked is not None and torch.device(asked).type == "cpu"

        def lift(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or stays:
                return value
            for cpu, gpu in given:
                if cpu is value:
                    return gpu
            return self.to_cuda(value, device)

        return tree_map(lift, result)

    def _replay(self, op: Any, args: Any, kwargs: Any, results: Any) -> None:
        """Run an operator of a graph; its results go to the memory that they have had since the capture."""
        fresh = self._run(op, args, kwargs)
        if any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments):
            return
        kept, new = ([r] if isinstance(r, torch.Tensor) else list(r) for r in (results, fresh))
        for to, value in zip(kept, new):
            if to.shape == value.shape:  # else a later operator resized it, as its `out`
                self.alias(to).copy_(self.alias(value))

    def _check_waiting(self, op: Any, args: Any) -> None:
        """Raise for an operator that waits for the device, where that is not allowed."""
        name = op._schema.name.split("::")[1]
        waits = name in _WAITING
        if name in ("copy_", "_copy_from"):
            waits = len({t.device.type for t in args[:2]}) == 2
        if name == "index":
            waits = any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in args[1])
        if waits and self.driver.capture is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({name})")
        if waits and self.forbid_waiting:
            raise RuntimeError(f"called a synchronizing CUDA operation ({name})")

    def register(self) -> list[torch.library.Library]:
        """Register the operators; what is returned must be kept."""
        fallback, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        fallback.fallback(self.run, "CUDA")
        for names, way in ((_VIEWS, _as_on_cpu), (_DIRECT, self._through_run)):
            for name in names:
                packet, _, overload = name.partition(".")
                op = getattr(getattr(torch.ops.aten, packet), overload or "default")
                aten.impl(name, way(op), "CUDA")
        return [fallback, aten]

    def _through_run(self, op: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.run(op, *args, **kwargs)


def _as_on_cpu(op: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: op.redispatch(_CPU_KEYS, *args, **kwargs)
