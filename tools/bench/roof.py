"""What times on a GPU are held against: copies of as many bytes, and clocks; and how samples are summed up."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Sequence

import torch

from cute_ssm.tuner.timing import MOST_SETS, alternate, capture, sets_for


def summary(times: Sequence[float]) -> dict[str, float]:
    """Return median, 10th and 90th percentile."""
    if len(times) == 1:
        return dict.fromkeys(("median", "p10", "p90"), times[0])
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return {"median": statistics.median(times), "p10": tenths[0], "p90": tenths[-1]}


def copies(n_bytes: int, device: torch.device, most: int = MOST_SETS) -> list[Callable[[], object]]:
    """Return copies that move as many bytes as a call does, on rotated memory, of `most` sets at most."""
    half = max(n_bytes // 2, 16) // 16 * 16
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(most, sets_for(2 * half, 2 * half, cache, torch.cuda.mem_get_info(device)[0]))
    pairs = [torch.empty(2, half, dtype=torch.uint8, device=device) for _ in range(count)]
    return [lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs]


def copy_bandwidth(device: torch.device, samples: int = 20, n_bytes: int = 1 << 29) -> float:
    """Return the bytes per second, read and written, of a copy, by default of half a gibibyte."""
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    graph = capture([lambda: target.copy_(source)])
    times = alternate({"copy": (graph, 1)}, samples)["copy"]
    return 2 * source.numel() / (statistics.median(times) * 1e-6)


def clocks(index: int) -> dict[str, str]:
    """Return clocks, power limit and temperature; nothing without nvidia-smi."""
    return asked(("clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu"), index)


def asked(fields: Sequence[str], index: int) -> dict[str, str]:
    """Return what nvidia-smi says of a GPU; nothing without it, or if it does not know a field."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", str(index)]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in done.stdout.strip().split(","))))
