"""`refuses` fails where a call returns, blames another argument, or has written."""

from __future__ import annotations

import pytest
import torch
from refusals import refuses


def refused(name: str = "x", write: bool = False):
    call = {"x": torch.zeros(3)}

    def run():
        if write:
            call["x"][1] = 1.0
        raise ValueError(f"{name}: expected more, got 3")

    refuses(run, call, "x", ValueError, "expected more")


def test_a_call_that_is_refused_in_time():
    refused()


def test_a_call_that_returns():
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refuses(lambda: None, {}, "x", ValueError, "")


def test_another_argument_is_blamed():
    with pytest.raises(AssertionError, match="y: expected more"):
        refused(name="y")


def test_something_was_written_before_the_error():
    with pytest.raises(AssertionError, match="x was written before the error"):
        refused(write=True)
