"""Calls of `cute_ssm.gated_delta_rule_mtp`."""

from __future__ import annotations

from typing import Any

from cute_ssm.workloads import Call
from cute_ssm.workloads.maker import Maker, dtype, stored_bytes

BATCH = "B"
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def build(
    make: Maker, B: int = 16, T: int = 4, H: int = 16, HV: int = 32, K: int = 128, V: int = 128,
    state_dtype: str = "float32", input_dtype: str = "bfloat16", verify: int = 1, buffer: int = 0, packed: int = 0,
) -> Call:  # fmt: skip
    """Build a call with T tokens for each request, in random slots of a pool.  A unit is one (request, value head).

    verify: do not update the states.  buffer: write the state after every token to a buffer.  packed: the tokens of all
    requests lie one after the other, with cu_seqlens.
    """
    inputs, states = dtype(input_dtype), dtype(state_dtype)
    slots, rows = 2 * B, (1, B * T) if packed else (B, T)
    arguments = {
        "q": make.normal(*rows, H, K, dtype=inputs),
        "k": make.normal(*rows, H, K, dtype=inputs),
        "v": make.normal(*rows, HV, V, dtype=inputs),
        "initial_state": make.normal(slots, HV, V, K, dtype=states),
        "initial_state_indices": make.slots(slots, B),
        "A_log": make.normal(HV),
        "a": make.normal(*rows, HV, dtype=inputs),
        "dt_bias": make.normal(HV),
        "b": make.normal(*rows, HV, dtype=inputs),
        "output": make.empty(*rows, HV, V, dtype=inputs),
    }
    if packed:
        arguments["cu_seqlens"] = make.steps(B, T)
    images = 1 + (not verify) + (T if buffer else 0)
    floor_bytes = images * B * HV * V * K * states.itemsize
    floor_bytes += sum(stored_bytes(tensor) for name, tensor in arguments.items() if name != "initial_state")
    if buffer:
        arguments["intermediate_states_buffer"] = make.empty(B, T, HV, V, K, dtype=states)
    written = ("output", "initial_state", "intermediate_states_buffer")
    flags: dict[str, Any] = {"disable_state_update": bool(verify)}
    if packed:
        flags["max_seqlen"] = T
    return Call("gated_delta_rule_mtp", {**arguments, **flags}, written, B * HV, floor_bytes)


def _heads(HV: int) -> list[dict[str, int | str]]:
    """Return the sizes of decoding, and of the verification of four drafted tokens, with 16 heads."""
    decode: dict[str, int | str] = {"H": 16, "HV": HV, "T": 1, "verify": 0}
    return [
        {**keys, "state_dtype": state} for state in ("float32", "bfloat16") for keys in (decode, {**decode, "T": 4})
    ]


MODELS: dict[str, list[dict[str, int | str]]] = {"qwen3-next": _heads(32), "qwen3.5": _heads(64)}

COUNTED: list[dict[str, int | str]] = [
    {"B": 16, "T": 4},
    {"B": 16, "T": 8},
    {"B": 16, "T": 4, "verify": 0},
    {"B": 16, "T": 4, "state_dtype": "bfloat16"},
    {"B": 16, "T": 4, "verify": 0, "buffer": 1},
    {"B": 16, "T": 1, "verify": 0},
    {"B": 16, "T": 1, "verify": 0, "config.sequential": 0},
    {"B": 16, "T": 2},
    {"B": 16, "T": 2, "config.sequential": 1},
    {"B": 1, "T": 1, "verify": 0},
    {"B": 1, "T": 1, "verify": 0, "config.sequential": 0},
    {"B": 16, "T": 4, "packed": 1},
    {"B": 16, "T": 1, "verify": 0, "packed": 1},
    {"B": 4, "T": 64, "verify": 0},
    {"B": 16, "T": 4, "K": 96, "V": 192},
    {"B": 16, "T": 1, "verify": 0, "K": 96, "V": 192},
    {"B": 4, "T": 4, "K": 256, "V": 512},
    {"B": 4, "T": 20, "K": 256, "V": 256},
]
CHECKED: list[dict[str, int | str]] = [{"state_dtype": "bfloat16", "verify": 0}, {"T": 8}]
TINY: dict[str, int | str] = {"B": 2, "H": 2, "HV": 4}
MODES: list[dict[str, int | str]] = [
    {},
    {"verify": 0, "state_dtype": "bfloat16"},
    {"state_dtype": "float16"},
    {"input_dtype": "float16"},
    {"T": 1},
    {"T": 8, "buffer": 1},
    {"T": 3, "packed": 1, "verify": 0},
    {"T": 20},
]
