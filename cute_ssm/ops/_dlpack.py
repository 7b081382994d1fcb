"""Arrays of other libraries as arguments: an object with ``__dlpack__`` is taken as a tensor on the same memory.

Operators are written for tensors.  The check that finds an argument that is none raises `NotTensorError`; the operator
catches it and calls itself `again`, with views.  So calls with tensors pay nothing.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from cute_ssm.errors import describe

EXPECTED = "a torch.Tensor, or an array with __dlpack__"
Result = TypeVar("Result")
_READ_ONLY = 1  # of DLManagedTensorVersioned.flags
_FLAGS_OFFSET = 24  # behind the version, the manager's context and the deleter


class NotTensorError(TypeError):
    """An argument is no `torch.Tensor`."""


def not_tensor(name: str, value: object) -> NotTensorError:
    """Return the error that names an argument that is no tensor."""
    return NotTensorError(describe(name, EXPECTED, type(value).__name__))


def again(function: Callable[..., Result], arguments: Mapping[str, Any], *written: str) -> Result:
    """Call an operator again with views of its arrays; call it where `NotTensorError` is handled.

    Parameters
    ----------
    function : callable
        The operator.
    arguments : mapping
        Its arguments by name, as the caller gave them, and possibly other names, which are ignored.
    written : str
        Names of the arguments that it may write.

    Raises
    ------
    NotTensorError
        No argument is an array: the error that is being handled.
    ValueError, TypeError
        An array is read-only and is written, or cannot be exported.
    """
    parameters = inspect.signature(function).parameters
    views = {
        name: view(name, arguments[name], name in written)
        for name in parameters
        if hasattr(arguments[name], "__dlpack__") and not isinstance(arguments[name], Tensor)
    }
    if not views:
        raise
    return function(**{name: views.get(name, arguments[name]) for name in parameters})


def view(name: str, array: Any, written: bool = False) -> Tensor:
    """Return a tensor on the memory of an array, on its device.

    Parameters
    ----------
    name : str
        For messages.
    array : object
        With ``__dlpack__`` and ``__dlpack_device__``, as the array API standard defines them.
    written : bool
        Whether the tensor will be written.

    Raises
    ------
    ValueError
        The array is read-only, but written.  Arrays of JAX count as such: DLPack does not say so, but nothing else may
        change them.
    TypeError
        The array cannot be exported, as NumPy's of ``ml_dtypes.bfloat16``.
    """
    if written and type(array).__module__.partition(".")[0] in ("jax", "jaxlib"):
        raise _read_only(name, "an array of JAX, which nothing may change")
    try:
        where = {}
        kind, index = array.__dlpack_device__()
        if kind == torch.utils.dlpack.DLDeviceType.kDLCUDA:
            # 1 is CUDA's legacy default stream, whose handle in PyTorch is 0
            where["stream"] = torch.cuda.current_stream(index).cuda_stream or 1
        try:
            capsule = array.__dlpack__(**where, max_version=(1, 0))
        except TypeError:  # a library older than DLPack 1.0, which cannot say what is read-only
            capsule = array.__dlpack__(**where)
        if written and _flags(capsule) & _READ_ONLY:
            raise _read_only(name, "a read-only array")
        found: Tensor = torch.utils.dlpack.from_dlpack(capsule)
        return found
    except (BufferError, RuntimeError, TypeError) as error:
        expected = "an array that can be exported by DLPack"
        fix = f"{error}; pass a view of a type that can, and torch.Tensor.view of it"
        raise TypeError(describe(name, expected, f"{type(array).__name__} of {array.dtype}", fix)) from error


def _read_only(name: str, got: str) -> ValueError:
    return ValueError(describe(name, "writable memory, as it is written", got, "pass an array that may be changed"))


def _flags(capsule: Any) -> int:
    """Return the flags of a capsule; those before DLPack 1.0 have none."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    valid = ctypes.pythonapi.PyCapsule_IsValid
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    valid.argtypes = pointer.argtypes
    if not valid(capsule, b"dltensor_versioned"):
        return 0
    return ctypes.c_uint64.from_address(pointer(capsule, b"dltensor_versioned") + _FLAGS_OFFSET).value
