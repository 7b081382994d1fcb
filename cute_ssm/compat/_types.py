"""Rows of several types, which peers' kernels take and the operators do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def of_one_type(*rows: Any) -> list[Any]:
    """Return the tensors, as float32 if their types differ; others than of floats are left to the operator's checks."""
    types = {tensor.dtype for tensor in rows if isinstance(tensor, Tensor)}
    if len(types) == 1 or not types <= {torch.float32, torch.bfloat16, torch.float16}:
        return list(rows)
    return [tensor.float() if isinstance(tensor, Tensor) else tensor for tensor in rows]
