"""The host code of a compiled CuTe DSL function: its module, the engine that runs it, the CUDA runtime it sees."""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
import struct
from typing import NamedTuple
from unittest import mock

import numpy as np

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_LIBRARY = 0x1111  # handle of the one library of a compiled function
_ATTRIBUTES = {1: 1024, 8: 49152, 10: 32, 39: 2048, 75: 9, 76: 0, 81: 233472, 82: 65536, 97: 232448, 111: 1024}
_SM_COUNT, _MAJOR, _MINOR = 16, 75, 76
_CLUSTER, _PDL, _LAUNCH_CARVEOUT = 4, 6, 14  # cudaLaunchAttributeID
_FUNCTION_CARVEOUT = 9  # cudaFuncAttribute


class HostCode(NamedTuple):
    """What an engine is made of.

    ``module``: bytecode of the lowered MLIR module; ``opt_level``: of the engine; ``function``: name of the entry;
    ``has_kernels``: whether the module loads a CUDA library before its first launch.
    """

    module: bytes
    opt_level: int
    function: str
    has_kernels: bool


@contextlib.contextmanager
def captured(runtime):
    """Let ``cute.compile`` make engines that see ``runtime``; yields a list of (module, opt_level, engine)."""
    from cutlass.base_dsl.compiler import Compiler

    original, made = Compiler.jit, []

    def jit(self, module, opt_level=2, shared_libs=()):
        code = io.BytesIO()
        module.operation.write_bytecode(code)
        engine = original(self, module, opt_level, shared_libs)
        runtime.register(engine)
        made.append((code.getvalue(), opt_level, engine))
        return engine

    with mock.patch.object(Compiler, "jit", jit):
        yield made


def engine_of(code, runtime):
    """The engine of a `HostCode`: neither traces nor runs a pass of the compiler."""
    from cutlass._mlir import execution_engine, ir
    from cutlass.cutlass_dsl import CuTeDSL

    libraries = CuTeDSL._get_dsl().get_shared_libs()
    with ir.Context():
        module = ir.Module.parse(code.module)
        engine = execution_engine.ExecutionEngine(module, opt_level=code.opt_level, shared_libs=libraries)
    runtime.register(engine)
    return engine


class Executor:
    """Calls the entry of an engine; the first call makes it load its library, as the compiler's own executor does."""

    def __init__(self, engine, code):
        self._engine, self._code, self._entry = engine, code, None

    def __call__(self, pointers):
        """Run with the addresses of the arguments; returns the CUDA error."""
        if self._entry is None:
            self._load()
        error = ctypes.c_int32(0)
        packed = (ctypes.c_void_p * (len(pointers) + 1))(*map(_address, pointers), ctypes.addressof(error))
        self._entry(packed)
        return error.value

    def _load(self):
        if self._code.has_kernels:
            error, device = ctypes.c_int32(0), ctypes.c_int32(0)
            self._library = ctypes.c_void_p()  # the host code keeps its address
            self._reference = ctypes.c_void_p(ctypes.addressof(self._library))
            for name, cells in (
                ("cuda_init", (self._reference, error)),
                ("cuda_load_to_device", (self._reference, device, error)),
            ):
                self._function(name)((ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells)))
                if error.value:
                    raise RuntimeError(f"{name} of {self._code.function} returned CUDA error {error.value}")
        self._entry = self._function(f"_mlir_ciface_{self._code.function}")

    def _function(self, name):
        address = self._engine.raw_lookup(name)
        if not address:
            raise RuntimeError(f"the host code has no function {name}")
        return ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)(address)


def _address(pointer):
    return pointer.value if isinstance(pointer, ctypes.c_void_p) else pointer


def _write(pointer, value, kind=ctypes.c_int):
    kind.from_address(pointer).value = value
    return 0


