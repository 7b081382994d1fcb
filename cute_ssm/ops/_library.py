"""Registration of operators with PyTorch, by the low-level `torch.library.Library`.

`torch.library.custom_op` would cost tens of microseconds a call; this costs a few, and eager calls bypass even that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "cute_ssm"
_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def register(schema: str, implementation: Callable[..., None], fake: Callable[..., None]) -> Callable[..., None]:
    """Define an operator that mutates arguments and returns nothing; give back its ``torch.ops`` overload.

    Parameters
    ----------
    schema : str
        ``"name(Tensor(a!) state, ...) -> ()"``.
    implementation : callable
        Runs the operator on CPU and CUDA tensors alike.
    fake : callable
        Its shape function; returns None like the operator.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    overload: Callable[..., None] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return overload
