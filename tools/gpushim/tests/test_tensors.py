"""CUDA tensors of a CPU build behave as a GPU's do, as far as tests of kernels need."""

import gc

import pytest
import torch


def test_views_share_memory():
    x = torch.zeros(4, 6, device="cuda")
    x[1:, ::2].view(torch.int32).fill_(7)
    assert x.is_cuda and (x.view(torch.int32) == 7).sum().item() == 9
    assert x.t()[2].data_ptr() == x.data_ptr() + 8 and x.untyped_storage().device.type == "cuda"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.int64])
def test_types(dtype):
    x = torch.ones(3, device="cuda:1").to(dtype)
    assert (x.dtype, x.device.index) == (dtype, 1) and torch.equal(x.cpu(), torch.ones(3).to(dtype))


def test_the_compiler_of_pytorch_can_be_imported_later():
    """It lists the functions of PyTorch by what it does with them, and refuses one under two names."""
    from torch._dynamo import trace_rules

    trace_rules.get_torch_obj_rule_map.cache_clear()
    assert torch.cuda.set_device in trace_rules.get_torch_obj_rule_map()


def test_memory_is_known_while_it_lives(driver):
    x = torch.empty(1000, device="cuda:1")
    at, view = x.data_ptr(), x[10:]
    del x
    gc.collect()
    assert driver.allocations[at] == (4000, 1)
    del view
    gc.collect()
    assert at not in driver.allocations


def test_devices(driver):
    assert torch.cuda.device_count() == 2 and torch.cuda.get_device_capability(1) == (10, 0)
    with torch.cuda.device(1):
        assert torch.empty(1, device="cuda").device.index == 1
    assert torch.empty(1, device="cuda").device.index == 0


def test_synchronising_operators_are_refused_where_asked_for(driver):
    x = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for wait in (lambda: x[0].item(), lambda: x.cpu(), lambda: x[x > 0], lambda: x.nonzero()):
            with pytest.raises(RuntimeError, match="synchronizing"):
                wait()
        x += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_inplace_and_out_variants():
    x, out = torch.arange(4.0, device="cuda"), torch.empty(0, device="cuda")
    torch.add(x, x, out=out)
    assert out.tolist() == [0, 2, 4, 6] and x.mul_(3).tolist() == [0, 3, 6, 9]
    x.index_copy_(0, torch.tensor([0, 2], device="cuda"), torch.zeros(2, device="cuda"))
    assert x.tolist() == [0, 3, 0, 9]
