"""vLLM's files of tuned configs for ``selective_state_update``: finding, reading and choosing, and what they mean here.

A file is one JSON object, named by `get_ssm_config_file_name`.  Its keys that are numbers are effective batches,
sequences times heads, and map to ``{"BLOCK_SIZE_M": rows, "num_warps": warps}``; other keys are ignored.  It is looked
for in the folder that ``VLLM_TUNED_CONFIG_FOLDER`` names.  This package bundles no such files: without one, and
without `override_ssm_config`, its own choice of configs holds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cute_ssm import arch as archs
from cute_ssm import env
from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.spec import SelectiveStateUpdateSpec
from cute_ssm.tuning import selective_step

KEYS = ("BLOCK_SIZE_M", "num_warps")
_override: tuple[int, int] | None = None


def get_ssm_config_file_name(headdim: int, dstate: int, device_name: str, cache_dtype: str) -> str:
    """Return the name of the file of tuned configs for states of headdim x dstate on a device.

    Parameters
    ----------
    headdim, dstate : int
    device_name : str
        As ``torch.cuda.get_device_name()`` says it; characters unfit for a file name become underscores.
    cache_dtype : str
        Type of the states, ``"float32"`` or ``"torch.float32"``; bfloat16 shares the file of float16.
    """
    device = re.sub(r"[^\w.]", "_", device_name)
    return f"headdim={headdim},dstate={dstate},device_name={device},cache_dtype={_dtype_key(cache_dtype)}.json"


@functools.lru_cache(maxsize=256)
def get_ssm_configs(
    headdim: int, dstate: int, cache_dtype: str, device_name: str | None = None
) -> dict[int, dict[str, int]] | None:
    """Return the tuned configs of a file by effective batch, or None if no file is found.

    Memorised, so that each search is logged once; ``get_ssm_configs.cache_clear()`` or `clear_ssm_config_caches` makes
    the next call search again.

    Parameters
    ----------
    headdim, dstate, cache_dtype
        As for `get_ssm_config_file_name`.
    device_name : str, optional
        By default that of the current GPU, or ``"cpu"``.

    Returns
    -------
    dict or None
        In the order of the file.  Empty if the file holds no config, which means that none is wanted.
    """
    name = get_ssm_config_file_name(headdim, dstate, device_name or _current_device_name(), cache_dtype)
    folder = env.vllm_tuned_config_folder()
    folders = [folder] if folder is not None else []
    for path in (folder / name for folder in folders):
        table = _read(path)
        if table is not None:
            env.logger().info("selective_state_update takes its configs from %s", path)
            return table
    env.logger().info("no file of tuned configs for selective_state_update: %s", name)
    return None


def try_get_optimal_ssm_config(
    headdim: int,
    dstate: int,
    effective_batch: int,
    cache_dtype: str,
    is_blackwell: bool = False,
    device_name: str | None = None,
) -> tuple[int, int]:
    """Return (BLOCK_SIZE_M, num_warps): of the override, else of the file, else what vLLM falls back to.

    Of a file, the config whose effective batch has the least linear distance; of two, the first.

    Parameters
    ----------
    headdim, dstate, cache_dtype, device_name
        As for `get_ssm_configs`.
    effective_batch : int
        Sequences times heads.
    is_blackwell : bool
        Matters to the fallback only.
    """
    chosen = tuned_config(headdim, dstate, effective_batch, cache_dtype, device_name)
    if chosen is not None:
        return chosen
    for columns, config in ((16, (32, 4)), (32, (16, 4)), (64, (8, 4))):
        if dstate <= columns:
            return config
    if is_blackwell:
        return 32, 8
    return (4, 4) if dstate <= 128 else (4, 8)


@contextmanager
def override_ssm_config(config: tuple[int, int] | None) -> Iterator[None]:
    """Make (BLOCK_SIZE_M, num_warps) win over every file inside the context; None lets files decide again.

    For `cute_ssm.compat.vllm.selective_state_update`; contexts nest.  Not for use from several threads at once.

    Raises
    ------
    ValueError
        The config is not a pair of positive integers.
    """
    global _override
    if config is not None and not _is_pair(config):
        raise ValueError(describe("config", "(BLOCK_SIZE_M, num_warps), two positive integers", config))
    before, _override = _override, config if config is None else (config[0], config[1])
    try:
        yield
    finally:
        _override = before


def clear_ssm_config_caches() -> None:
    """Forget the files that were read, and what was chosen from them."""
    get_ssm_configs.cache_clear()
    _nearest.cache_clear()


def tuned_config(
    headdim: int, dstate: int, effective_batch: int, cache_dtype: str, device_name: str | None = None
) -> tuple[int, int] | None:
    """Return (BLOCK_SIZE_M, num_warps) of the override or of the file; None: neither exists."""
    return _override or _nearest(headdim, dstate, effective_batch, cache_dtype, device_name)


@functools.lru_cache(maxsize=1024)
def as_override(
    headdim: int, dstate: int, cache_dtype: str, packed: bool, vllm_config: tuple[int, int]
) -> dict[str, int] | None:
    """Return the fields of `SelectiveStepConfig` that stand for a config of vLLM, for `tuning.override`.

    A CTA gets the rows of one Triton program, split evenly over its warps; both are then clipped to what the kernel
    can run in an SM's shared memory.  None: no such config can.

    Parameters
    ----------
    headdim, dstate, cache_dtype
        Of the states.
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
    smallest = max(16 if packed and block % 16 == 0 else 8, selective_step.WARP // base.lanes)
    sizes = [r for r in (8, 16, 32) if smallest <= r <= block]
    sizes += [r for r in range(2 * block, headdim + 1, block) if headdim % r == 0]
    wanted = [r for r in sizes if r * wanted_warps <= block_size] or sizes[:1]
    for rows in reversed(wanted):
        for warps in range(min(wanted_warps, 32), 0, -1):
            config = dataclasses.replace(base, rows=rows, warps=warps, stages=selective_step.RING, ctas_per_sm=1)
            try:
                config.check(spec, arch)
            except UnsupportedSpecError:
                continue
            fitting = arch.shared_bytes // (config.shared_bytes(spec) + selective_step.CTA_BYTES)
            ctas = max(1, min(fitting, selective_step.RESIDENT_CTAS // warps))
            return {"rows": rows, "warps": warps, "ctas_per_sm": ctas}
    return None


@functools.lru_cache(maxsize=4096)
def _nearest(
    headdim: int, dstate: int, effective_batch: int, cache_dtype: str, device_name: str | None
) -> tuple[int, int] | None:
    table = get_ssm_configs(headdim, dstate, _dtype_key(cache_dtype), device_name)
    if not table:
        return None
    entry = table[min(table, key=lambda key: abs(key - effective_batch))]
    return entry[KEYS[0]], entry[KEYS[1]]


def _dtype_key(cache_dtype: object) -> str:
    name = str(cache_dtype).removeprefix("torch.")
    return "float16" if name == "bfloat16" else name


def _current_device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _is_pair(config: object) -> bool:
    return isinstance(config, (tuple, list)) and len(config) == 2 and all(map(_is_positive, config))


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _read(path: Path) -> dict[int, dict[str, int]] | None:
    """Return the configs of a file, or None if it is none; what is wrong in it is logged and left out."""
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
    """Return a spec with the fields that the legality of a config depends on."""
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
