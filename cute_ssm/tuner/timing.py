"""Times on a GPU: CUDA graphs over arguments that no cache holds; competitors take turns.

A graph makes one call on each of several sets of arguments, of which a pass moves three times what the L2 holds, so
that every call finds a cold cache.  Its time, by events, divided by the calls, is one sample; samples of all
competitors alternate, so that clocks and temperature drift for all alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from cute_ssm import workloads
from cute_ssm.workloads import Call

TIMES_L2 = 3
LEAST_SETS, MOST_SETS = 4, 256
MEMORY_SHARE = 0.4  # of what is free
WARM_UP = 3


def sets_for(floor_bytes: int, set_bytes: int, l2_bytes: int, free_bytes: int) -> int:
    """Return how many sets of arguments a pass goes over.

    ``floor_bytes`` are those that a call moves, ``set_bytes`` what its arguments take.

    Raises
    ------
    MemoryError
        Not even two sets fit.
    """
    fitting = int(MEMORY_SHARE * free_bytes // set_bytes)
    if fitting < 2:
        raise MemoryError(f"two sets of {set_bytes >> 20} MiB do not fit in {free_bytes >> 20} MiB")
    wanted = max(LEAST_SETS, math.ceil(TIMES_L2 * l2_bytes / floor_bytes))
    return min(wanted, MOST_SETS, fitting)


def rotated(op: str, keys: dict[str, int | str], device: torch.device, most: int = MOST_SETS) -> list[Call]:
    """Return sets of arguments for a call, as many as `sets_for` asks for, at most `most`."""
    first = workloads.build(op, keys, device)
    size = sum(v.untyped_storage().nbytes() for v in first.arguments.values() if isinstance(v, torch.Tensor))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(most, sets_for(first.floor_bytes, size, cache, torch.cuda.mem_get_info(device)[0]))
    return [first, *(workloads.build(op, keys, device, seed=i) for i in range(1, count))]


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Return the graph of a pass over the calls, of which two are made before: all has compiled and allocated then."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls[:2]:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def alternate(
    passes: dict[str, tuple[torch.cuda.CUDAGraph, int]], samples: int, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Return microseconds per call of every competitor: name -> (graph, calls in it)."""
    times: dict[str, list[float]] = {name: [] for name in passes}
    for i in range(warm_up + samples):
        for name, (graph, calls) in passes.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= warm_up:
                times[name].append(start.elapsed_time(end) * 1e3 / calls)
    return times
