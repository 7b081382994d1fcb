"""The memory behind tensors: everything a call could have written, the gaps of strided views included."""

from __future__ import annotations

from typing import Any

import torch


def storage(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor's memory, gaps between the elements included."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def copy(call: dict[str, Any]) -> dict[str, Any]:
    """The same arguments on copies of all memory; values that are not tensors stay."""
    return {name: _at(value, storage(value).clone()) if _is_tensor(value) else value for name, value in call.items()}


def moved(call: dict[str, Any], device: str) -> dict[str, Any]:
    """The same arguments on copies of all memory on another device."""
    return {name: _at(value, storage(value).to(device)) if _is_tensor(value) else value for name, value in call.items()}


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _at(tensor: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """The view of other memory that `tensor` is of its own."""
    view = torch.empty(0, dtype=tensor.dtype, device=memory.device)
    return view.set_(memory.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