class Runtime:
    """The CUDA runtime that the host code of one compiled function sees.

    ``owner``: the compiled function, whose ``session`` runs the launches, and which has ``arch`` and ``module``.
    """

    def __init__(self):
        self.owner, self.error = None, None
        self.names = []  # kernel handle - 1 -> name
        self.carveouts = {}  # kernel handle -> percent
        self.callbacks = []  # must live as long as the engine

    def register(self, engine):
        symbols = [
            ("_cudaLaunchKernelEx", [_P, _P, _P], self.launch_ex),
            ("_cudaLaunchKernel", [_P] + [_I] * 6 + [_P, _L, _P], self.launch_plain),
            (
                "_cudaLibraryLoadData",
                [_P, _P, _P, _P, _I, _P, _P, _I],
                lambda p, *a: _write(p, _LIBRARY, ctypes.c_uint64),
            ),
            ("_cudaLibraryGetKernel", [_P, _P, _P], self.get_kernel),
            ("_cudaLibraryUnload", [_P], lambda *a: 0),
            ("_cudaFuncSetAttribute", [_P, _I, _I], self.set_attribute),
            ("_cudaKernelSetAttributeForDevice", [_P, _I, _I, _I], self.set_attribute),
            ("_cudaGetDevice", [_P], lambda p: _write(p, 0)),
            ("_cudaSetDevice", [_I], lambda d: 0),
            ("_cudaGetDeviceCount", [_P], lambda p: _write(p, 1)),
            ("_cudaDeviceGetAttribute", [_P, _I, _I], lambda p, a, d: _write(p, self.attribute(a))),
            ("_cuKernelGetAttribute", [_P, _I, _P, _I], lambda p, a, k, d: _write(p, 0)),
            ("_cudaOccupancyMaxActiveBlocksPerMultiprocessor", [_P, _P, _I, _L], lambda p, *a: _write(p, 1)),
            ("_cudaDeviceSynchronize", [], lambda: 0),
            ("_cudaStreamSynchronize", [_P], lambda s: 0),
        ]
        for name, argtypes, function in symbols:
            callback = ctypes.CFUNCTYPE(_I, *argtypes)(function)
            self.callbacks.append(callback)
            engine.raw_register_runtime(name, ctypes.cast(callback, _P))

    def attribute(self, number):
        """cudaDeviceGetAttribute."""
        session = self.owner.session if self.owner else None
        if number == _SM_COUNT and session is not None:
            return session.sm_count
        digits = re.search(r"\d+", self.owner.arch).group() if self.owner else "90"
        return {_MAJOR: int(digits[:-1]), _MINOR: int(digits[-1])}.get(number, _ATTRIBUTES.get(number, 0))

    def set_attribute(self, kernel, attribute, value, *device):
        """cudaFuncSetAttribute, cudaKernelSetAttributeForDevice."""
        if attribute == _FUNCTION_CARVEOUT:
            self.carveouts[kernel] = value
        return 0

    def get_kernel(self, out, library, name):
        self.names.append(ctypes.string_at(name).decode())
        return _write(out, len(self.names), ctypes.c_uint64)

    def launch_ex(self, config, kernel, args):
        raw = ctypes.string_at(config, 56)  # cudaLaunchConfig_t
        grid, block = struct.unpack_from("<3I", raw, 0), struct.unpack_from("<3I", raw, 12)
        smem, _, attrs, count = struct.unpack_from("<QQQI", raw, 24)
        cluster, attributes = (1, 1, 1), {}
        for i in range(count):  # cudaLaunchAttribute: id, pad, 64-byte value
            item = ctypes.string_at(attrs + 72 * i, 72)
            name = struct.unpack_from("<i", item)[0]
            if name == _CLUSTER:
                cluster = tuple(max(1, x) for x in struct.unpack_from("<3I", item, 8))
            elif name == _PDL:
                attributes["pdl"] = bool(struct.unpack_from("<i", item, 8)[0])
            elif name == _LAUNCH_CARVEOUT:
                attributes["carveout"] = struct.unpack_from("<i", item, 8)[0]
        return self.launch(kernel, grid, block, smem, args, cluster, **attributes)

    def launch_plain(self, kernel, gx, gy, gz, bx, by, bz, args, smem, stream):
        return self.launch(kernel, (gx, gy, gz), (bx, by, bz), smem, args, (1, 1, 1))

    def launch(self, kernel, grid, block, smem, args, cluster, **attributes):
        """Copy the parameters by the sizes the PTX declares and run; exceptions wait for the caller."""
        if self.error is not None:
            return 1
        try:
            name, loaded = self.names[kernel - 1], self.owner.module
            declared = loaded.program(name, self.owner.session.options.arithmetic).kernel
            data = np.zeros(max(declared.param_bytes, 16), np.uint8)
            pointers = (ctypes.c_void_p * len(declared.params)).from_address(args)
            for param, pointer in zip(declared.params, pointers):
                data[param.offset : param.offset + param.size] = np.frombuffer(
                    ctypes.string_at(pointer, param.size), np.uint8
                )
            attributes.setdefault("carveout", self.carveouts.get(kernel))
            attributes["reads_before_wait"] = self.owner.reads_before_wait
            self.owner.session.launch(loaded, name, grid, block, data, int(smem or 0), cluster, **attributes)
            return 0
        except BaseException as error:  # a ctypes callback must not raise
            self.error = error
            return 1
