"""GPUs that are not there (`tools/gpushim`): its own tests, and tests of GPUs on them, each in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from paths import ROOT

pytestmark = [
    pytest.mark.wide,
    pytest.mark.skipif(torch.version.cuda is not None, reason="needs a build of PyTorch without CUDA"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]


def passes(*arguments: str) -> str:
    """Run pytest in a new process; return its last line."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def test_every_rule_of_the_driver_holds():
    assert "passed" in passes("tools/gpushim/tests")


def test_operators_run_by_their_own_host_code():
    last = passes(
        "--shim", "sm_90a,sm_100a", "-m", "gpu", "tests/shim", "tests/test_gpu.py", "tests/ops/test_serving_gpu.py"
    )
    assert "passed" in last
