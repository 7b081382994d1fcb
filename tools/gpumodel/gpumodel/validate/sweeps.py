"""Ranking: does the model find the winners of published tuning tables?

vLLM ships the fastest (BLOCK_SIZE_M, num_warps) of ``selective_state_update`` by GPU, state type and batch times heads.
A sweep models all configurations that its tuner tried.  The regret is how much longer the published winner takes than
the modelled one, by the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..model import Conditions
from .kernels import KERNELS, folder_of
from .points import Point

PACKAGE = "vllm-0.33.0"
FOLDER = "vllm/model_executor/layers/mamba/ops/configs/selective_state_update"
DEVICES = {"H100": "NVIDIA_H100_80GB_HBM3", "H200": "NVIDIA_H200", "B200": "NVIDIA_B200"}
CALLS = {1024: (8, 128), 8192: (32, 256)}  # batch times heads -> both, as the tuner chose them
SWEPT = [(gpu, dtype, size) for gpu, dtype in (("H100", "float16"), ("H200", "float32"), ("B200", "float16"),
         ("B200", "float32")) for size in CALLS]  # fmt: skip
TILES, WARPS = (4, 8, 16, 32, 64), (1, 2, 4, 8)
Config = tuple[int, int]


class Sweep(NamedTuple):
    """Modelled microseconds of configurations, and the published winner."""

    name: str
    winner: Config
    us: dict[Config, float]

    @property
    def best(self) -> Config:
        """The modelled winner."""
        return min(self.us, key=self.us.__getitem__)

    @property
    def rank(self) -> int:
        """The published winner's place, from 1."""
        return 1 + sum(us < self.us[self.winner] for us in self.us.values())

    @property
    def regret(self) -> float:
        return self.us[self.winner] / self.us[self.best] - 1

    def as_json(self) -> dict[str, Any]:
        """Return types of JSON."""
        return {
            "name": self.name, "published winner": str(self.winner), "modelled winner": str(self.best),
            "rank": self.rank, "regret": round(self.regret, 4),
            "modelled": {str(config): round(us, 3) for config, us in self.us.items()},
        }  # fmt: skip


def table(peers: Path, gpu: str, state_dtype: str) -> dict[int, Config]:
    """Return vLLM's tuned configurations for heads of 64 and states of 128, by batch times heads."""
    name = f"headdim=64,dstate=128,device_name={DEVICES[gpu]},cache_dtype={state_dtype}.json"
    listed = json.loads((folder_of(peers, PACKAGE) / FOLDER / name).read_text(encoding="utf-8"))
    return {int(k): (v["BLOCK_SIZE_M"], v["num_warps"]) for k, v in listed.items() if k.isdigit()}


def points(gpu: str, state_dtype: str, size: int) -> Iterator[tuple[Config, Point]]:
    """Yield the configurations of a sweep."""
    kernel = "vllm selective_state_update"
    batch, nheads = CALLS[size]
    for tile in TILES:
        for warps in WARPS:
            keys = {**KERNELS[kernel].keys, "batch": batch, "nheads": nheads, "state_dtype": state_dtype,
                    "block_m": tile, "warps": warps}  # fmt: skip
            yield (tile, warps), Point(f"{gpu} {state_dtype} {size} ({tile}, {warps})", "", "", gpu, kernel, keys,
                                       Conditions(data="warm"), 1.0)  # fmt: skip


def run(peers: Path, modelled: Callable[[Point], float], report: Callable[[str], object]) -> Iterator[Sweep]:
    """Model all sweeps."""
    for gpu, state_dtype, size in SWEPT:
        winner = table(peers, gpu, state_dtype)[size]
        name = f"{gpu} {state_dtype} batch x heads {size}"
        found = Sweep(name, winner, {config: modelled(point) for config, point in points(gpu, state_dtype, size)})
        report(f"{name}: regret {found.regret:.1%}, rank {found.rank}")
        yield found
