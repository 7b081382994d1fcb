"""Names of arguments in errors: those of the caller, which an operator does not know."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from cute_ssm.errors import describe


def checked_tensor(name: str, value: object) -> Tensor:
    """Return a value that is a tensor; raise `TypeError` if it is none."""
    if not isinstance(value, Tensor):
        raise TypeError(describe(name, "a torch.Tensor", type(value).__name__))
    return value


def rename(error: Exception, names: Mapping[str, str]) -> None:
    """Put what the message of an operator's error says, such as an argument's name, in the caller's words."""
    text = str(error)
    for name, other in names.items():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", other, text)
    error.args = (text,)
