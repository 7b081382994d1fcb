"""`checkpointing_ssu` on CUDA tensors: what takes too long, or cannot be asked for, in the emulator."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bits import equal, same_bits, same_memory
from checkpointing_cases import Case, arguments, run, verify_many
from checkpointing_runs import RUNS, WRITES, digest
from memory import copy, moved, storage
from shim import fewer

import cute_ssm
from cute_ssm import tuning
from cute_ssm.ops.checkpointing_ssu.config import DYNAMIC, FUSED, PAIR

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.long if i % 8 else ()) for i, case in enumerate(RUNS)], ids=str
)
def test_many_steps(case):
    verify_many(case, steps=fewer(60, 8), device="cuda")


@pytest.mark.parametrize("batch", [1, *(pytest.param(batch, marks=pytest.mark.long) for batch in (37, 512))])
@pytest.mark.parametrize("state", ["f32", "f16", "i8"])
def test_forms_and_repetitions_have_the_same_bits(state, batch):
    case = dataclasses.replace(WRITES, state=state, rounds=0 if state == "f32" else 10, batch=batch, items=True)
    case = dataclasses.replace(case, nheads=fewer(16, 4), dstate=128, tokens=6)
    call, digests = arguments(case), set()
    for form in (FUSED, DYNAMIC, PAIR):
        for _ in range(fewer(5, 2)):
            turn = copy(call)
            with tuning.override(form=form):
                run(case, turn, "cuda")
            digests.add(digest(turn))
    assert len(digests) == 1


BAD = [
    ("double", "prev_num_accepted_tokens", 17),
    ("double", "prev_num_accepted_tokens", -1),
    ("double", "cache_buf_idx", 2),
    ("double", "cache_buf_idx", -1),
    ("ring", "ring_start", 20),
    ("ring", "ring_start", -3),
    ("double", "state_batch_indices", 6),
    ("ring", "state_batch_indices", -2),
]


@pytest.mark.parametrize(("history", "name", "value"), BAD)
def test_contents_out_of_range_skip_their_sequence(history, name, value):
    """No error can be raised, and nothing is written for that sequence; the others are computed."""
    case = Case(history=history, accepted=(14, 3, 15), pads=())
    call = arguments(case)
    good = copy(call)
    run(case, good, "cuda")
    slot = int(call["state_batch_indices"][1])
    call[name][1 if name == "state_batch_indices" else slot] = value
    before = copy(call)
    run(case, call, "cuda")
    for tensor in ("state", *(n for n in case.names[:4] if n)):
        same_bits(call[tensor][slot], before[tensor][slot], tensor)
    same_bits(call["out"][1], before["out"][1])
    equal(call["out"][[0, 2]], good["out"][[0, 2]])


def test_a_graph_follows_the_cursors():
    """A captured step reads slots, cursors and lengths when it is replayed."""
    case = Case(history="ring", batch=4, accepted=(14, 3, 15, 0), pads=(), items=True)
    call = arguments(case)
    there = moved(call, "cuda")
    cute_ssm.checkpointing_ssu_ring(**there)  # compiles, or loads
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cute_ssm.checkpointing_ssu_ring(**there)
    for accepted in ((14, 3, 15, 0), (2, 16, 1, 13)):
        turn = arguments(dataclasses.replace(case, accepted=accepted))
        for name, value in turn.items():
            if isinstance(value, torch.Tensor):
                storage(there[name]).copy_(storage(value))
        graph.replay()
        run(case, turn, "cuda")
        equal(there["out"].cpu(), turn["out"])
        same_memory(there["state"], turn["state"])
