"""The comparison that tests share."""

from __future__ import annotations

import re

import pytest
import torch
from bits import each_same_bits, same_bits


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, bool]
)
def test_the_first_difference_is_told(dtype):
    want = torch.zeros(3, 4).to(torch.bool if dtype is bool else dtype)
    got = want.clone()
    same_bits(got, want)
    got[1, 3] = got[2, 0] = 1
    with pytest.raises(
        AssertionError, match=r"^out: 2 of 12 differ, first at \[1, 3\]: (1|1\.0|True), wanted (0|0\.0|False)$"
    ):
        same_bits(got, want, "out")


def test_bits_are_compared_not_values():
    same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    with pytest.raises(AssertionError, match=re.escape("1 of 1 differ, first at [0]: -0.0, wanted 0.0")):
        same_bits(torch.tensor([-0.0]), torch.tensor([0.0]))


def test_other_types_and_shapes_differ():
    with pytest.raises(AssertionError, match=r"torch.float32 \(2,\), wanted torch.float16 \(2,\)"):
        same_bits(torch.zeros(2), torch.zeros(2).half())
    with pytest.raises(AssertionError, match=r"\(2,\), wanted torch.float32 \(1,\)"):
        same_bits(torch.zeros(2), torch.zeros(1))


def test_each_tensor_is_named():
    with pytest.raises(AssertionError, match="changed: b: 1 of 1 differ"):
        each_same_bits({"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1), "b": torch.zeros(1)}, "changed")
    with pytest.raises(AssertionError, match=r"^1: 1 of 1 differ"):
        each_same_bits([torch.ones(1), torch.ones(1)], [torch.ones(1), torch.zeros(1)])
