"""Compiled objects called as on a GPU: results, and what reaches the caller when something is wrong."""

import threading

import pytest
import torch
from cutlass.cutlass_dsl.tvm_ffi_provider import CUDADialectError
from small_kernels import LoadTile, Shift, built, loaded

import gpushim
from gpushim.checks import Function
from ptxsim import cubin


def vectors(n=300, device="cuda"):
    return torch.arange(n, dtype=torch.float32, device=device), torch.zeros(n, device=device)


def last_kernel(driver):
    """Return the kernel that was found last."""
    return next(reversed(driver.kernels.values()))


@pytest.fixture(scope="module")
def shift():
    return loaded(Shift)


def test_result_and_launch(driver, shift):
    x, out = vectors()
    shift(x, out, 0)
    assert torch.equal(out.cpu(), torch.arange(300.0) + 1)
    (launch,) = driver.launches
    assert (launch.device, launch.grid, launch.config.block, launch.stream) == (0, (3, 1, 1), (128, 1, 1), 0)
    assert driver.problems == driver.faults == []


def test_arguments_are_checked_before_anything_is_launched(driver, shift):
    x, out = vectors()
    with pytest.raises((TypeError, ValueError)):
        shift(x, out.to(torch.float64), 0)
    with pytest.raises((TypeError, ValueError)):
        shift(x.cpu(), out, 0)
    assert driver.launches == []


def test_cubin_says_what_the_kernel_is():
    (image,) = cubin.images(cubin.of_object(built(Shift, cluster=2)))
    (kernel,) = image.kernels.values()
    assert image.arch == 90 and kernel.reqntid == (128, 1, 1) and kernel.registers > 0
    assert [p.ordinal for p in kernel.params] == list(range(len(kernel.params)))
    assert kernel.params[-1].offset + kernel.params[-1].size == kernel.param_bytes


def test_access_outside_of_all_allocations(driver, shift):
    x, out = vectors()
    with pytest.raises(CUDADialectError):
        shift(x, out, 1 << 30)
    assert "Fault" in type(driver.faults[0]).__name__


def test_memory_of_another_device(driver, shift):
    x, out = vectors()
    there = torch.zeros(300, device="cuda:1")
    distance = (there.data_ptr() - x.data_ptr()) // 4
    with pytest.raises(CUDADialectError):
        shift(x, out, distance)
    assert driver.faults


def test_freed_memory(driver, shift):
    x, out = vectors()
    gone = torch.zeros(1 << 16, device="cuda")
    distance = (gone.data_ptr() - x.data_ptr()) // 4
    shift(x, out, distance)
    del gone
    with pytest.raises(CUDADialectError):
        shift(x, out, distance)


def test_streams(driver, shift):
    x, out = vectors()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        shift(x, out, 0)
    shift(x, out, 0)
    assert [launch.stream for launch in driver.launches] == [stream.cuda_stream, 0]


def test_stream_of_another_device(driver, shift, monkeypatch):
    x, out = vectors()
    stream = torch.cuda.Stream(device=1)
    monkeypatch.setitem(driver.streams, 0, 1)
    with pytest.raises(CUDADialectError):
        shift(x, out, 0)
    assert "stream 0x0 is not one of device 0" in driver.refusals[-1] and stream.device.index == 1


def test_two_devices_of_two_architectures(driver):
    for current in (0, 1):
        for device, arch in enumerate(["sm_90a", "sm_100a"]):
            driver.device = current
            x, out = vectors(device=f"cuda:{device}")
            loaded(Shift, arch)(x, out, 0)
            assert torch.equal(out.cpu(), torch.arange(300.0) + 1)
            assert driver.launches[-1].device == device and driver.device == current


def test_code_of_another_architecture(driver):
    x, out = vectors(device="cuda:1")
    with pytest.raises(CUDADialectError):
        loaded(Shift, "sm_90a")(x, out, 0)
    assert any("code for sm_90, the device is sm_100a" in words for words in driver.refusals)
    assert driver.launches == []


