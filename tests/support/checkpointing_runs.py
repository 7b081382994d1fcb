"""Calls of `checkpointing_ssu` that several tests make, in the emulator and on a GPU."""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from checkpointing_cases import Case
from memory import storage

LATE = {"shuffle_sync": False, "async_mode": "late"}  # options of the emulator: copies land as late as they may


def digest(call):
    """A hash of everything that a call may have written."""
    found = hashlib.sha256()
    for value in call.values():
        if isinstance(value, torch.Tensor):
            found.update(storage(value).numpy().tobytes())
    return found.hexdigest()


WRITES = Case(batch=4, accepted=(15, 3, 13, 16), pads=(), state="f16", rounds=10)


STATES = ("f32", "bf16", "f16", "i16", "i8", "f8")
CONTRACTS = [
    Case(history=history, lengths=(4,) * 3 if packed else None)
    for history in ("double", "double_x", "ring")
    for packed in (False, True)
]
RUNS = [
    *(dataclasses.replace(case, state=state) for case in CONTRACTS for state in STATES),
    *(
        dataclasses.replace(case, decay=decay, state=state)
        for case in (CONTRACTS[0], CONTRACTS[5])
        for decay in ("slow", "fast")
        for state in ("f32", "f16", "i8")
    ),
    *(dataclasses.replace(case, fill="garbage", strided=True, io="f16") for case in CONTRACTS),
    *(dataclasses.replace(case, items=True, seed_per_slot=True, rounds=10, state="i8") for case in CONTRACTS),
    *(
        Case(tokens=tokens, window=window, history=history, indices=None, pads=())
        for tokens, window in ((1, 5), (6, 6), (9, 4), (8, 24))
        for history in ("double", "double_x", "ring")
    ),
]
