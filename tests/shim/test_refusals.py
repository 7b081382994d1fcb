"""What goes wrong between an operator and a GPU reaches the caller, and no launch follows."""

from __future__ import annotations

import threading

import pytest
import torch
from bits import same_bits
from shim import on_device

import cute_ssm
from cute_ssm import runtime, workloads
from cute_ssm.errors import CuteSsmError
from cute_ssm.tuner.gate import Gate

pytestmark = pytest.mark.gpu
OP, KEYS = "selective_state_update", {"batch": 3, "nheads": 4}


def tensors(call):
    return {name: value for name, value in call.arguments.items() if isinstance(value, torch.Tensor)}


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


def variants(value):
    """Tensors that are wrong in one way."""
    for dim in range(value.dim()):
        for size in {0, value.shape[dim] - 1} - {value.shape[dim]}:
            yield f"dimension {dim} is {size}", value.narrow(dim, 0, size)
    yield "another type", value.to(torch.float64)
    yield "flat", value.reshape(-1) if value.dim() > 1 else value[None]
    if value.dim():
        yield "no dimensions", value.reshape(-1)[0]


@pytest.mark.parametrize("op", workloads.OPERATORS)
def test_wrong_tensors_after_a_good_call_are_refused_or_fit(driver, op):
    """The memorised plan must not take them: at the end it still launches what it did."""
    driver.execute = False
    call = on_device(workloads.build(op, workloads.small(op)))
    call.run()
    good, refused = driver.launches[-1], 0
    for name, value in tensors(call).items():
        for what, other in variants(value):
            before = len(driver.launches)
            try:
                getattr(cute_ssm, op)(**{**call.arguments, name: other})
            except (ValueError, TypeError):
                refused += 1
                assert len(driver.launches) == before, (name, what)
    assert refused > 3 * len(tensors(call)) // 2
    call.run()
    assert driver.launches[-1].config == good.config


@pytest.mark.parametrize("code", [1, 700, 701])
def test_an_error_of_the_launch_is_raised_and_the_next_call_runs(driver, code):
    import gpushim

    call = on_device(workloads.build(OP, KEYS))
    gate = Gate(call, {})
    for run in (call.run, lambda: (runtime.forget(), call.run())):  # by the memorised plan, and by a kernel loaded anew
        with driver.failing(gpushim.Error(code)), pytest.raises(Exception, match=str(code)) as raised:
            run()
        assert not isinstance(raised.value, (ValueError, TypeError))
        assert gate.problem({}) == ""


def test_first_calls_from_several_threads(driver):
    runtime.forget()
    calls = [on_device(workloads.build(OP, KEYS | {"z": 1}, seed=seed)) for seed in range(4)]
    expected = [workloads.build(OP, KEYS | {"z": 1}, seed=seed) for seed in range(4)]
    errors = []

    def run(call):
        try:
            call.run()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == [] and len(driver.launches) == 4
    for call, other in zip(calls, expected):
        other.run()
        for name, value in call.results().items():
            torch.testing.assert_close(value.cpu(), other.results()[name], rtol=2e-2, atol=2e-2)


def test_capture_of_a_kernel_that_is_not_loaded_says_what_to_do(driver):
    call = on_device(workloads.build(OP, KEYS | {"ngroups": 2}))
    runtime.forget()
    with pytest.raises(CuteSsmError, match="before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        call.run()
    call.run()
    expected = {name: value.clone() for name, value in call.results().items()}
    assert expected and driver.launches


def test_a_kernel_without_its_attribute_of_shared_memory_is_refused(driver):
    """A control: the driver's rule is what lets large configs run."""
    from gpushim.checks import Function

    runtime.forget()
    driver.execute = False
    call = on_device(workloads.build(OP, {"batch": 64, "nheads": 128, "state_dtype": "float32"}, fill=False))
    call.run()
    assert driver.launches[-1].shared > 49152
    for kernel in driver.kernels.values():
        kernel.settings.pop((0, Function.MAX_DYNAMIC_SHARED), None)
    with pytest.raises(Exception, match=r"cudaErrorInvalidValue|Error Code: 1$"):
        call.run()
    assert "bytes of dynamic" in driver.refusals[-1]
    runtime.forget()


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
    here, there = workloads.build(OP, KEYS), on_device(workloads.build(OP, KEYS))
    gate = Gate(there, {})
    assert gate.problem_of_rule(Gate(here, {}).results()) == "" and driver.launches
    call = on_device(workloads.build(OP, KEYS))
    call.run()
    same_bits(call.results()["out"].cpu(), gate.expected["out"].cpu())
