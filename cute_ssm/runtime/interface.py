"""What a compiled kernel takes, for callers without Python or without torch: the entries of a bundle's manifest.

A kernel is a packed function of TVM-FFI, ``__tvm_ffi_<symbol>`` in its library.  It takes its arguments in order, and
launches on the stream of TVM-FFI's environment for the device of the tensors.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from cute_ssm.ops import operators
from cute_ssm.runtime import registry
from cute_ssm.runtime.store import Key

TYPES = {  # of TVM-FFI's C interface, in a header's comments
    "int32": "int64_t", "int64": "int64_t", "float32": "double", "boolean": "int64_t",
}  # fmt: skip


def entry(key: Key) -> dict[str, Any]:
    """Return symbol and arguments of a kernel.  Imports the compiler; compiles nothing.

    Returns
    -------
    dict
        ``symbol``; ``notes``, what its sizes and scalars mean; and ``arguments``, each with a ``name`` and a ``kind``:

        - ``"tensor"``, with ``dtype``, ``shape``, ``strides``, ``align``, ``written``.  A size is a number, or where it
          is found: ``"x.1"`` is the size of dimension 1 of x, and may be anything there.  A stride is a number of
          elements, or ``"8n"``: any multiple of 8.  ``align`` is that of the address, in bytes;
        - ``"none"``: this kernel is for calls without the argument; pass None (``kTVMFFINone``);
        - the type of a scalar.
    """
    kernel = registry.kernel_class(key.spec)(key.spec, key.config, key.arch)
    call = type(kernel).__call__
    names = [name for name in inspect.signature(call).parameters if name not in ("self", "stream")]
    written = _written(key)
    seen: dict[int, str] = {}
    arguments = []
    for name, fake in zip(names, kernel.fakes()):
        arguments.append({"name": name, **_argument(name, fake, seen, name in written or written == {"*"})})
    return {"symbol": key.function, "notes": inspect.getdoc(call) or "", "arguments": arguments}


def _written(key: Key) -> set[str]:
    """Return the names of the arguments that a kernel may write; ``{"*"}`` if nothing says so."""
    found = [operator for operator in operators() if operator.spec_class is type(key.spec)]
    if not found:
        return {"*"}
    table = found[0].module("arguments").TABLE
    call = registry.kernel_class(key.spec).__call__
    scratch = {name for name in inspect.signature(call).parameters if name not in table.tensors}
    return {*table.written, *scratch}


def _argument(name: str, fake: Any, seen: dict[int, str], written: bool) -> dict[str, Any]:
    if fake is None:
        return {"kind": "none"}
    if not hasattr(fake, "shape"):
        return {"kind": type(fake).__name__.lower()}
    shape = [
        size if isinstance(size, int) else seen.setdefault(id(size), f"{name}.{axis}")
        for axis, size in enumerate(fake.shape)
    ]
    strides = [step if isinstance(step, int) else f"{step.divisibility}n" for step in fake.stride]
    dtype = fake.element_type.__name__.lower()
    return {
        "kind": "tensor", "dtype": dtype, "shape": shape, "strides": strides, "align": fake._assumed_align,
        "written": written,
    }  # fmt: skip


def header(manifest: Iterable[Mapping[str, Any]]) -> str:
    """Return a C header that declares the kernels of a manifest, with their arguments in comments."""
    parts = [
        "/* Kernels of cute_ssm, compiled ahead of time.  Each is a packed function of TVM-FFI: call it with num_args",
        "   arguments in the order that its comment gives, tensors as DLTensor pointers (kTVMFFIDLTensorPtr).  It",
        "   launches on the stream that TVMFFIEnvSetStream has set for the device.  Link with, or load,",
        "   libcute_dsl_runtime.so and libtvm_ffi.so. */",
        "#pragma once",
        "#include <tvm/ffi/c_api.h>",
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
    ]
    for kernel in manifest:
        parts += ["", f"/* {kernel['file']}"]
        for number, argument in enumerate(kernel["arguments"]):
            parts.append(f"   {number:2} {argument['name']}: {_words(argument)}")
        parts += textwrap.indent(kernel["notes"], "   ").replace("*/", "* /").splitlines()
        parts[-1] += " */"
        symbol = kernel["symbol"]
        parts.append(
            f"int __tvm_ffi_{symbol}(void* handle, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result);"
        )
        parts.append(f"#define {symbol.upper()}_NUM_ARGS {len(kernel['arguments'])}")
    return "\n".join([*parts, "", "#ifdef __cplusplus", "}", "#endif", ""])


def _words(argument: Mapping[str, Any]) -> str:
    if argument["kind"] == "none":
        return "None"
    if argument["kind"] != "tensor":
        return TYPES.get(str(argument["kind"]), str(argument["kind"]))
    sizes = f"{argument['dtype']} [{', '.join(map(str, argument['shape']))}]"
    strides = f"strides [{', '.join(map(str, argument['strides']))}]"
    written = ", written" if argument["written"] else ""
    return f"{sizes}, {strides}, {argument['align']} bytes{written}"
