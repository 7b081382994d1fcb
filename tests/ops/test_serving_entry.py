"""What the kernels' entries for the GPU check before they launch: TVM-FFI with the kernels' fakes, on the CPU.

The memory space of the fakes is changed so that an entry takes CPU tensors; its body does nothing.
"""

from __future__ import annotations

import dataclasses
import functools

import cutlass.cute as cute
import pytest
import replay_decode_cases as decode_cases
import torch
from cutlass.cute.runtime import make_fake_tensor
from materialize_cases import Case
from materialize_cases import random as states
from materialize_gated_cases import BASE, SPEC
from materialize_gated_cases import arguments as gated

from cute_ssm import arch as archs
from cute_ssm.device import fakes as fakes_of_kernels
from cute_ssm.ops.build_work_items import kernel as serving_work_items
from cute_ssm.ops.build_work_items.spec import WorkItemsSpec
from cute_ssm.ops.commit import kernel as serving_commit
from cute_ssm.ops.commit.spec import CommitSpec
from cute_ssm.ops.materialize import kernel as serving_materialize
from cute_ssm.ops.materialize.spec import MaterializeSpec
from cute_ssm.ops.materialize_gated_delta import kernel as gated_delta_materialize
from cute_ssm.ops.replay_decode import kernel as replay_decode
from cute_ssm.ops.replay_decode.spec import ReplayDecodeSpec


@cute.jit
def entry(tensors: list, scalars: list):
    """Nothing."""


def compiled(kernel, spec, monkeypatch):
    on_cpu = functools.partial(make_fake_tensor, memspace=cute.AddressSpace.generic)
    monkeypatch.setattr(fakes_of_kernels, "make_fake_tensor", on_cpu)
    made = kernel(spec, kernel.default_config(spec, archs.SM_90A), archs.SM_90A)
    fakes = made.fakes()[:-1]
    count = sum(fake is None or hasattr(fake, "shape") for fake in fakes)
    function = cute.compile(entry, list(fakes[:count]), list(fakes[count:]), options="--enable-tvm-ffi")
    return function.__tvm_ffi_object__()


def check(function, tensors, scalars, wrong):
    function(list(tensors.values()), scalars)
    for name, value in wrong.items():
        with pytest.raises((TypeError, ValueError)):
            function(list({**tensors, name: value}.values()), scalars)
    function(list(tensors.values()), scalars)


def integers(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


def test_commit(monkeypatch):
    spec = CommitSpec(True, "int64", None, "int32", True, True)
    function = compiled(serving_commit.CommitCursors, spec, monkeypatch)
    tensors = {"pnat": integers(7), "place": integers(7), "accepted": integers(3), "src": integers(3).long()}
    tensors |= {"cu": None, "seeds": torch.zeros(2, 7, dtype=torch.int64)}
    tensors |= {"unallocated": torch.zeros(7, dtype=torch.bool).view(torch.uint8)}
    wrong = {"pnat": integers(8), "place": integers(7).long(), "accepted": integers(4), "src": integers(3)}
    wrong |= {"cu": integers(4), "seeds": torch.zeros(2, 6, dtype=torch.int64)}
    wrong |= {"unallocated": torch.zeros(6, dtype=torch.bool).view(torch.uint8)}
    check(function, tensors, [-1, 6, 16, 22], wrong)


def test_work_items(monkeypatch):
    spec = WorkItemsSpec(False, "int32", "int32")
    function = compiled(serving_work_items.BuildWorkItems, spec, monkeypatch)
    tensors = {"pnat": integers(7), "place": integers(7), "src": integers(3), "cu": integers(4)}
    tensors |= {"items": integers(3, 4), "count": integers(1)}
    wrong = {"place": integers(6), "src": integers(2), "cu": None, "count": integers(2)}
    wrong |= {"items": integers(3, 8)[:, :4]}
    check(function, tensors, [-1, 0, 16, 2], wrong)


def test_materialize(monkeypatch):
    spec = MaterializeSpec("int8", "int8", "bfloat16", "float32", 64, 128, "ring", "int32", "int32", "int32")
    function = compiled(serving_materialize.MaterializeState, spec, monkeypatch)
    call = states(Case(state="i8", history="ring"), 0)["call"]
    names = (
        "state", "state_scale", "x_history", "B_history", "dt_history", "ring_start", "prev_num_accepted_tokens", "A",
    )  # fmt: skip
    tensors = {name: call[name] for name in names}
    tensors |= {"out": call["state"], "out_scale": call["state_scale"]}
    tensors |= {name: call[name] for name in ("state_batch_indices", "dst_state_batch_indices", "num_tokens")}
    tensors["rand_seed"] = None
    wrong = {
        "state": call["state"].half(),
        "state_scale": None,
        "x_history": call["x_history"].half(),
        "B_history": call["B_history"][:, :, :8],
        "dt_history": call["dt_history"][:, :1],
        "ring_start": call["ring_start"][:3],
        "A": call["A"].contiguous(),
        "out": call["state"][:, :, :, :64],
        "dst_state_batch_indices": call["dst_state_batch_indices"][:2],
        "num_tokens": None,
    }
    check(function, tensors, [-1], wrong)


def test_replay_decode(monkeypatch):
    spec = ReplayDecodeSpec(
        "float32", "bfloat16", "float32", "bfloat16", None, None, 64, 128, False, True, "int32", True
    )
    function = compiled(replay_decode.ReplayDecode, spec, monkeypatch)
    call = decode_cases.arguments(decode_cases.Case(D=False, bias=False, z=False))
    call |= {"A": call["A"][:, 0, 0], "dt": call["dt"][..., 0], "is_flush": call["is_flush"].view(torch.uint8)}
    tensors = {name: call.get(name) for name in replay_decode.TABLE.tensors}
    wrong = {
        "state": call["state"].half(),
        "x": call["x"].half(),
        "dt": call["dt"].float(),
        "A": call["A"][:2],
        "B": call["B"][..., :64],
        "D": torch.zeros(4, 64),
        "x_cache": call["x_cache"][:, :, :7],
        "B_cache": call["B_cache"].half(),
        "dt_cache": call["dt_cache"].half(),
        "write_pos": call["write_pos"].long(),
        "is_flush": call["is_flush"][:3],
        "state_batch_indices": None,
        "out": call["out"][:2],
    }
    check(function, tensors, [0], wrong)


def test_materialize_gated_delta(monkeypatch):
    spec = dataclasses.replace(SPEC, K=64, V=64, out_dtype="float16")
    function = compiled(gated_delta_materialize.MaterializeGatedDelta, spec, monkeypatch)
    call = gated(dataclasses.replace(BASE, to="f16"))
    names = ("initial_state", "k_cache", "v_cache", "g_cache", "beta_cache", "ring_start", "prev_num_accepted_tokens")
    names += ("out", "state_batch_indices", "dst_state_batch_indices", "num_tokens")
    tensors = {name: call[name] for name in names}
    wrong = {name: call[name][:3] for name in names if name not in ("initial_state", "out")}
    wrong |= {"initial_state": call["initial_state"].half(), "out": call["out"].float()}
    wrong |= {"k_cache": call["k_cache"][..., :32], "v_cache": call["v_cache"][:, :, 1:], "num_tokens": None}
    check(function, tensors, [16], wrong)
