"""`cute_ssm.serving` on CUDA tensors: results of the reference, graphs, and no waiting.  Skipped without a GPU."""

from __future__ import annotations

import pytest
import torch
from bits import same_bits
from cursor_cases import Case, arguments
from materialize_cases import Case as States
from materialize_cases import random as states
from materialize_gated_cases import FEW
from materialize_gated_cases import arguments as gated

from cute_ssm import serving

pytestmark = pytest.mark.gpu


def moved(call):
    """The same arguments on the GPU; strides of 0 stay."""
    return {
        name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda").copy_(value)
        if isinstance(value, torch.Tensor) and 0 not in value.stride()
        else value[:, :1, :1].cuda().expand(value.shape)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in call.items()
    }


@pytest.mark.parametrize("case", [Case(), Case(ring=True), Case(varlen=True, batch=3000)], ids=str)
def test_cursors(case):
    here, counts = arguments(case)
    there, accepted = moved(here), (counts // 2).int()
    for _ in range(2):  # the second takes the memorised plan
        results = [serving.build_work_items(**call) for call in (here, there)]
        for one, other in zip(*results):
            same_bits(one, other.cpu())
        before = [there[name].clone() for name in there if name in ("prev_num_accepted_tokens", "cache_buf_idx")]
        serving.commit(num_accepted_tokens=accepted, **here)
        serving.commit(num_accepted_tokens=accepted.cuda(), **there)
        for name, value in here.items():
            if isinstance(value, torch.Tensor):
                same_bits(value, there[name].cpu(), name)
        assert not torch.equal(before[0], there["prev_num_accepted_tokens"])


@pytest.mark.parametrize("case", [States(), States(state="i8", history="ring", rows=22), States(out="f16")], ids=str)
def test_materialize(case):
    here, there = states(case, 0)["call"], moved(states(case, 0)["call"])
    results = [serving.materialize(**call) for call in (here, there)]
    one, other = results[0].float(), results[1].cpu().float()
    steps = {"f32": 1e-5, "f16": 2e-3, "i8": 1.0}[case.out or case.state]  # of integers one, of floats an error
    assert ((one - other).abs() <= steps * (1.0 if steps == 1 else one.abs() + 1e-2)).all()


@pytest.mark.parametrize("case", FEW, ids=str)
def test_materialize_gated_delta(case):
    here, there = gated(case), moved(gated(case))
    for _ in range(2):  # the second takes the memorised plan
        one, other = (serving.materialize_gated_delta(**call) for call in (here, there))
    live = here["dst_state_batch_indices"][here["dst_state_batch_indices"] >= 0].long()
    one, other = one[live].float().nan_to_num(), other.cpu()[live].float().nan_to_num()
    assert ((one - other).abs() <= {"f32": 1e-5}.get(case.to or case.state, 1e-2) * (one.abs() + one.abs().max())).all()


def test_a_commit_of_an_unallocated_slot_changes_nothing():
    pool = serving.StatePool.gated_delta(
        1, 4, heads=1, value_heads=1, K=64, V=64, window=8, tokens=2, conv_shape=(8, 4), device="cuda"
    )
    slot = pool.allocate()
    other = next(s for s in range(4) if s != slot)
    pool.conv_state.copy_(torch.arange(pool.conv_state.numel()).view_as(pool.conv_state) % 100)
    before = pool.conv_state.clone()
    pool.commit(torch.tensor([other, 4, slot, 9], device="cuda"), torch.tensor([1, 1, 2, 1], device="cuda"))
    assert pool.prev_num_accepted_tokens.nonzero().flatten().tolist() == [slot]
    assert (pool.conv_state != before).any(-1).any(-1).nonzero()[:, 1].tolist() == [slot]
    moved_to_cpu = pool.to("cpu")
    assert moved_to_cpu.to("cuda").state.is_cuda and moved_to_cpu.prev_num_accepted_tokens[slot] == 2


def test_a_captured_step_replays_and_waits_for_nothing():
    pool = serving.StatePool.mamba2(
        2, 8, nheads=2, dim=64, dstate=128, window=16, tokens=4, state_dtype=torch.float16, seed=1, device="cuda",
        conv_shape=(32, 4),
    )  # fmt: skip
    slots = torch.tensor([pool.allocate(), pool.allocate(), pool.pad_slot_id], device="cuda")
    accepted = torch.tensor([4, 1, 0], device="cuda")
    items, writes = pool.build_work_items(slots)

    def step():
        pool.build_work_items(slots, work_items=items, num_writes=writes)
        pool.commit(slots, accepted)

    step()  # compiles
    pool.reset_slot(slots)
    seeds = pool.rand_seed.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            graph.replay()
        one, two = pool.allocate(), pool.allocate()
        pool.copy_slot(slots[:1], torch.full((1,), one, device="cuda"))
        pool.copy_slot(one, two)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pool.prev_num_accepted_tokens[slots].tolist() == [8, 6, 0]
    assert pool.prev_num_accepted_tokens[[one, two]].tolist() == [8, 8]
    assert (pool.rand_seed - seeds)[:, slots].tolist() == [[6, 6, 0]] * 2
    assert writes.tolist() == [0] and items[:2, 1].tolist() == slots[:2].tolist()
