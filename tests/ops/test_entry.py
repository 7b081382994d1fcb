"""What a kernel's entry for the GPU reads of tensors: TVM-FFI with the kernel's fakes, on the CPU, launching nothing.

The memory space of the fakes is changed so that the entry takes CPU tensors; its body reports the sizes and strides
that it was given, and its checks are those that spare the operator its own.
"""

from __future__ import annotations

import functools
from collections import namedtuple

import checkpointing_cases
import cutlass
import cutlass.cute as cute
import pytest
import step_cases
import token_cases
import torch
from cutlass import Int32, Int64
from cutlass.cute.runtime import make_fake_tensor

from cute_ssm import arch as archs
from cute_ssm.device import fakes as fakes_of_kernels
from cute_ssm.ops.checkpointing_ssu import kernel as checkpointing_ssu
from cute_ssm.ops.checkpointing_ssu import operator as checkpointing
from cute_ssm.ops.checkpointing_ssu.config import choose as choose_checkpointing
from cute_ssm.ops.selective_state_update import kernel as selective_step
from cute_ssm.ops.selective_state_update import operator as operator
from cute_ssm.ops.selective_state_update.arguments import TABLE


@cute.jit
def entry(report: cute.Tensor, tensors: list, pad: Int64, max_tokens: Int32, max_ctas: Int32):
    """Report every size and stride."""
    i = 0
    for tensor in tensors:
        if cutlass.const_expr(tensor is not None):
            for value in (*tensor.shape, *tensor.stride):
                report[i] = Int64(value)
                i += 1
    report[i] = pad
    report[i + 1] = Int64(max_tokens)
    report[i + 2] = Int64(max_ctas)


def compiled(call: dict, monkeypatch):
    """(compiled entry, tensors by name) of a call of the operator."""
    calls = []
    monkeypatch.setattr(operator._path, "run", lambda key, checked: calls.append(checked))
    operator.selective_state_update(**call)
    (checked,) = calls
    on_cpu = functools.partial(make_fake_tensor, memspace=cute.AddressSpace.generic)
    monkeypatch.setattr(fakes_of_kernels, "make_fake_tensor", on_cpu)
    config = checked.choose(archs.SM_90A, 132)
    *fakes, pad, tokens, ctas, _ = selective_step.SelectiveStep(checked.spec, config, archs.SM_90A).fakes()
    report = on_cpu(Int64, (cute.sym_int32(),), (1,))
    function = cute.compile(entry, report, fakes, pad, tokens, ctas, options="--enable-tvm-ffi")
    return function.__tvm_ffi_object__(), dict(zip(TABLE.tensors, checked.operands))


