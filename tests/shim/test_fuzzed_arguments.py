"""Each tensor of a call in turn is another; a memorised plan, which checks nothing itself, must not take it."""

from __future__ import annotations

import pytest
import torch
from shim import on_device, tensors

from cute_ssm import workloads
from cute_ssm.tuner.gate import Gate

pytestmark = pytest.mark.gpu
each_operator = pytest.mark.parametrize("op", workloads.OPERATORS)


def wrong(value):
    """Values that are wrong in one way, for most arguments."""
    for dim in range(value.dim()):
        for size in {0, 1, value.shape[dim] - 1} - {value.shape[dim]}:
            yield f"dimension {dim} is {size}", value.narrow(dim, 0, size)
    yield "another type", value.to(torch.float64)
    yield "flat", value.reshape(-1) if value.dim() > 1 else value[None]
    yield "nothing", None
    if value.dim():
        yield "no dimensions", value.reshape(-1)[0]
    if value.dim() > 1:
        yield "transposed", value.transpose(0, -1)


def elsewhere(value):
    """The same values on other devices."""
    return [("on the second GPU", value.to("cuda:1")), ("on the CPU", value.cpu())]


@each_operator
def test_wrong_tensors_after_a_good_call_are_refused_or_fit(driver, op):
    driver.execute = False
    call = on_device(workloads.build(op, workloads.small(op)))
    call.run()
    good, refused, accepted = driver.launches[-1], 0, []
    for name, value in tensors(call).items():
        for what, other in [*wrong(value), *elsewhere(value)]:
            before = len(driver.launches)
            try:
                workloads.function(op)(**{**call.arguments, name: other})
                accepted.append((name, what))
            except (ValueError, TypeError):
                refused += 1
                assert len(driver.launches) == before, (name, what)
    fits = [what == "nothing" or what.startswith("dimension 0") for _, what in accepted]  # optional ones; pools
    assert all(fits), [pair for pair, good in zip(accepted, fits) if not good]
    assert refused > 3 * len(accepted)
    call.run()
    assert driver.launches[-1].config == good.config


def misaligned(value):
    """The same values, one element behind where an allocation begins; strides of 0 stay."""
    stored = value[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())]
    copy = torch.empty(stored.numel() + 1, dtype=value.dtype, device=value.device)[1:].view(stored.shape)
    return copy.copy_(stored).expand(value.shape)


def turned(value):
    """The same values in memory whose last dimension has a stride above one."""
    return value.transpose(0, -1).contiguous().transpose(0, -1)


@each_operator
@pytest.mark.parametrize("awkward", [misaligned, turned])
def test_awkward_memory_is_refused_or_right(driver, op, awkward):
    keys = workloads.small(op)
    expected = Gate(workloads.build(op, keys), {}).results()
    good = on_device(workloads.build(op, keys))
    good.run()
    for name in tensors(good):
        call = on_device(workloads.build(op, keys))
        call.arguments[name] = awkward(call.arguments[name])
        before = len(driver.launches)
        try:
            gate = Gate(call, {})
        except (ValueError, TypeError):
            assert len(driver.launches) == before, name
        else:
            assert gate.problem_of_rule(expected) == "", name
