"""Calls with one broken argument, whose errors must name it as the caller does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from bits import same_bits


def check(function: Callable[..., object], given: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Break every argument once in each way, and find its name in front of the error.

    Parameters
    ----------
    given : mapping
        Arguments of a valid call.
    values : mapping
        More values that are wrong.
    """
    before = {name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
    wrong: list[tuple[str, Any]] = list(values.items())
    for name, value in given.items():
        wrong.append((name, "text"))
        if isinstance(value, torch.Tensor):
            wrong += [(name, value[None, None]), (name, value.bool())]
    for name, value in wrong:
        with pytest.raises((ValueError, TypeError)) as raised:
            function(**{**given, name: value})
        assert str(raised.value).startswith(f"{name}: "), f"{name} = {value!r:.40}: {raised.value}"
    for name, tensor in before.items():
        same_bits(given[name], tensor, name)
    function(**given)
