"""The gate before a time: how far results may be from those of the reference."""

from __future__ import annotations

import pytest
import torch

from cute_ssm.tuner import gate

CASES = {
    "float8_e4m3fn": (448, 416, 352),
    "bfloat16": (448, 440, 416),
    "float32": (448, 440, 416),
    "int8": (100, 96, 90),
}


@pytest.mark.parametrize(("dtype", "values"), CASES.items(), ids=CASES)
def test_what_rounding_explains_is_allowed(dtype, values):
    """Of float8 one step at the largest value, which is coarser than what is allowed of the other types."""
    want, near, far = (torch.tensor([float(value), 0.0]).to(getattr(torch, dtype)) for value in values)
    assert gate._far("state", near, want) == ""
    assert gate._far("state", far, want).startswith("state differs from the reference by")
