"""``pytest --gpu``: what stands for the emulator then, with the reference in the GPU's place."""

from __future__ import annotations

import hardware
import kernel_backends
import pytest
import scan_cases
import step_cases
import torch
from bits import equal
from memory import copy, storage

from cute_ssm import arch, runtime, tuning


@pytest.fixture
def pretended(monkeypatch):
    """A GPU whose kernels are functions on the CPU that note their arguments."""
    calls = []
    properties = type("Properties", (), {"multi_processor_count": 7})
    monkeypatch.setattr(arch, "of_device", lambda _: arch.SM_90A)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(runtime, "get", lambda *key: lambda *arguments: calls.append((key, arguments)))
    real = hardware.round_trip
    monkeypatch.setattr(hardware, "round_trip", lambda f, a, _: real(f, a, torch.device("cpu")))
    monkeypatch.setattr(kernel_backends, "gpu", True)
    return calls


def test_kernels_get_copies_of_all_memory_with_its_layout(pretended):
    call = step_cases.arguments(step_cases.Case(strided=True, layout="tied"))
    with kernel_backends.kernel() as session:
        step_cases.cute_ssm.selective_state_update(**call)
        assert len(session.launches) == 1
        assert session.sm_count == 7
    (((spec, config, target), arguments),) = pretended
    assert target is arch.SM_90A
    config.check(spec, target)
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    assert tensors
    (state, x, dt, *_) = arguments
    assert state.stride() == call["state"].stride()
    assert dt.stride()[-1] == 0
    assert state.data_ptr() != call["state"].data_ptr()
    assert state.untyped_storage().nbytes() == call["state"].untyped_storage().nbytes()
    equal(x, call["x"])


def test_results_come_back(pretended):
    source, target = torch.arange(6.0).view(2, 3)[:, :2], torch.zeros(8)[2:4]

    def kernel(a, b):
        b.copy_(a[1])

    hardware.round_trip(kernel, (source, target), torch.device("cpu"))
    assert target.tolist() == [3.0, 4.0]


def test_what_only_an_emulator_can_do_is_skipped(pretended):
    with pytest.raises(pytest.skip.Exception, match="the test for sm_100a"), kernel_backends.kernel("sm_100a"):
        pass
    with kernel_backends.kernel() as session, pytest.raises(pytest.skip.Exception, match="counters"):
        assert session.counters
    assert runtime.emulator() is None


def test_plans_are_plans_still(pretended):
    from cute_ssm.workloads import plan

    with kernel_backends.kernel() as session:
        assert len(plan.of_call("selective_state_update", {"batch": 2}, arch.SM_90A)) == 1
        assert session.launches == []


@pytest.mark.parametrize("splits", [1, 2])
def test_a_session_counts_the_kernels_of_a_call(pretended, splits):
    call = scan_cases.arguments(scan_cases.Case(lengths=(64,), nulls=()))
    with kernel_backends.kernel() as session, tuning.override(splits=splits):
        step_cases.cute_ssm.selective_scan(**call)
        assert len(session.launches) == splits


def test_copies_of_a_call_stay_on_its_device():
    value = torch.empty(4, 4, dtype=torch.float16, device="meta")[:, 1:3]
    twin = copy({"x": value})["x"]
    assert (twin.device, twin.stride(), twin.storage_offset()) == (value.device, value.stride(), 1)
    assert storage(value).device == value.device
    assert storage(value).numel() == 32
