"""Calls of `cute_ssm.compat.vllm.selective_state_update_replayssm_output_only`."""

from __future__ import annotations

import torch

from cute_ssm.workloads import Call, phases
from cute_ssm.workloads.maker import Maker, dtype, stored_bytes

BATCH = "batch"
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def build(
    make: Maker, batch: int = 64, W: int = 16, nheads: int = 16, dim: int = 64, dstate: int = 128, ngroups: int = 1,
    state_dtype: str = "float16", input_dtype: str = "bfloat16", cached: str = "mixture", rounding: str = "nearest",
    z: int = 0,
) -> Call:  # fmt: skip
    """Make a call with one new token for each sequence, and caches of W rows.

    Slots are a random permutation of a pool; a unit is one (sequence, head).  cached: tokens in the caches of every
    sequence, a number, or "mixture": as many of each number as in service.  A sequence with W - 1 of them flushes.
    rounding: nearest or stochastic (10 rounds of Philox).  z: gate by silu(z).  A is float32; dt, D and dt_bias have
    the type of x, as in vLLM.
    """
    inputs, states, slots = dtype(input_dtype), dtype(state_dtype), 2 * batch

    def per_head(*shape: int) -> torch.Tensor:
        return make.normal(*shape, dtype=inputs)[..., None].expand(*shape, dim)

    if cached == "mixture":
        seed = int(make.generator.initial_seed() % 2**32)
        drawn = (phases.draw(batch, W, phases.accepted(1), seed=seed) - 1).clamp(min=0)  # the new token is one of them
    else:
        drawn = torch.full((batch,), int(cached), dtype=torch.int32)
    flushes = drawn == W - 1
    stochastic = rounding == "stochastic"
    arguments = {
        "x": make.normal(batch, nheads, dim, dtype=inputs),
        "dt": per_head(batch, nheads),
        "A": (-make.uniform(nheads, 1, 1)).expand(nheads, dim, dstate),
        "B": make.normal(batch, ngroups, dstate, dtype=inputs),
        "C": make.normal(batch, ngroups, dstate, dtype=inputs),
        "D": per_head(nheads),
        "dt_bias": per_head(nheads),
        "z": make.normal(batch, nheads, dim, dtype=inputs) if z else None,
        "write_pos": drawn.to(make.device),
        "is_flush": flushes.to(make.device),
        "state_batch_indices": make.slots(slots, batch),
        "out": make.empty(batch, nheads, dim, dtype=inputs).zero_(),
        "rand_seed": torch.tensor([2**40 + 1], device=make.device) if stochastic else None,
    }
    floor = sum(map(stored_bytes, arguments.values()))
    pool = {
        "state": make.normal(slots, nheads, dim, dstate, dtype=states),
        "x_cache": make.normal(slots, nheads, W, dim, dtype=inputs),
        "dt_cache": 0.1 * make.uniform(slots, nheads, W),
        "B_cache": make.normal(slots, ngroups, W, dstate, dtype=inputs),
    }
    row = (nheads * dim + ngroups * dstate) * inputs.itemsize + nheads * 4  # of the caches: x, B, dt'
    written = int(flushes.sum())
    floor += (batch + written) * nheads * dim * dstate * states.itemsize + (int(drawn.sum()) + batch - written) * row
    flags = {
        "dt_softplus": True,
        "max_cache_len": W,
        "null_block_id": -1,
        "enable_stochastic_rounding": stochastic,
    }
    return Call("replay_decode", {**pool, **arguments, **flags}, ("out", *pool), batch * nheads, floor)


def _shard(shards: int, **keys: int | str) -> dict[str, int | str]:
    """Parameters of one of several GPUs that share a model of 128 heads in 8 groups."""
    return {"nheads": 128 // shards, "ngroups": 8 // shards, **keys}


MODELS: dict[str, list[dict[str, int | str]]] = {
    "nemotron-3-super": [
        *(_shard(shards, state_dtype=state) for shards in (1, 8) for state in ("float32", "float16")),
        _shard(8, state_dtype="float16", rounding="stochastic"),
    ],
    "codestral-mamba": [_shard(1, state_dtype="bfloat16")],
}

SMALL: dict[str, int | str] = {"nheads": 4}
_SIZES: dict[str, int | str] = {"nheads": 16, "dim": 64, "dstate": 128, "ngroups": 1, "W": 16}
COUNTED: list[dict[str, int | str]] = [
    {"batch": batch, **_SIZES, "state_dtype": state, "cached": cached}
    for batch in (64, 1)
    for cached in (8, 15)
    for state in ("bfloat16", "float16")
]
CHECKED: list[dict[str, int | str]] = [
    {"state_dtype": "float32"},
    {"cached": 15},
    {"cached": 15, "rounding": "stochastic"},
]
TINY: dict[str, int | str] = {"batch": 3, "nheads": 4, "W": 4}
MODES: list[dict[str, int | str]] = [
    {},
    {"state_dtype": "bfloat16"},
    {"state_dtype": "float32"},
    {"input_dtype": "float16"},
    {"input_dtype": "float32", "state_dtype": "float32"},
    {"cached": 3},
    {"cached": 3, "rounding": "stochastic"},
    {"z": 1},
    {"W": 64, "cached": 40, "ngroups": 2},
    {"dim": 24, "dstate": 96, "cached": 3},
]
