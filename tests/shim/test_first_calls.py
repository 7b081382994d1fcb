"""The first call of a kernel, which loads its library: from threads, in a capture, and on which devices."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from shim import forget, on_device

from cute_ssm import workloads
from cute_ssm.errors import CuteSsmError
from cute_ssm.tuner.gate import Gate

pytestmark = pytest.mark.gpu
OP, KEYS = "selective_state_update", {"batch": 3, "nheads": 4}
# Two threads a kernel, and two devices.
CALLS = [(OP, KEYS | {"z": z}, device) for z in (0, 1) for device in (0, 1)] * 2


def in_threads(calls):
    """Make calls at the same time; return the errors, and whether all have ended."""
    errors, together = [], threading.Barrier(len(calls))

    def run(call):
        try:
            together.wait()
            call.run()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return errors, not any(thread.is_alive() for thread in threads)


def test_threads_load_a_kernel_once_and_get_their_own_results(driver):
    forget()
    known = len(driver.libraries)
    calls = [on_device(workloads.build(op, keys, seed=i), device) for i, (op, keys, device) in enumerate(CALLS)]
    assert in_threads(calls) == ([], True)
    assert len(driver.libraries) == known + 4  # of two kernels for two targets
    assert len(driver.launches) == len(calls)
    for i, (call, (op, keys, _)) in enumerate(zip(calls, CALLS)):
        expected = Gate(workloads.build(op, keys, seed=i), {}).results()
        for name, value in call.results().items():
            torch.testing.assert_close(value.cpu(), expected[name], rtol=2e-2, atol=2e-2)


ALONE = """
import faulthandler, sys
faulthandler.dump_traceback_later(180, exit=True)  # ends threads that wait for each other
sys.path[:0] = sys.argv[1:]
import torch
from test_first_calls import CALLS, in_threads
from shim import on_device
from cute_ssm import workloads
calls = [on_device(workloads.build(*call), device) for *call, device in CALLS]
errors, ended = in_threads(calls)
print(errors, ended, flush=True)
"""


def test_threads_that_keep_the_lock_of_python_do_not_wait_for_each_other(driver, request):
    """The runtime's lock spins. A thread that spun with Python's lock would stop gpushim's part of the other's load."""
    folder = request.config.cache.mkdir("gpushim")
    here, support = os.path.dirname(__file__), os.path.dirname(sys.modules["shim"].__file__)
    variables = {"TVM_FFI_RELEASE_GIL_BY_DEFAULT": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["-m", "gpushim", "--devices", "sm_90a,sm_100a", "--folder", str(folder), "--"]
    done = subprocess.run(
        [sys.executable, *command, sys.executable, "-c", ALONE, support, here],
        env=os.environ | variables, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "[] True\n", done.stderr


def test_capture_of_a_kernel_that_is_not_loaded_says_what_to_do(driver):
    call = on_device(workloads.build(OP, KEYS | {"ngroups": 2}))
    forget()
    with pytest.raises(CuteSsmError, match="before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        call.run()
    call.run()
    expected = {name: value.clone() for name, value in call.results().items()}
    assert expected and driver.launches


def test_a_kernel_is_loaded_for_every_visible_device(driver):
    """As docs/guides/cuda-graphs.md says: there is nothing that a package can do about it."""
    forget()
    on_device(workloads.build(OP, KEYS)).run()
    assert any("code for sm_90, the device is sm_100a" in words for words in driver.refusals)
