"""Calls of `cute_ssm.selective_state_update`."""

from __future__ import annotations

import torch

from cute_ssm.workloads import Call
from cute_ssm.workloads.maker import Maker, dtype, stored_bytes

BATCH = "batch"
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LARGEST = {"int16": 32767, "int8": 127, "float8_e4m3fn": 448}


def build(
    make: Maker, batch: int = 8, T: int = 1, nheads: int = 16, dim: int = 64, dstate: int = 128, ngroups: int = 1,
    state_dtype: str = "float16", input_dtype: str = "bfloat16", dt_dtype: str = "float32", layout: str = "tied",
    z: int = 0, update: int = 1, varlen: int = 0, rounding: str = "nearest", intermediates: int = 0,
) -> Call:  # fmt: skip
    """T tokens for each sequence; slots are a random permutation of a pool.  A unit is one (sequence, head).

    layout: tied (Mamba-2: A, D, dt and dt_bias per head) or dense (Mamba-1).  z: gate by silu(z).  update: write
    states.  varlen: tokens are packed, with cu_seqlens.  rounding: nearest or stochastic (10 rounds of Philox).
    intermediates: the state after every token goes to a buffer.
    """
    inputs, states = dtype(input_dtype), dtype(state_dtype)
    slots, tied, scaled = 2 * batch, layout == "tied", state_dtype in LARGEST
    tokens = (batch * T,) if varlen else (batch, T) if T > 1 else (batch,)

    def per_head(*shape: int, kind: torch.dtype) -> torch.Tensor:
        values = make.normal(*shape, *(() if tied else (dim,)), dtype=kind)
        return values[..., None].expand(*shape, dim) if tied else values

    A = -make.uniform(nheads, *((1, 1) if tied else (dim, dstate)))
    arguments = {
        "x": make.normal(*tokens, nheads, dim, dtype=inputs),
        "dt": per_head(*tokens, nheads, kind=dtype(dt_dtype)),
        "A": A.expand(nheads, dim, dstate),
        "B": make.normal(*tokens, ngroups, dstate, dtype=inputs),
        "C": make.normal(*tokens, ngroups, dstate, dtype=inputs),
        "D": per_head(nheads, kind=torch.float32),
        "z": make.normal(*tokens, nheads, dim, dtype=inputs) if z else None,
        "dt_bias": per_head(nheads, kind=torch.float32),
        "out": make.empty(*tokens, nheads, dim, dtype=inputs),
        "state_batch_indices": make.slots(slots, batch),
        "cu_seqlens": make.steps(batch, T) if varlen else None,
        "intermediate_state_indices": make.slots(batch, batch) if intermediates else None,
        "rand_seed": torch.tensor([2**40 + 1], device=make.device) if rounding == "stochastic" else None,
    }
    floor = sum(map(stored_bytes, arguments.values()))
    pool = make.normal(slots, nheads, dim, dstate)
    scale = None
    if scaled:
        scale = pool.abs().amax(-1) / LARGEST[state_dtype] if make.fill else make.empty(slots, nheads, dim)
        pool = pool / scale[..., None] if make.fill else pool
    arguments |= {"state": pool.to(states) if make.fill else make.empty(*pool.shape, dtype=states)}
    arguments |= {"state_scale": scale}
    state_bytes = nheads * dim * (dstate * states.itemsize + 4 * scaled)  # of one sequence
    floor += batch * state_bytes * (2 if update else 1)
    if intermediates:
        arguments |= {"intermediate_states_buffer": make.empty(batch, T, nheads, dim, dstate, dtype=states)}
        arguments |= {"intermediate_state_scales": make.empty(batch, T, nheads, dim) if scaled else None}
        floor += batch * T * state_bytes
    written = ("out", "state", "state_scale", "intermediate_states_buffer", "intermediate_state_scales")
    flags = {"dt_softplus": True, "disable_state_update": not update}
    return Call("selective_state_update", {**arguments, **flags}, written, batch * nheads, floor)


