"""Calls of `cute_ssm.checkpointing_ssu`."""

from __future__ import annotations

import torch

from cute_ssm.serving import StatePool
from cute_ssm.workloads import Call, phases
from cute_ssm.workloads.maker import Maker, dtype, stored_bytes

BATCH = "batch"
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LARGEST = {"int16": 32767, "int8": 127, "float8_e4m3fn": 448}


def build(
    make: Maker, batch: int = 64, T: int = 6, W: int = 16, nheads: int = 16, dim: int = 64, dstate: int = 128,
    ngroups: int = 1, state_dtype: str = "float16", input_dtype: str = "bfloat16", pnat: str = "mixture",
    rounding: str = "nearest", z: int = 0, items: int = 0, fused: int = 0,
) -> Call:  # fmt: skip
    """Make a call with T new tokens for each sequence and a history of W rows.

    Slots are a random permutation of a pool; a unit is one (sequence, head).  pnat: pending tokens, a number for all
    slots, or "mixture": the stationary distribution of `workloads.phases`, as in service.  rounding: nearest or
    stochastic (10 rounds of Philox).  z: gate by silu(z).  items: with a list of work.  fused: z, x, B, C and dt are
    views of the rows of one projection, which need not be multiples of 16 bytes apart.
    """
    inputs, states = dtype(input_dtype), dtype(state_dtype)
    slots, scaled = 2 * batch, state_dtype in LARGEST

    def per_head(*shape: int) -> torch.Tensor:
        return make.normal(*shape)[..., None].expand(*shape, dim)

    order = make.slots(slots, batch)
    accepted = torch.zeros(slots, dtype=torch.int32, device=make.device)
    if pnat == "mixture":
        drawn = phases.draw(batch, W, phases.accepted(T), seed=int(make.generator.initial_seed() % 2**32))
    else:
        drawn = torch.full((batch,), int(pnat), dtype=torch.int32)
    accepted[order.long()] = drawn.to(make.device)
    buffers = torch.randint(0, 2, (slots,), generator=make.generator, device=make.device).int()
    arguments = {
        "x": make.normal(batch, T, nheads, dim, dtype=inputs),
        "dt": per_head(batch, T, nheads),
        "A": (-make.uniform(nheads, 1, 1)).expand(nheads, dim, dstate),
        "B": make.normal(batch, T, ngroups, dstate, dtype=inputs),
        "C": make.normal(batch, T, ngroups, dstate, dtype=inputs),
        "out": make.empty(batch, T, nheads, dim, dtype=inputs),
        "D": per_head(nheads),
        "z": make.normal(batch, T, nheads, dim, dtype=inputs) if z else None,
        "dt_bias": per_head(nheads),
        "state_batch_indices": order,
        "rand_seed": torch.tensor([2**40 + 1], device=make.device) if rounding == "stochastic" else None,
    }
    if fused:
        sizes = [nheads * dim, nheads * dim, ngroups * dstate, ngroups * dstate, nheads]
        parts = torch.split(make.normal(batch, T, sum(sizes), dtype=inputs), sizes, -1)
        gate, arguments["x"], arguments["B"], arguments["C"] = (
            torch.unflatten(part, -1, (-1, inner)) for part, inner in zip(parts, (dim, dim, dstate, dstate))
        )
        arguments["z"] = gate if z else None
        arguments["dt"] = parts[4][..., None].expand(batch, T, nheads, dim)
    floor = sum(map(stored_bytes, arguments.values()))
    pool = make.normal(slots, nheads, dim, dstate)
    scale = None
    if scaled:
        scale = pool.abs().amax(-1) / LARGEST[state_dtype] if make.fill else make.empty(slots, nheads, dim)
        pool = pool / scale[..., None] if make.fill else pool
    history = {
        "state": pool.to(states) if make.fill else make.empty(*pool.shape, dtype=states),
        "old_x": make.normal(slots, W, nheads, dim, dtype=inputs),
        "old_B": make.normal(slots, 2, W, ngroups, dstate, dtype=inputs),
        "old_dt": 0.1 * make.uniform(slots, 2, nheads, W),
        "old_cumAdt": make.empty(slots, 2, nheads, W).zero_(),
        "cache_buf_idx": buffers,
        "prev_num_accepted_tokens": accepted,
        "state_scale": scale,
    }
    state_bytes = nheads * dim * (dstate * states.itemsize + 4 * scaled)
    row = (nheads * dim + ngroups * dstate) * inputs.itemsize + nheads * 4  # of a history: x, B, dt'
    writes = int((drawn + T > W).sum())
    read, appended = int(drawn.sum()), batch * min(T, W)
    floor += (batch + writes) * state_bytes + (read + appended) * row + appended * nheads * 4 + 8 * batch
    if items:
        listed = sorted(range(batch), key=lambda i: int(drawn[i]) + T <= W)
        rows = [[i, int(order[i]), int(drawn[i]), int(buffers[order[i]])] for i in listed]
        history["work_items"] = torch.tensor(rows, dtype=torch.int32, device=make.device)
        history["num_writes"] = torch.tensor([writes], dtype=torch.int32, device=make.device)
        floor += 16 * batch
    written = ("out", "state", "state_scale", "old_x", "old_B", "old_dt", "old_cumAdt")
    return Call(
        "checkpointing_ssu", {**history, **arguments, "dt_softplus": True}, written, batch * nheads, floor
    )  # fmt: skip


