"""A call that must be refused: the error names the argument, and nothing has been written or launched."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import kernel_backends
import pytest
import torch
from bits import same_memory
from memory import copy


def refuses(
    run: Callable[[], object],
    call: Mapping[str, Any],
    name: str,
    error: type[Exception],
    message: str,
    emulated: bool = False,
) -> None:
    """Make a call, and read the error; not a byte of its arguments has changed and nothing was launched.

    Parameters
    ----------
    run : callable
        Makes the call.
    call : mapping
        Its arguments.
    name, error, message
        The argument that the error names, its type, and a pattern that it holds.
    emulated : bool
        Where the compiled kernel would run, not the reference.
    """
    tensors = {n: t for n, t in call.items() if isinstance(t, torch.Tensor) and t.device.type == "cpu"}
    before = copy(tensors)
    launches: list[Any] = []
    with pytest.raises(error, match=message) as caught:
        if emulated:
            with kernel_backends.kernel(checks=False) as session:
                launches = session.launches
                run()
        else:
            run()
    assert re.match(rf"{name}: expected .+, got .", str(caught.value), re.DOTALL), str(caught.value)
    for n, tensor in tensors.items():
        same_memory(tensor, before[n], f"{n} was written before the error")
    assert not launches
