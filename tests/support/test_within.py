"""A comparison within bounds says where it fails first."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from bounds import like_float32, rms_within, within


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_the_first_index_out_of_bounds_is_told(dtype):
    want = torch.ones(3, 4)
    got = want.to(dtype).clone()
    within(got, want, 0.0, "out")
    got[1, 3], got[2, 0] = 2, 4
    message = "out[1, 3]: got 2, wanted 1, error 1 exceeds the bound 0.5; so do 2 of 12"
    with pytest.raises(AssertionError, match=f"^{re.escape(message)}$"):
        within(got, want, 0.5, "out")


def test_the_bound_is_that_of_the_element():
    got, want = np.array([1.0, 2.0]), np.array([1.5, 2.5])
    within(got, want, np.array([0.5, 0.5]), "out")
    with pytest.raises(AssertionError, match=r"^out\[1\]: .* the bound 0\.25; so do 1 of 2$"):
        within(got, want, np.array([0.5, 0.25]), "out")


@pytest.mark.parametrize(("got", "want", "bound"), [(np.nan, 1.0, 9.0), (1.0, np.nan, 9.0), (1.0, 1.0, np.nan)])
def test_a_nan_is_never_within_a_bound(got, want, bound):
    with pytest.raises(AssertionError, match=r"^out\[0\]: "):
        within(np.array([got]), np.array([want]), bound, "out")


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match=r"out: shape \(2,\), wanted \(1,\)"):
        within(torch.zeros(2), torch.zeros(1), 1.0, "out")


def test_errors_may_be_half_again_those_of_float32():
    want = torch.full((1000,), 3.0, dtype=torch.float64)
    rounded = want + 1e-3
    like_float32([want + 1.4e-3], [rounded], [want], [torch.tensor(2.0)], ["state"])
    with pytest.raises(
        AssertionError, match=r"^state\[0\]: got 3\.0016, wanted 3, error 0\.0016 exceeds the bound 0\.0015;"
    ):
        like_float32([want + 1.6e-3], [rounded], [want], [torch.tensor(2.0)], ["state"])


def test_parts_are_judged_together_and_named():
    want, unit = [torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.ones(3)]
    rounded = [torch.tensor([0.0, 0.1]), torch.zeros(3)]
    like_float32([torch.zeros(2), torch.tensor([0.0, 0.0, 0.1])], rounded, want, unit, ["part 0", "part 1"])
    with pytest.raises(AssertionError, match=r"^part 1\[2\]: got 0\.2"):
        like_float32([torch.zeros(2), torch.tensor([0.0, 0.0, 0.2])], rounded, want, unit, ["part 0", "part 1"])


def test_many_small_errors_are_found_in_mean_square():
    want, unit = [torch.zeros(100)], [torch.ones(100)]
    rounded = [torch.zeros(100)]
    rounded[0][0] = 0.1
    with pytest.raises(
        AssertionError, match=r"out \(in its units\): each element is within its bound, but the rms error"
    ):
        like_float32([torch.full((100,), 0.1)], rounded, want, unit, ["out"])
    rms_within(0.5, 0.5, "out")
