"""Checks of the arguments of pools, and of pairs of pools."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.ops._arguments import check_allocated as check_allocated
from cute_ssm.ops._arguments import refuse_slot as refuse_slot
from cute_ssm.spec import Spec


def check_equal(what: str, own: object, other: object) -> None:
    if own != other:
        raise ValueError(describe(f"destination_pool: {what}", own if isinstance(own, str) else repr(own), other))


def as_slot(name: str, slot: object) -> int:
    """Return a slot as an int."""
    try:
        return operator.index(slot)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(describe(name, "an int, or a tensor of slots", type(slot).__name__)) from None


def check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(describe(name, "a positive integer", value))


def check_types(
    state_dtype: torch.dtype, input_dtype: torch.dtype, conv_shape: tuple[int, int] | None, conv_dtype: Any
) -> None:
    given = {"state_dtype": state_dtype, "input_dtype": input_dtype, "conv_dtype": conv_dtype}
    for name, dtype in given.items():
        if not isinstance(dtype, torch.dtype) and not (dtype is None and name == "conv_dtype"):
            raise TypeError(describe(name, "a torch.dtype", repr(dtype)))
    if conv_shape is not None:
        if not isinstance(conv_shape, Sequence) or isinstance(conv_shape, str):
            raise TypeError(describe("conv_shape", "(channels, width), the shape of the weight", repr(conv_shape)))
        if len(conv_shape) != 2:
            raise ValueError(describe("conv_shape", "(channels, width), the shape of the weight", repr(conv_shape)))
        channels, width = conv_shape
        check_sizes(**{"conv_shape: channels": channels, "conv_shape: width": width})


def check_seed(seed: object, name: str = "seed") -> None:
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise TypeError(describe(name, "an int or None", repr(seed)))


def check_spec(spec: Spec, names: Mapping[str, str]) -> None:
    """Check a spec, and report errors with the pool's names of its fields."""
    try:
        spec.check()
    except UnsupportedSpecError as error:
        field, colon, text = str(error).partition(":")
        raise UnsupportedSpecError(names.get(field, field) + colon + text) from None