def _shard(shards: int, **keys: int | str) -> dict[str, int | str]:
    """Parameters of one of several GPUs that share a model of 128 heads in 8 groups."""
    return {"nheads": 128 // shards, "ngroups": 8 // shards, "dstate": 128, **keys}


_SPECULATIVE = {"T": 6}
_STOCHASTIC = {"rounding": "stochastic"}
MODELS: dict[str, list[dict[str, int | str]]] = {
    "nemotron-3-super": [
        _shard(shards, dim=64, state_dtype=state, **tokens)
        for shards in (1, 8)
        for state in ("float16", "float32")
        for tokens in ({}, _SPECULATIVE)
    ]
    + [_shard(shards, dim=64, state_dtype="float16", **_STOCHASTIC) for shards in (1, 8)],
    "nemotron-nano": [_shard(1, dim=80, state_dtype=state) for state in ("float16", "float32")],
    "codestral-mamba": [_shard(1, dim=64, state_dtype=state) for state in ("bfloat16", "float32")],
    "falcon-mamba": [
        {"nheads": 1, "dim": 8192, "dstate": 16, "state_dtype": state, "layout": "dense", "z": 1}
        for state in ("bfloat16", "float32")
    ],
}

_MAMBA1: dict[str, int | str] = {"nheads": 1, "dim": 4096, "dstate": 16, "state_dtype": "float32", "layout": "dense"}
_MODES: list[dict[str, int | str]] = [
    {"state_dtype": "int8"},
    {"state_dtype": "float8_e4m3fn"},
    {"state_dtype": "int16"},
    {"rounding": "stochastic"},
    {"state_dtype": "bfloat16", "rounding": "stochastic"},
    {"state_dtype": "int8", "rounding": "stochastic"},
    {"varlen": 1},
    {"T": 6},
    {"T": 6, "state_dtype": "float32"},
    {"T": 6, "state_dtype": "int8"},
    {"T": 6, "state_dtype": "float8_e4m3fn"},
    {"T": 6, "rounding": "stochastic"},
    {"T": 6, "intermediates": 1},
    {"T": 6, "intermediates": 1, "state_dtype": "int8"},
    {"T": 6, "varlen": 1},
]
_SIZES: dict[str, int | str] = {"nheads": 16, "dim": 64, "dstate": 128, "ngroups": 1, "state_dtype": "float16"}
COUNTED: list[dict[str, int | str]] = [
    {"batch": 8, **_SIZES},
    {"batch": 64, **_SIZES},
    {"batch": 64, **_SIZES, "state_dtype": "bfloat16"},
    {"batch": 64, **_SIZES, "state_dtype": "float32"},
    {"batch": 64, **_SIZES, "dim": 80},
    {"batch": 1, **_SIZES},
    {"batch": 64, **_SIZES, "z": 1},
    {"batch": 16, **_MAMBA1},
    *({"batch": 64, **_SIZES, **mode} for mode in _MODES),
    {"batch": 64, **_SIZES, "T": 6, "config.matmul": 0},
    {"batch": 16, "T": 6, **_MAMBA1},
    *({"batch": 16, **_MAMBA1, "dstate": 8, "state_dtype": state} for state in ("float32", "bfloat16")),
]
CHECKED: list[dict[str, int | str]] = [
    {"state_dtype": "float32"},
    {"state_dtype": "bfloat16", "rounding": "stochastic"},
    {"state_dtype": "int8"},
    {"T": 6},
    {"T": 6, "intermediates": 1},
]
TINY: dict[str, int | str] = {"batch": 3, "nheads": 4}
MODES: list[dict[str, int | str]] = [
    {},
    {"state_dtype": "bfloat16"},
    {"state_dtype": "float32"},
    {"state_dtype": "int16"},
    {"state_dtype": "int8"},
    {"state_dtype": "float8_e4m3fn"},
    {"input_dtype": "float16"},
    {"input_dtype": "float32", "state_dtype": "float32"},
    {"layout": "dense", "dstate": 16},
    {"layout": "dense", "dstate": 8},
    {"z": 1},
    {"update": 0},
    {"rounding": "stochastic"},
    {"rounding": "stochastic", "state_dtype": "int8"},
    {"T": 4},
    {"T": 6, "intermediates": 1},
    {"T": 3, "varlen": 1, "ngroups": 2},
]
