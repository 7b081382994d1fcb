"""Calls of `cute_ssm.gated_delta_rule_replay`."""

from __future__ import annotations

import torch

from cute_ssm.serving import StatePool
from cute_ssm.workloads import Call, phases
from cute_ssm.workloads.maker import Maker, dtype, stored_bytes

BATCH = "B"
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
RINGS = ("k_cache", "v_cache", "g_cache", "beta_cache")


def build(
    make: Maker, B: int = 16, T: int = 4, W: int = 16, H: int = 16, HV: int = 32, K: int = 128, V: int = 128,
    state_dtype: str = "float32", input_dtype: str = "bfloat16", pnat: str = "mixture",
) -> Call:  # fmt: skip
    """Build a call with T new tokens for each request, after up to W pending ones, in random slots of a pool.

    A unit is one (request, value head).  pnat: number of pending tokens of every slot, or "mixture": the stationary
    distribution of `workloads.phases`, as in serving.  Rings start at random rows.
    """
    inputs, states = dtype(input_dtype), dtype(state_dtype)
    slots, length = 2 * B, W + T
    order = make.slots(slots, B)
    if pnat == "mixture":
        drawn = phases.draw(B, W, phases.accepted(T), seed=int(make.generator.initial_seed() % 2**32))
    else:
        drawn = torch.full((B,), int(pnat), dtype=torch.int32)
    pending = torch.zeros(slots, dtype=torch.int32, device=make.device)
    pending[order.long()] = drawn.to(make.device)
    arguments = {
        "q": make.normal(B, T, H, K, dtype=inputs),
        "k": make.normal(B, T, H, K, dtype=inputs),
        "v": make.normal(B, T, HV, V, dtype=inputs),
        "initial_state_indices": order,
        "A_log": make.normal(HV),
        "a": make.normal(B, T, HV, dtype=inputs),
        "dt_bias": make.normal(HV),
        "b": make.normal(B, T, HV, dtype=inputs),
        "output": make.empty(B, T, HV, V, dtype=inputs),
    }
    floor = sum(map(stored_bytes, arguments.values()))
    history = {
        "initial_state": make.normal(slots, HV, V, K, dtype=states),
        "k_cache": make.normal(slots, H, length, K, dtype=inputs),
        "v_cache": make.normal(slots, HV, length, V, dtype=inputs),
        "g_cache": -make.uniform(slots, HV, length),
        "beta_cache": make.uniform(slots, HV, length),
        "ring_start": torch.randint(0, length, (slots,), generator=make.generator, device=make.device).int(),
        "prev_num_accepted_tokens": pending,
    }
    row = (H * K + HV * V) * inputs.itemsize + 8 * HV  # of the rings
    flushes = int(((drawn + T > W) & (drawn > 0)).sum())
    floor += (B + flushes) * HV * V * K * states.itemsize + (int(drawn.sum()) + B * T) * row + 8 * B
    written = ("output", "initial_state", *RINGS)
    return Call("gated_delta_rule_replay", {**history, **arguments, "window": W}, written, B * HV, floor)


def _heads(HV: int) -> list[dict[str, int | str]]:
    """Return the sizes of the verification of four drafted tokens, with 16 heads."""
    return [{"H": 16, "HV": HV, "T": 4, "state_dtype": state} for state in ("float32", "bfloat16")]


def pool(
    W: int, T: int, H: int, HV: int, K: int, V: int, state_dtype: str, input_dtype: str, **_: int | str
) -> StatePool:
    """Return a pool for calls of these sizes: see `workloads.pool`."""
    return StatePool.gated_delta(
        1, 1, heads=H, value_heads=HV, K=K, V=V, window=W, tokens=T, state_dtype=dtype(state_dtype),
        input_dtype=dtype(input_dtype),
    )  # fmt: skip


MODELS: dict[str, list[dict[str, int | str]]] = {"qwen3-next": _heads(32), "qwen3.5": _heads(64)}

COUNTED: list[dict[str, int | str]] = [
    {"B": 16, "T": 4},
    {"B": 16, "T": 4, "pnat": 0},
    {"B": 16, "T": 4, "state_dtype": "bfloat16"},
    {"B": 16, "T": 8, "W": 24},
]
TINY: dict[str, int | str] = {"B": 2, "H": 2, "HV": 4}
MODES: list[dict[str, int | str]] = [
    {},
    {"state_dtype": "bfloat16"},
    {"state_dtype": "float16"},
    {"input_dtype": "float16"},
    {"T": 1, "pnat": 16},
]
