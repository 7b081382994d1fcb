"""`serving.commit` and `build_work_items`: against plain loops, on reference and emulator; every bad argument."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from bits import same_bits

from cute_ssm import serving

LAYERS = 3
GARBAGE = -77


@dataclass(frozen=True)
class Case:
    """A batch; the defaults are the base that tests vary one factor of at a time."""

    batch: int = 40
    spare: int = 5  # slots that no row uses
    window: int = 16
    tokens: int = 6
    ring: bool = False
    extra: int = 0  # rows of the ring beyond window and tokens
    varlen: bool = False
    indexed: bool = True
    indices: torch.dtype = torch.int32
    pad: int = -1
    strided: bool = False


def arguments(case: Case, seed: int = 0) -> tuple[dict, torch.Tensor]:
    """Keyword arguments of both functions, and the tokens of each row; slots that no row uses hold garbage."""
    g = random.Random(seed)
    slots = case.batch + case.spare
    order = g.sample([s for s in range(slots) if s != case.pad], case.batch) if case.indexed else range(case.batch)
    order = list(order)
    counts = [g.choice((0, 1, 2, case.tokens)) if case.varlen else case.tokens for _ in order]
    pnat, place = (torch.full((slots,), GARBAGE, dtype=torch.int32) for _ in range(2))
    places = case.window + case.tokens + case.extra if case.ring else 2
    for row, slot in enumerate(order):
        if case.indexed and row % 7 == 3:
            order[row] = case.pad
        elif counts[row] or row % 2:  # of empty rows some have cursors that look right
            pending = g.choice((0, 1, case.window, g.randrange(case.window + 1)))
            ends = (places - pending) % places  # where a ring's pending tokens end with its last row
            pnat[slot], place[slot] = pending, g.choice((ends if case.ring else 0, g.randrange(places)))
    if case.pad >= 0:
        pnat[case.pad], place[case.pad] = 3, 1  # as good as any, and not to be read
    if case.strided:
        pnat, place = (torch.stack([t, t * 0 + 99], 1)[:, 0] for t in (pnat, place))
    call = {"prev_num_accepted_tokens": pnat, "window": case.window, "pad_slot_id": case.pad}
    call |= {"ring_start": place, "ring_length": places} if case.ring else {"cache_buf_idx": place}
    if case.indexed:
        call["state_batch_indices"] = torch.tensor(order, dtype=case.indices)
    if case.varlen:
        call["cu_seqlens"] = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=case.indices)
    else:
        call["tokens"] = case.tokens
    return call, torch.tensor(counts)


def expected(call: dict, counts: list[int], accepted: list[int] | None):
    """Cursors and seed increments by slot after a commit, and the list of work before it, by plain loops."""
    pnat, place = call["prev_num_accepted_tokens"].tolist(), call.get("cache_buf_idx", call.get("ring_start")).tolist()
    rows = call.get("state_batch_indices", torch.arange(len(counts))).tolist()
    first, last, advanced = [], [], [0] * len(pnat)
    for b, (slot, n) in enumerate(zip(rows, counts)):
        if slot == call["pad_slot_id"] or n == 0:
            last.append([b, call["pad_slot_id"], 0, 0])
            continue
        writes = pnat[slot] + n > call["window"]
        (first if writes else last).append([b, slot, pnat[slot], place[slot]])
        if accepted is None or accepted[b] < 0:
            continue
        advanced[slot] = 1
        if writes:
            place[slot] = (place[slot] + pnat[slot]) % call["ring_length"] if "ring_start" in call else 1 - place[slot]
            pnat[slot] = accepted[b]
        else:
            pnat[slot] += accepted[b]
    return pnat, place, advanced, first + last, len(first)


def verify(case: Case, seed: int = 0):
    """Both functions against the loops."""
    g = random.Random(seed)
    call, counts = arguments(case, seed)
    accepted = [g.choice((-1, 0, min(n, case.window), g.randrange(min(n, case.window) + 1))) for n in counts.tolist()]
    pnat, place, advanced, items, writes = expected(call, counts.tolist(), accepted)
    if not case.indexed and not case.varlen:
        call["batch"] = case.batch
    got, count = serving.build_work_items(**call)
    assert got.dtype == count.dtype == torch.int32 and got.tolist() == items and count.tolist() == [writes]
    assert 0 < writes < case.batch or case.batch < 8, "a batch of one kind shows little"
    call.pop("batch", None)
    seeds = torch.randint(-(2**62), 2**62, (LAYERS, len(pnat)))
    seeds[1] = 2**63 - 1  # wraps around
    after = seeds + torch.tensor(advanced)
    serving.commit(num_accepted_tokens=torch.tensor(accepted, dtype=case.indices), rand_seed=seeds, **call)
    assert call["prev_num_accepted_tokens"].tolist() == pnat
    assert call.get("cache_buf_idx", call.get("ring_start")).tolist() == place
    same_bits(seeds, after)


CASES = [
    Case(),
    Case(ring=True),
    Case(ring=True, extra=10),
    Case(varlen=True),
    Case(varlen=True, ring=True, indices=torch.int64),
    Case(indices=torch.int64),
    Case(indexed=False),
    Case(indexed=False, varlen=True),
    Case(pad=11),  # a slot of the pool, kept for padding
    Case(pad=0, ring=True),
    Case(tokens=1, window=4),
    Case(tokens=20, window=4),  # more tokens than the window: nearly every step writes
    Case(strided=True),
    Case(batch=1),
    Case(batch=2, ring=True),
]
