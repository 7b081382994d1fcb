"""Idle waves, kept for later launches of the same shape: tests launch small kernels by the thousand."""

from __future__ import annotations

import threading
from collections import OrderedDict

from .wave import Wave

LIMIT = 1 << 28  # bytes of all idle waves
_idle = OrderedDict()  # (program, CTAs, threads, cluster, shared bytes) -> wave, the oldest first
_lock = threading.Lock()


def take(launch, count):
    """(key, wave) of ``count`` CTAs for ``launch``; return it with ``keep``."""
    program = launch.program
    key = (program, count, launch.block_threads, launch.cluster_size, launch.smem_total)
    with _lock:
        wave = _idle.pop(key, None)
    wave = wave or Wave(program, launch, count)
    wave.attach(launch)
    return key, wave


def keep(key, wave):
    """Keep a wave, at the cost of the oldest ones."""
    wave.detach()
    if wave.bytes > LIMIT // 4:
        return
    with _lock:
        _idle[key] = wave
        total = sum(w.bytes for w in _idle.values())
        while total > LIMIT:
            total -= _idle.popitem(last=False)[1].bytes