CASES = [
    step_cases.Case(),
    step_cases.Case(layout="dense", strided=True, separate=True),
    step_cases.Case(indices=None, has_z=False, has_D=False, has_bias=False, state="f32"),
    token_cases.Tokens(),
    token_cases.Tokens(packed=True, lengths=(3, 0, 2), accepted=True, destination="matrix", state="i8", rounds=10),
    token_cases.Tokens(destination="intermediates", state="f8", indices=torch.int64, seed_per_slot=True, rounds=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sizes_and_strides_arrive(case, monkeypatch):
    module = step_cases if isinstance(case, step_cases.Case) else token_cases
    function, operands = compiled(module.arguments(case), monkeypatch)
    tensors = list(operands.values())
    wanted = [v for t in tensors if t is not None for v in (*t.shape, *t.stride())]
    report = torch.zeros(len(wanted) + 3, dtype=torch.int64)
    function(report, tensors, -1, 7, 528)
    assert report.tolist() == [*wanted, -1, 7, 528]


def test_what_the_operator_leaves_to_the_entry(monkeypatch):
    """Other strides, types, sizes or alignment than the kernel was compiled for are refused."""
    call = step_cases.arguments(step_cases.Case())
    function, operands = compiled(call, monkeypatch)
    report = torch.zeros(80, dtype=torch.int64)
    misaligned = torch.zeros(3 * 2 * 128 + 1, dtype=torch.bfloat16)[1:].view(3, 2, 128)
    for name, wrong in {
        "A": operands["A"].contiguous(),  # not tied
        "dt": operands["dt"].contiguous(),
        "x": operands["x"].float(),
        "z": None,
        "B": misaligned,
        "C": operands["C"][:2],
        "out": operands["out"][..., :32],
        "state": operands["state"][:, :, :, :64],
        "state_batch_indices": operands["state_batch_indices"].long(),
        "dst_state_batch_indices": operands["state_batch_indices"],
    }.items():
        with pytest.raises((TypeError, ValueError)):
            function(report, list({**operands, name: wrong}.values()), -1, 1, 528)
    function(report, list(operands.values()), -1, 1, 528)


# ------------------------------------------------------------------------------------------------- checkpointing_ssu
@cute.jit
def checkpointing_entry(report: cute.Tensor, tensors: list, pad: Int64, sm_count: Int32):
    """Report every size and stride."""
    i = 0
    for tensor in tensors:
        if cutlass.const_expr(tensor is not None):
            for value in (*tensor.shape, *tensor.stride):
                report[i] = Int64(value)
                i += 1
    report[i] = pad
    report[i + 1] = Int64(sm_count)


def compiled_checkpointing(case: checkpointing_cases.Case, monkeypatch):
    """(compiled entry, operands) of a step."""
    seen = {}
    tensors = namedtuple("tensors", checkpointing.TABLE.tensors)

    def note(call):
        seen.update(spec=call.spec, o=tensors._make(call.operands[:-1]))

    monkeypatch.setattr(checkpointing._path, "_run_on_cpu", note)
    operator = checkpointing.checkpointing_ssu_ring if case.ring else checkpointing.checkpointing_ssu
    operator(**checkpointing_cases.arguments(case))
    on_cpu = functools.partial(make_fake_tensor, memspace=cute.AddressSpace.generic)
    monkeypatch.setattr(fakes_of_kernels, "make_fake_tensor", on_cpu)
    config = choose_checkpointing(seen["spec"], archs.SM_90A, case.batch, 132)
    *fakes, pad, sm_count, _ = checkpointing_ssu.CheckpointingSSU(seen["spec"], config, archs.SM_90A).fakes()
    report = on_cpu(Int64, (cute.sym_int32(),), (1,))
    function = cute.compile(checkpointing_entry, report, fakes, pad, sm_count, options="--enable-tvm-ffi")
    return function.__tvm_ffi_object__(), seen["o"]


CHECKPOINTING = [
    checkpointing_cases.Case(),
    checkpointing_cases.Case(history="ring", strided=True, slack=3, state="i8", rounds=10, seed_per_slot=True),
    checkpointing_cases.Case(history="double_x", lengths=(3, 0, 2), items=True, indices=torch.int64, nheads=4),
]


@pytest.mark.parametrize("case", CHECKPOINTING, ids=str)
def test_sizes_and_strides_of_a_step_arrive(case, monkeypatch):
    function, operands = compiled_checkpointing(case, monkeypatch)
    wanted = [v for t in operands if t is not None for v in (*t.shape, *t.stride())]
    report = torch.zeros(len(wanted) + 2, dtype=torch.int64)
    function(report, list(operands), -1, 132)
    assert report.tolist() == [*wanted, -1, 132]


@pytest.mark.parametrize("name", ["x", "B", "C", "z", "out", "cum_history"])
def test_tensors_of_a_step_have_strides_of_their_own(name, monkeypatch):
    function, operands = compiled_checkpointing(checkpointing_cases.Case(ngroups=2), monkeypatch)
    plain = getattr(operands, name)
    roomy = torch.zeros(plain.shape[0], plain.shape[1] + 1, *plain.shape[2:], dtype=plain.dtype)[:, :-1]
    function(torch.zeros(200, dtype=torch.int64), list(operands._replace(**{name: roomy})), -1, 132)
    assert roomy.stride(0) != plain.stride(0)


@pytest.mark.parametrize("history", ["double", "ring"])
def test_what_checkpointing_ssu_leaves_to_the_entry(history, monkeypatch):
    """What the key of plans does not hold: strides, types, alignment, absence, and sizes that several tensors have."""
    function, operands = compiled_checkpointing(checkpointing_cases.Case(history=history, ngroups=2), monkeypatch)
    report = torch.zeros(200, dtype=torch.int64)
    slots, o = operands.state.shape[0], operands
    misaligned = torch.zeros(o.x.numel() + 1, dtype=o.x.dtype)[1:].view(o.x.shape)
    wide = torch.zeros(*o.x.shape[:-1], 2 * o.x.shape[-1], dtype=o.x.dtype)[..., : o.x.shape[-1]]
    for name, wrong in {
        "A": o.A.contiguous(),  # not tied
        "dt": o.dt.contiguous(),
        "D": o.D.contiguous(),
        "dt_bias": o.dt_bias.double(),
        "x": misaligned,
        "out": wide,
        "z": None,
        "B": o.B[:, :, :1],
        "C": o.C[:2],
        "state": o.state[: slots - 1],
        "x_history": o.x_history[..., :32],
        "B_history": o.B_history.float(),
        "dt_history": o.dt_history[: slots - 1],
        "cum_history": None if history == "double" else o.dt_history,
        "cursor": o.cursor[: slots - 1],
        "prev_num_accepted_tokens": o.prev_num_accepted_tokens.long(),
        "state_batch_indices": o.state_batch_indices.long(),
        "state_scale": torch.zeros(slots, 2, 64),
        "rand_seed": torch.zeros(1, dtype=torch.int64),
        "work_items": torch.zeros(3, 4, dtype=torch.int32),
        "cu_seqlens": torch.zeros(4, dtype=torch.int32),
    }.items():
        with pytest.raises((TypeError, ValueError)):
            function(report, list(operands._replace(**{name: wrong})), -1, 132)
    function(report, list(operands), -1, 132)
    assert report.any()
