"""Calls of `cute_ssm.selective_scan`."""

from __future__ import annotations

import torch

from cute_ssm.workloads import Call
from cute_ssm.workloads.maker import Maker, dtype, stored_bytes

BATCH = "batch"
BATCHES = (1, 2, 4, 8)


def build(
    make: Maker, batch: int = 1, dim: int = 128, length: int = 1024, dstate: int = 16, ngroups: int = 1,
    input_dtype: str = "bfloat16", state_dtype: str = "float32", z: int = 1, varlen: int = 0,
) -> Call:  # fmt: skip
    """Scan `length` tokens of each sequence from the state in its slot; slots are a random permutation of a pool.

    A unit is 32 (token, channel, state) steps: one issue slot per unit is one instruction per step.  z: gate by
    silu(z).  varlen: sequences are packed.
    """
    inputs, slots = dtype(input_dtype), 1 + 2 * batch

    def tokens(*shape: int) -> torch.Tensor:
        return make.normal(*((*shape, batch * length) if varlen else (batch, *shape, length)), dtype=inputs)

    arguments = {
        "u": tokens(dim),
        "delta": tokens(dim),
        "A": -0.5 - make.uniform(dim, dstate),
        "B": tokens(ngroups, dstate),
        "C": tokens(ngroups, dstate),
        "D": make.normal(dim),
        "z": tokens(dim) if z else None,
        "delta_bias": make.normal(dim) - 2.0,
        "cache_indices": 1 + make.slots(slots - 1, batch),
        "has_initial_state": torch.ones(batch, dtype=torch.bool, device=make.device),
        "query_start_loc": make.steps(batch, length) if varlen else None,
        "out": tokens(dim),
    }
    floor = sum(map(stored_bytes, arguments.values()))
    states = make.normal(slots, dim, dstate, dtype=dtype(state_dtype))
    floor += 2 * batch * dim * dstate * states.itemsize
    arguments["ssm_states"] = states
    call = {**arguments, "delta_softplus": True}
    return Call("selective_scan", call, ("out", "ssm_states"), batch * length * dim * dstate / 32, floor)


MODELS: dict[str, list[dict[str, int | str]]] = {
    "falcon-mamba": [
        {"dim": 8192, "dstate": 16, "state_dtype": state, "varlen": 1} for state in ("bfloat16", "float32")
    ],
}

SMALL: dict[str, int | str] = {"dim": 64, "length": 100}
_ONE_PART: dict[str, int | str] = {"dstate": 16, "config.lanes": 1, "config.warps": 4, "config.splits": 1}
COUNTED: list[dict[str, int | str]] = [
    {"batch": 1, "dim": 128, "length": 1024, **_ONE_PART},
    {"batch": 2, "dim": 128, "length": 1024, "varlen": 1, **_ONE_PART},
    {"batch": 1, "dim": 128, "length": 4096, **_ONE_PART},
    {"batch": 1, "dim": 1536, "length": 2048, "config.splits": 1},
    {"batch": 1, "dim": 1536, "length": 2048},
]
TINY: dict[str, int | str] = {"batch": 2, "dim": 64, "length": 40}
MODES: list[dict[str, int | str]] = [
    {},
    {"input_dtype": "float16"},
    {"input_dtype": "float32"},
    {"state_dtype": "bfloat16"},
    {"z": 0},
    {"varlen": 1},
    {"length": 700},
]
