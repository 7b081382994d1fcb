"""Read vLLM's files of tuned configs for ``selective_state_update``, and convert their configs.

A file is one JSON object.  Keys that are numbers are effective batches (sequences times heads), and map to
``{"BLOCK_SIZE_M": rows, "num_warps": warps}``; other keys are ignored.  `cute_ssm.compat.vllm` finds the file and
selects the config.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from cute_ssm import arch as archs
from cute_ssm import env
from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.ops.selective_state_update import config as selective_step
from cute_ssm.ops.selective_state_update.spec import SelectiveStateUpdateSpec

KEYS = ("BLOCK_SIZE_M", "num_warps")


@functools.lru_cache(maxsize=1024)
def as_override(
    headdim: int, dstate: int, cache_dtype: str, packed: bool, vllm_config: tuple[int, int]
) -> dict[str, int] | None:
    """Convert a config of vLLM to fields of `SelectiveStepConfig` for `tuning.override`; None if no config fits.

    A CTA gets the rows of one Triton program, split evenly over its warps; rows and warps are then reduced to what fits
    in an SM's shared memory.

    Parameters
    ----------
    headdim, dstate, cache_dtype
        Shape and dtype of the states.
    packed : bool
        Whether there are several tokens per sequence.
    vllm_config : tuple of int
        (BLOCK_SIZE_M, num_warps).
    """
    block_size, wanted_warps = vllm_config
    spec = _spec(headdim, dstate, str(cache_dtype).removeprefix("torch."), packed)
    try:
        spec.check()
    except UnsupportedSpecError:
        return None
    arch = min(archs.ARCHS.values(), key=lambda arch: arch.shared_bytes)
    base = selective_step.choose(spec, arch, heads=1, sm_count=arch.sm_count)
    block = selective_step.widest_block(spec)
    smallest = max(16 if packed and block % 16 == 0 else 8, archs.WARP // base.lanes)
    sizes = [r for r in (8, 16, 32) if smallest <= r <= block]
    sizes += [r for r in range(2 * block, headdim + 1, block) if headdim % r == 0]
    wanted = [r for r in sizes if r * wanted_warps <= block_size] or sizes[:1]
    for rows in reversed(wanted):
        for warps in range(min(wanted_warps, 32), 0, -1):
            stages = selective_step.PIPELINE_STAGES
            config = dataclasses.replace(base, rows=rows, warps=warps, stages=stages, ctas_per_sm=1)
            try:
                config.check(spec, arch)
            except UnsupportedSpecError:
                continue
            fitting = arch.shared_bytes // (config.shared_bytes(spec) + selective_step.CTA_BYTES)
            ctas = max(1, min(fitting, selective_step.RESIDENT_CTAS // warps))
            return {"rows": rows, "warps": warps, "ctas_per_sm": ctas}
    return None


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_pair(config: Any) -> tuple[int, int]:
    """Return (BLOCK_SIZE_M, num_warps) as a tuple.

    Raises
    ------
    ValueError
        If it is not a pair of positive integers.
    """
    if not (isinstance(config, (tuple, list)) and len(config) == 2 and all(map(_is_positive, config))):
        raise ValueError(describe("config", "(BLOCK_SIZE_M, num_warps), two positive integers", config))
    return config[0], config[1]


def read(path: Path) -> dict[int, dict[str, int]] | None:
    """Return the configs of a file, or None if it cannot be parsed; invalid entries are logged and skipped."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        env.logger().warning("%s is ignored: %s", path, error)
        return None
    if not isinstance(content, dict):
        env.logger().warning("%s is ignored: expected a JSON object, got %s", path, type(content).__name__)
        return None
    table: dict[int, dict[str, int]] = {}
    for key, entry in content.items():
        if not (key.isascii() and key.isdigit()):
            continue
        if isinstance(entry, dict) and all(_is_positive(entry.get(name)) for name in KEYS):
            table[int(key)] = entry
        else:
            expected = " and ".join(KEYS)
            env.logger().warning("%s: key %s is ignored: expected positive %s, got %s", path, key, expected, entry)
    return table


def _spec(headdim: int, dstate: int, state_dtype: str, packed: bool) -> SelectiveStateUpdateSpec:
    """Return a spec with the fields that determine which configs are valid."""
    return SelectiveStateUpdateSpec(
        state_dtype=state_dtype,
        input_dtype="float32",
        A_dtype="float32",
        dt_dtype="float32",
        D_dtype=None,
        dt_bias_dtype=None,
        dim=headdim,
        dstate=dstate,
        A_tied=True,
        dt_tied=True,
        D_tied=False,
        has_z=False,
        dt_softplus=False,
        src_dtype=None,
        dst_dtype=None,
        update_state=True,
        zero_padding=False,
        vector_inputs=False,
        tokens="packed" if packed else "one",
    )
