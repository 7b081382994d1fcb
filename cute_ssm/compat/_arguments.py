"""Checks of arguments before an operator sees them, which would not name them as their caller does."""

from __future__ import annotations

from torch import Tensor

from cute_ssm.errors import describe


def checked_tensor(name: str, value: object) -> Tensor:
    """Return a value that is a tensor; raise `TypeError` if it is none."""
    if not isinstance(value, Tensor):
        raise TypeError(describe(name, "a torch.Tensor", type(value).__name__))
    return value
