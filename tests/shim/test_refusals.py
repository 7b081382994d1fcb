"""What goes wrong between an operator and a GPU reaches the caller, and no launch follows."""

from __future__ import annotations

import pytest
from bits import same_bits
from shim import forget, on_device, tensors

import cute_ssm
from cute_ssm import runtime, workloads
from cute_ssm.tuner.gate import Gate

pytestmark = pytest.mark.gpu
OP, KEYS = "selective_state_update", {"batch": 3, "nheads": 4}


@pytest.mark.parametrize("op", [OP, "checkpointing_ssu"])
def test_arguments_on_two_devices_are_refused(driver, op):
    """Also after a call whose plan is memorised."""
    good = on_device(workloads.build(op, KEYS), 1)
    good.run()
    driver.launches.clear()
    for name, value in tensors(good).items():
        for device in ("cuda:0", "cpu"):
            call = {**good.arguments, name: value.to(device)}
            with pytest.raises((ValueError, TypeError), match=name):
                getattr(cute_ssm, op)(**call)
    assert driver.launches == []


@pytest.mark.parametrize("code", [1, 700, 701])
def test_an_error_of_the_launch_is_raised_and_the_next_call_runs(driver, code):
    import gpushim

    call = on_device(workloads.build(OP, KEYS))
    gate = Gate(call, {})
    for run in (call.run, lambda: (forget(), call.run())):  # by the memorised plan, and by a kernel loaded anew
        with driver.failing(gpushim.Error(code)), pytest.raises(Exception, match=str(code)) as raised:
            run()
        assert not isinstance(raised.value, (ValueError, TypeError))
        assert gate.problem({}) == ""


def test_a_kernel_without_its_attribute_of_shared_memory_is_refused(driver):
    """A control: the driver's rule is what lets large configs run."""
    from gpushim.checks import Function

    forget()
    driver.execute = False
    call = on_device(workloads.build(OP, {"batch": 64, "nheads": 128, "state_dtype": "float32"}, fill=False))
    call.run()
    assert driver.launches[-1].shared > 49152
    for kernel in driver.kernels.values():
        kernel.settings.pop((0, Function.MAX_DYNAMIC_SHARED), None)
    with pytest.raises(Exception, match=r"cudaErrorInvalidValue|Error Code: 1$"):
        call.run()
    assert "bytes of dynamic" in driver.refusals[-1]
    forget()


def test_bundles_run_with_the_compiler_blocked(driver, tmp_path, settings, monkeypatch):
    from cute_ssm.arch import SM_90A
    from cute_ssm.runtime import compiler
    from cute_ssm.workloads import plan

    ((spec, config, arch),) = plan.of_call(OP, KEYS, SM_90A, 132)
    runtime.bundle_to(tmp_path, spec, config, arch)
    settings(AOT_DIR=tmp_path)

    def blocked(*_):
        raise AssertionError("the compiler is asked")

    monkeypatch.setattr(compiler, "compile_kernel", blocked)
    monkeypatch.setattr(compiler, "load", blocked)
    forget()
    known = len(driver.libraries)
    here, there = workloads.build(OP, KEYS), on_device(workloads.build(OP, KEYS))
    gate = Gate(there, {})
    assert gate.problem_of_rule(Gate(here, {}).results()) == "" and driver.launches
    call = on_device(workloads.build(OP, KEYS))
    call.run()
    same_bits(call.results()["out"].cpu(), gate.expected["out"].cpu())
    assert len(driver.libraries) == known + 1
    forget()