def test_large_shared_memory_is_asked_for_before_the_launch(driver):
    x, out = vectors()
    function = loaded(Shift, shared=200_000)
    function(x, out, 0)
    assert driver.launches[-1].shared == 200_000
    del last_kernel(driver).settings[0, Function.MAX_DYNAMIC_SHARED]  # as if the object had not asked
    with pytest.raises(CUDADialectError):
        function(x, out, 0)
    assert "200000 bytes of dynamic" in driver.refusals[-1]


def test_cluster(driver):
    x, out = vectors()
    loaded(Shift, cluster=2)(x, out, 0)
    assert driver.launches[-1].cluster == (2, 1, 1) and driver.launches[-1].grid == (4, 1, 1)
    function = loaded(Shift, cluster=16)
    function(x, out, 0)
    del last_kernel(driver).settings[0, Function.NON_PORTABLE_CLUSTER]
    with pytest.raises(CUDADialectError):
        function(x, out, 0)
    assert "cluster (16, 1, 1)" in driver.refusals[-1]


def test_dependent_launch_without_a_wait(driver):
    x, out = vectors()
    loaded(Shift, pdl=True)(x, out, 0)
    assert driver.launches[-1].pdl and driver.problems == []
    loaded(Shift, pdl=True, wait=False)(x, out, 0)
    (problem,) = driver.problems
    assert "never waits" in problem


def test_tensor_map(driver):
    x = torch.randn(20, 64, device="cuda")
    out = torch.zeros(8, 32, device="cuda")
    loaded(LoadTile)(x, out)
    assert torch.equal(out, x[:8, :32]) and driver.problems == []
    with pytest.raises(ValueError):
        loaded(LoadTile)(x[:, 1:], out)


def test_capture_and_replay(driver, shift):
    x, out = vectors()
    shift(x, out, 0)
    out.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(10)
        shift(x, out, 0)
        doubled = out * 2
    assert not out.cpu().any() and x[0].item() == 0  # nothing has run
    for i in (1, 2):
        graph.replay()
        assert torch.equal(out.cpu(), torch.arange(300.0) + 10 * i + 1)
        assert torch.equal(doubled.cpu(), 2 * (torch.arange(300.0) + 10 * i + 1))


def test_capture_refuses_to_wait_and_to_load(driver):
    x, out = vectors()
    function = loaded(Shift)
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()
    with pytest.raises(RuntimeError, match="StreamCaptureUnsupported"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        function(x, out, 0)
    assert any("loaded while a stream is captured" in words for words in driver.refusals)
    function(x, out, 0)
    assert torch.equal(out.cpu(), torch.arange(300.0) + 1)


def test_launch_beside_the_captured_stream(driver, shift):
    x, out = vectors()
    shift(x, out, 0)
    with torch.cuda.graph(torch.cuda.CUDAGraph()), torch.cuda.stream(torch.cuda.Stream()):
        shift(x, out, 0)
    assert "is captured" in driver.problems[0]


@pytest.mark.parametrize("code", [gpushim.Error.cudaErrorLaunchOutOfResources, gpushim.Error.cudaErrorIllegalAddress])
def test_error_of_a_launch(driver, shift, code):
    x, out = vectors()
    with driver.failing(code), pytest.raises(CUDADialectError, match=str(int(code))):
        shift(x, out, 0)
    shift(x, out, 0)
    assert len(driver.launches) == 1


def test_unknown_ptx(driver, monkeypatch, tmp_path):
    monkeypatch.setattr(driver, "ptx", tmp_path)
    x, out = vectors()
    with pytest.raises(CUDADialectError):
        loaded(Shift)(x, out, 0)
    assert "compile it with gpushim installed" in str(driver.faults[0])


def test_parameters_of_another_binary(driver, monkeypatch):
    x, out = vectors()
    function = loaded(Shift)
    function(x, out, 0)
    kernel = last_kernel(driver).kernel
    monkeypatch.setattr(kernel, "params", [*kernel.params[:-1], kernel.params[-1]._replace(size=8)])
    with pytest.raises(CUDADialectError):
        function(x, out, 0)
    assert "has parameters" in str(driver.faults[0])


def test_first_calls_from_several_threads(driver):
    function, results = loaded(Shift), []

    def call():
        x, out = vectors()
        function(x, out, 0)
        results.append(torch.equal(out.cpu(), torch.arange(300.0) + 1))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [True] * 8
