"""Calls timed beside their peers and a copy on a GPU, in five circumstances.

All are medians over samples of CUDA graphs, whose competitors take turns (`cute_ssm.tuner.timing`):

==========  ===================================================================================================
chained     calls one behind the other, on rotated arguments that no L2 holds; launches that are dependent ones
            (PDL) overlap, those of peers do not
dependent   the same with PDL asked for, of operators that have it on request only
apart       a tiny kernel between the calls, whose own time is subtracted: PDL has nothing to overlap with
evicted     a kernel that is longer than the instruction caches between the calls, likewise subtracted: an SM
            fetches the call's code anew
warm        the same arguments at each call: in L2, where they fit
==========  ===================================================================================================

``us`` of a line is the chained time, as everywhere in `bench`; ``variants`` has all.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gpu_calls
import torch
from gpu_pass import probes
from gpu_pass.records import device_is_alive

from bench import peers, roof
from bench.cases import Case
from cute_ssm import runtime, workloads
from cute_ssm.tuner import timing

OWN = "cute_ssm"
Calls = list[Callable[[], object]]


@dataclass(frozen=True)
class Effort:
    """How much is timed.

    Attributes
    ----------
    samples, warm_up : int
        Replays of each graph that count, and before them.
    sets : int
        Of arguments, at most.
    copy_bytes : int
        Of the copy whose bandwidth times are held against.
    """

    samples: int = 12
    warm_up: int = timing.WARM_UP
    sets: int = timing.MOST_SETS
    copy_bytes: int = 1 << 29


def asking() -> set[str]:
    """Return the operators whose launches are dependent ones only if asked; those of others always are."""
    return {made.op for made in gpu_calls.dependent()}


class Clockwork:
    """Times calls on one GPU."""

    def __init__(self, device: torch.device, effort: Effort):
        self.device, self.effort = device, effort
        copy = roof.copy_bandwidth(device, max(1, effort.samples), effort.copy_bytes)
        properties = torch.cuda.get_device_properties(device)
        self.copy = copy
        self.about = {
            "device": properties.name, "arch": "sm_{}{}a".format(*torch.cuda.get_device_capability(device)),
            "copy_gbs": round(copy / 1e9, 1), "sms": properties.multi_processor_count,
        }  # fmt: skip
        tiny = torch.zeros(32, device=device)
        self.between: dict[str, Callable[[], object]] = {"apart": lambda: tiny.zero_()}
        self.why_not: dict[str, str] = {}
        try:
            self.between["evicted"] = evictor(device, properties.multi_processor_count)
        except Exception as error:
            self.why_not["evicted"] = f"{type(error).__name__}: {str(error)[:200]}"

    def line(self, case: Case, batch: int) -> dict[str, Any]:
        """Time a call and its peers, in turns."""
        keys = case.call(batch)
        torch.cuda.empty_cache()  # what the last call held is free again for as many sets of arguments
        rotated = timing.rotated(case.op, keys, self.device, self.effort.sets)
        rivals, absent = peers.of(case.op, [call.arguments for call in rotated])
        competitors: dict[str, Calls] = {OWN: [call.run for call in rotated], **rivals}
        competitors["copy"] = roof.copies(rotated[0].floor_bytes, self.device, self.effort.sets)
        passes, own_absent = self._passes(case, competitors, absent, rotated)
        medians = self._medians(passes)
        found = {name: medians[name] for name in competitors if name in medians}
        ours = found.pop(OWN)
        n_bytes = rotated[0].floor_bytes
        speed = n_bytes / (ours["chained"]["median"] * 1e-6)
        rest: dict[str, Any] = {name: {"absent": reason} for name, reason in absent.items()}
        for name, variants in found.items():
            ratio = round(variants["chained"]["median"] / ours["chained"]["median"], 3)
            rest[name] = {"us": variants["chained"], "ratio": ratio, "variants": variants}
        return case.line(
            batch, how="measured", **self.about, clocks=roof.clocks(self.device.index or 0), us=ours["chained"],
            variants=ours, absent=own_absent, pdl="asked" if case.op in asking() else "always", sets=len(rotated),
            bytes=n_bytes, gbs=round(speed / 1e9, 1), of_copy=round(speed / self.copy, 4), peers=rest,
        )  # fmt: skip

    def _passes(
        self, case: Case, competitors: dict[str, Calls], absent: dict[str, str], rotated: Sequence[workloads.Call]
    ) -> tuple[dict[tuple[str, str], tuple[torch.cuda.CUDAGraph, int]], dict[str, str]]:
        """Capture all variants of all competitors; a peer that refuses this call becomes absent."""
        passes: dict[tuple[str, str], tuple[torch.cuda.CUDAGraph, int]] = {}
        own_absent = dict(self.why_not)
        for name, made in competitors.items():
            try:
                passes |= self._variants(name, made)
            except Exception as error:
                if name == OWN or not device_is_alive():
                    raise
                absent[name] = f"{type(error).__name__}: {str(error)[:200]}"
        if case.op in asking():
            asked = [replace(one, arguments={**one.arguments, "enable_pdl": True}) for one in rotated]
            try:
                passes[OWN, "dependent"] = (timing.capture([one.run for one in asked]), len(asked))
            except Exception as error:
                if not device_is_alive():
                    raise
                own_absent["dependent"] = f"{type(error).__name__}: {str(error)[:200]}"
        count = len(rotated)
        for variant, other in self.between.items():
            passes["between", variant] = (timing.capture([other] * count), count)
        return passes, own_absent

    def _variants(self, name: str, made: Calls) -> dict[tuple[str, str], tuple[torch.cuda.CUDAGraph, int]]:
        count = len(made)
        found = {(name, "chained"): (timing.capture(made), count)}
        if name != "copy":
            found[name, "warm"] = (timing.capture(made[:1] * count), count)
        for variant, other in self.between.items():
            mixed = [one for call in made for one in (other, call)]
            found[name, variant] = (timing.capture(mixed), count)
        return found

    def _medians(self, passes: dict[tuple[str, str], Any]) -> dict[str, dict[str, dict[str, float]]]:
        """Return the times by competitor and variant, without those of what lies between the calls."""
        words = {f"{name}/{variant}": value for (name, variant), value in passes.items()}
        times = timing.alternate(words, self.effort.samples, self.effort.warm_up)
        found: dict[str, dict[str, dict[str, float]]] = {}
        for name, variant in passes:
            samples = times[f"{name}/{variant}"]
            if name != "between" and ("between", variant) in passes:
                alone = statistics.median(times[f"between/{variant}"])
                samples = [us - alone for us in samples]
            summed = {key: round(us, 4) for key, us in roof.summary(samples).items()}
            found.setdefault(name, {})[variant] = summed
        return found


def evictor(device: torch.device, sms: int) -> Callable[[], object]:
    """Return a call of the long kernel, on every SM."""
    probes.register()
    kernel = runtime.get(probes.LongSpec(), probes.ProbeConfig())
    values = torch.zeros(sms, device=device)
    return lambda: kernel(values)
