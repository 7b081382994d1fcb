"""A package that is not installed is named with the command that installs it."""

import sys

import pytest

from ptxsim import triton_hook


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"triton: .*pip install 'triton>="):
        triton_hook.compile_kernel(None, {}, {})
