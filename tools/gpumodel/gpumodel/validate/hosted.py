"""Host code of CuTe DSL packages on CPU tensors: what it compiles runs in the emulator, as it chose it.

Such host code marks which sizes and strides of its arguments are dynamic, picks a kernel and its tiles, compiles for
the device at hand, and launches on the current stream.  Inside `on_emulator`, the compiler is the emulator's, and
there is a device: the GPU whose recording is made.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from ..constants import H200

_compiled_for: dict[int, str] = {}  # identity of a module's names -> target of its kernels


class Handed:
    """Stands for a tensor that was handed to the DSL: ``fake`` is what a compilation sees, ``tensor`` what a call gets.

    It starts static; its marks make modes dynamic.
    """

    def __init__(self, tensor: Any, align: int | None):
        self.tensor, self.align = tensor, align
        self.shape, self.strides = list(tensor.shape), list(tensor.stride())

    @property
    def fake(self) -> Any:
        """The fake tensor."""
        import cutlass
        import torch
        from cutlass import cute

        types_of = {
            torch.float32: cutlass.Float32, torch.bfloat16: cutlass.BFloat16, torch.float16: cutlass.Float16,
            torch.int32: cutlass.Int32, torch.int64: cutlass.Int64,
        }  # fmt: skip
        return cute.runtime.make_fake_tensor(
            types_of[self.tensor.dtype], tuple(self.shape), stride=tuple(self.strides), assumed_align=self.align
        )

    def mark_layout_dynamic(self, leading_dim: int | None = None) -> Handed:
        """All sizes and strides are dynamic but the stride of the leading mode, which is the last one by default."""
        from cutlass import cute

        leading = len(self.shape) - 1 if leading_dim is None else leading_dim
        self.strides = [1 if i == leading else cute.sym_int64() for i in range(len(self.shape))]
        self.shape = [cute.sym_int() for _ in self.shape]
        return self

    def mark_compact_shape_dynamic(self, mode: int, stride_order: Sequence[int], divisibility: int) -> Handed:
        """The size of the slowest mode is dynamic; that of another one would make strides dynamic."""
        from cutlass import cute

        if mode != 0 or divisibility != 1:
            raise ValueError(f"mode, divisibility: expected 0 and 1, got {mode} and {divisibility}")
        self.shape[0] = cute.sym_int()
        return self


def handed(tensor: Any, assumed_align: int | None = None, enable_tvm_ffi: bool = False) -> Handed:
    """Stands for ``cute.runtime.from_dlpack``."""
    return Handed(tensor, assumed_align)


class Compiler:
    """Stands for ``cute.compile``: compiles for the open session of the emulator."""

    def __init__(self, original: Any):
        self.original = original

    def __getitem__(self, options: object) -> Compiler:
        return self

    def __call__(self, function: Any, *arguments: Any, options: str = "", **named: Any) -> Any:
        from cutlass import cute

        import ptxsim

        def seen(value: Any) -> Any:
            if isinstance(value, Handed):
                return value.fake
            return cute.runtime.make_fake_stream() if is_stream(value) else value

        given = [seen(value) for value in arguments]
        with mock.patch.object(cute, "compile", self.original):
            compiled = ptxsim.compile(function, *given, arch=ptxsim.current().arch, source_lines=False, **named)

        def launch(*values: Any) -> None:
            compiled(*(getattr(value, "tensor", value) for value in values if not is_stream(value)))

        return launch


def is_stream(value: object) -> bool:
    return "stream" in type(value).__name__.lower()


@contextlib.contextmanager
def on_emulator(sms: int, *modules: Any) -> Iterator[None]:
    """Let the host code of modules run: tensors are handed over, and kernels compiled, as this module says.

    Parameters
    ----------
    sms : int
        Multiprocessors of the device.
    *modules : modules
        Names by which they reach the device or the compiler are replaced where they have them.  What they have
        compiled is forgotten if it was for another target.
    """
    import torch
    from cuda.bindings.driver import CUdevice_attribute
    from cutlass import cute
    from cutlass.base_dsl.runtime import cuda as runtime

    import ptxsim

    attributes = {CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: H200.shared_bytes}
    arch = ptxsim.current().arch
    capability = (int(arch[3:-2]), int(arch[-2]))
    target = types.SimpleNamespace(
        device_index=0, arch=arch, major=capability[0], minor=capability[1], num_sms=sms,
        use_packed_fma=capability[0] >= 10, compile_key=(0, arch),
    )  # fmt: skip
    stands = {
        "from_dlpack": handed,
        "gdn_device_target": lambda device: target,
        "gdn_compile_options": lambda device, *options: options,
        "build_and_load_cute_dsl_kernel": lambda module, name, build, **_: build(),
        "get_compute_capability": lambda device: capability,
        "is_cuda_version_at_least": lambda version: True,
    }
    device = {
        "current_stream": lambda *_, **__: types.SimpleNamespace(cuda_stream=0),
        "get_device_capability": lambda *_: capability,
        "get_device_properties": lambda *_: types.SimpleNamespace(multi_processor_count=sms),
    }
    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(cute, "compile", Compiler(cute.compile)))
        for name, value in device.items():
            stack.enter_context(patch(torch.cuda, name, value))
        stack.enter_context(patch(runtime, "get_device_attribute", lambda attribute, *_: attributes[attribute]))
        for names in (names for module in modules for names in namespaces(module)):
            stack.enter_context(mock.patch.dict(names, {n: value for n, value in stands.items() if n in names}))
            if _compiled_for.get(id(names), arch) != arch:
                forget(names)
            _compiled_for[id(names)] = arch
        yield


def namespaces(module: Any) -> list[dict[str, Any]]:
    """Return the names of a module, and of those modules of its package whose functions it has."""
    package, found = module.__name__.split(".")[0], {id(vars(module)): vars(module)}
    for value in vars(module).values():
        if isinstance(value, types.FunctionType) and value.__module__.split(".")[0] == package:
            found[id(value.__globals__)] = value.__globals__
    return list(found.values())


def forget(names: dict[str, Any]) -> None:
    """Forget what a module has compiled."""
    for name, value in names.items():
        if isinstance(value, dict) and ("compiled" in name or "cache" in name.lower()):
            value.clear()
        elif hasattr(value, "cache_clear"):
            value.cache_clear()