def pool(
    W: int, T: int, nheads: int, dim: int, dstate: int, ngroups: int, state_dtype: str, input_dtype: str, rounding: str,
    **_: int | str,
) -> StatePool:  # fmt: skip
    """As `workloads.pool`."""
    return StatePool.mamba2(
        1, 1, nheads=nheads, dim=dim, dstate=dstate, ngroups=ngroups, window=W, tokens=T,
        state_dtype=dtype(state_dtype), input_dtype=dtype(input_dtype), history="double",
        seed=0 if rounding == "stochastic" else None,
    )  # fmt: skip


def _shard(shards: int, **keys: int | str) -> dict[str, int | str]:
    """Parameters of one of several GPUs that share a model of 128 heads in 8 groups."""
    return {"nheads": 128 // shards, "ngroups": 8 // shards, **keys}


MODELS: dict[str, list[dict[str, int | str]]] = {
    "nemotron-3-super": [
        *(_shard(shards, state_dtype=state) for shards in (1, 8) for state in ("float32", "float16", "int8")),
        _shard(8, state_dtype="float16", rounding="stochastic"),
        _shard(8, state_dtype="float8_e4m3fn"),
    ],
    "codestral-mamba": [_shard(1, state_dtype="bfloat16")],
}

SMALL: dict[str, int | str] = {"nheads": 4}
_SIZES: dict[str, int | str] = {"nheads": 16, "dim": 64, "dstate": 128, "ngroups": 1, "T": 6, "W": 16, "z": 1}
COUNTED: list[dict[str, int | str]] = [
    *(
        {"batch": 64, **_SIZES, "state_dtype": dtype, "pnat": pnat}
        for pnat in (8, 12)
        for dtype in ("bfloat16", "float16", "float32", "int8", "float8_e4m3fn", "int16")
    ),
    {"batch": 64, **_SIZES, "pnat": 12, "rounding": "stochastic"},
    {"batch": 64, **_SIZES, "pnat": 12, "state_dtype": "int8", "rounding": "stochastic"},
    {"batch": 512, **_SIZES, "pnat": 8},
    {"batch": 1, **_SIZES, "pnat": 8, "state_dtype": "bfloat16"},
    {"batch": 1, **_SIZES, "pnat": 8},
]
CHECKED: list[dict[str, int | str]] = [{"state_dtype": "float32"}, {"state_dtype": "int8"}, {"rounding": "stochastic"}]
TINY: dict[str, int | str] = {"batch": 3, "nheads": 4}
MODES: list[dict[str, int | str]] = [
    {},
    {"state_dtype": "bfloat16"},
    {"state_dtype": "float32"},
    {"state_dtype": "int16"},
    {"state_dtype": "int8"},
    {"state_dtype": "float8_e4m3fn"},
    {"input_dtype": "float16"},
    {"rounding": "stochastic"},
    {"z": 1},
    {"items": 1},
    {"fused": 1},
    {"T": 1, "W": 4, "ngroups": 2},
    {"pnat": 16},
]
