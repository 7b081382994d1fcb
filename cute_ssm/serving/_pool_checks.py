"""Checks of what pools are made of, and of pairs of pools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.spec import Spec


def check_equal(what: str, own: object, other: object) -> None:
    if own != other:
        raise ValueError(describe(f"destination_pool: {what}", own if isinstance(own, str) else repr(own), other))


def check_allocated(name: str, slots: Tensor, unallocated: Tensor, rows: Tensor, pad_slot_id: int) -> None:
    """Raise if a slot of `rows`, a mask, is one that no sequence has; all tensors are on the CPU, slots in range."""
    closed = unallocated[slots.where(rows, 0)] & rows if len(unallocated) else torch.zeros_like(rows)
    if bool(closed.any()):
        at = int(closed.nonzero()[0])
        fix = f"take slots by allocate(); rows that are padding have {pad_slot_id}"
        raise ValueError(describe(name, "allocated slots", f"slot {int(slots[at])} at position {at}", fix))


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
        channels, width = conv_shape
        check_sizes(**{"conv_shape: channels": channels, "conv_shape: width": width})


def check_spec(spec: Spec, names: Mapping[str, str]) -> None:
    """Raise as a spec does, by the names that a pool has for its fields."""
    try:
        spec.check()
    except UnsupportedSpecError as error:
        field, colon, text = str(error).partition(":")
        raise UnsupportedSpecError(names.get(field, field) + colon + text) from None
