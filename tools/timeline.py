"""Draw what every warp of a CTA waits for, and how many bytes of state are on their way; modelled.

    python tools/timeline.py selective_state_update batch=128 nheads=16 --machine H200 --png timeline.png
    python tools/timeline.py gated_delta_rule_mtp B=32 T=4 config.rows=64 --cta 2

Keys are those of tools/count.py.  The clocks are those of `machine`, whose constants are fitted to no measurement: the
picture shows the order of events and what overlaps, not times.  A call that is larger than the model replays is drawn
with as many requests as it does replay, and the config of the large one.

Warps have the names that their kernel class gives them: ``ROLES``, a tuple of one name per warp, of which the last is
that of all further warps; or a function ``roles(spec, config)`` that returns such a tuple.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import machine
from cute_ssm import runtime, workloads
from cute_ssm.demo import report as plotting
from cute_ssm.runtime import registry
from machine import model

CLASSES = {  # how a reason to wait is drawn: letter, colour, and how the reason begins
    "issuing": ("#", "#2b6a4d", ()),
    "state": ("S", "#b3261e", ()),
    "other data": ("d", "#e08a1e", ("load of", "copy of", "cp.async")),
    "stores": ("w", "#8e6bbf", ("bulk store",)),
    "another warp": ("b", "#3b6fb6", ("barrier", "mbarrier", "warp barrier")),
    "shared memory": ("s", "#6aa5d8", ("shared memory", "load/store unit", "lsu", "local memory")),
    "arithmetic": ("a", "#c9c9c9", ()),
    "issue slots": ("i", "#8fbf9f", ("issue",)),
}
BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass
class Life:
    """One CTA's life on the modelled SM.

    ``warps`` holds, per warp: name, waits as (start, end, reason), first and last clock.  ``in_flight`` are
    (clock, bytes) steps of the state's bytes on their way to this CTA, ``sm_in_flight`` to its SM.
    """

    kernel: str
    cta: int
    ctas: int
    places: int
    start: float
    end: float
    warps: list[tuple[str, list, float, float]] = field(default_factory=list)
    in_flight: list[tuple[float, int]] = field(default_factory=list)
    sm_in_flight: list[tuple[float, int]] = field(default_factory=list)

    def waits(self, role: str) -> dict[str, float]:
        """Share of the lives of the warps of a role per reason, issuing included."""
        mine = [warp for warp in self.warps if warp[0] == role]
        total = sum(last - first for _, _, first, last in mine)
        reasons = Counter()
        for _, segments, _, _ in mine:
            for start, end, reason in segments:
                reasons[reason] += end - start
        shares = {reason: clocks / total for reason, clocks in reasons.most_common()}
        return {"issuing": 1 - sum(shares.values()), **shares}

    def mean_in_flight(self, steps: list[tuple[float, int]]) -> float:
        """Mean of ``in_flight`` or ``sm_in_flight`` over the CTA's life."""
        return sum(level(steps, self.start, self.end, 400)) / 400

    def as_dict(self) -> dict:
        """What the text says, as plain values."""
        roles = list(dict.fromkeys(name for name, _, _, _ in self.warps))
        return {
            "kernel": self.kernel,
            "cta": self.cta,
            "ctas_of_sm": self.ctas,
            "places": self.places,
            "clocks": round(self.end - self.start),
            "roles": {role: {why: round(share, 4) for why, share in self.waits(role).items()} for role in roles},
            "state_bytes_in_flight": {
                "cta_mean": round(self.mean_in_flight(self.in_flight)),
                "sm_mean": round(self.mean_in_flight(self.sm_in_flight)),
                "sm_most": max((n for _, n in self.sm_in_flight), default=0),
            },
        }


def is_state(tensor: str) -> bool:
    """Whether a tensor holds states."""
    return "state" in tensor and not any(part in tensor for part in ("ind", "scale", "batch", "has_initial"))


def class_of(reason: str) -> str:
    """The class that a reason to wait is drawn as."""
    if reason.startswith(("load of ", "copy of ")) and any(map(is_state, reason.split(" of ")[1].split(", "))):
        return "state"
    for name, (_, _, beginnings) in CLASSES.items():
        if reason.startswith(beginnings):
            return name
    return "issuing" if reason == "issuing" else "arithmetic"


def steps_of(flights: list[tuple[float, float, int]]) -> list[tuple[float, int]]:
    """(clock, bytes from then on) of (asked, arrived, bytes)."""
    changes = sorted([(a, n) for a, _, n in flights] + [(b, -n) for _, b, n in flights])
    out, now = [], 0
    for clock, change in changes:
        now += change
        out.append((clock, now))
    return out


def spread(start: float, end: float, life: tuple[float, float], count: int) -> Iterator[tuple[int, float]]:
    """Yield (part, clocks in it) of an interval, where ``life`` is cut into ``count`` equal parts."""
    first, last = life
    step = (last - first) / count or 1.0
    start, end = max(start, first), min(end, last)
    for part in range(max(0, int((start - first) / step)), min(count, int((end - first) / step) + 1)):
        clocks = min(end, first + (part + 1) * step) - max(start, first + part * step)
        if clocks > 0:
            yield part, clocks


def level(steps: list[tuple[float, int]], start: float, end: float, count: int) -> list[float]:
    """Mean bytes in flight in ``count`` equal parts of an interval."""
    out = [0.0] * count
    for (clock, n), (until, _) in zip(steps, [*steps[1:], (end, 0)]):
        for part, clocks in spread(clock, until, (start, end), count):
            out[part] += n * clocks * count / (end - start)
    return out


def lives(op: str, keys: dict[str, str], gpu: str = "H200", cta: int | None = None) -> list[Life]:
    """The life of one CTA of every launch of a call.

    Parameters
    ----------
    op, keys
        As for tools/count.py, with ``config.FIELD``.
    gpu : str
        ``"H200"`` or ``"B200"``.
    cta : int, optional
        Number of the CTA among those of the SM; default: one that starts when the SM is full, if there is one.
    """
    gpu = machine.machine_of(gpu)
    config = {k.removeprefix("config."): int(v) for k, v in keys.items() if k.startswith("config.")}
    shapes = {k: v for k, v in keys.items() if not k.startswith("config.")}
    call, fields = model.replayed(op, shapes, gpu, config)
    modelled = machine.time_call(call.run, gpu, call.floor_bytes, timeline=True, **fields)
    roles = roles_of(call, gpu, fields)
    found = []
    for i, kernel in enumerate(modelled.kernels):
        found.append(life_of(kernel, cta, roles[min(i, len(roles) - 1)] if roles else None))
    return found


def roles_of(call: workloads.Call, gpu: machine.Machine, fields: dict[str, int]) -> list[tuple[str, ...] | None]:
    """Names of the warps of each kernel of a call, None where its class gives none."""
    from cute_ssm import arch, tuning

    with runtime.planned(arch.by_name(gpu.arch), gpu.sms) as plan, tuning.override(**fields):
        call.run()
    named = []
    for spec, config, _ in plan.kernels:
        kernel = registry.kernel_class(spec)
        named.append(kernel.roles(spec, config) if hasattr(kernel, "roles") else getattr(kernel, "ROLES", None))
    return named


def life_of(kernel: machine.KernelTime, cta: int | None, roles: tuple[str, ...] | None) -> Life:
    """The life of one of the CTAs that the model replayed."""
    timing, per_cta = kernel.timing, kernel.trace.warps_per_cta
    spans = {}
    for warp, (first, last) in timing.lives.items():
        a, b = spans.get(warp // per_cta, (first, last))
        spans[warp // per_cta] = (min(a, first), max(b, last))
    order = sorted(spans, key=lambda c: spans[c])
    if cta is None:
        cta = order[min(len(order) // 2, 2 * kernel.places)] if len(order) > kernel.places else order[len(order) // 2]
    if cta not in spans:
        raise ValueError(f"cta: expected 0 to {len(spans) - 1}, got {cta}")
    start, end = spans[cta]
    life = Life(kernel.name, cta, len(spans), kernel.places, start, end)
    for i in range(per_cta):
        warp = cta * per_cta + i
        if warp in timing.lives:
            name = roles[min(i, len(roles) - 1)] if roles else f"warp {i}"
            segments = [(a, b, why) for w, a, b, why in timing.segments if w == warp]
            life.warps.append((name, segments, *timing.lives[warp]))
    states = [(a, b, n, c) for a, b, n, tensor, c in timing.flights if is_state(tensor)]
    life.in_flight = steps_of([(a, b, n) for a, b, n, c in states if c == cta])
    life.sm_in_flight = steps_of([(a, b, n) for a, b, n, _ in states])
    return life


def text(life: Life, width: int = 100) -> str:
    """The life as text: a row of letters per warp, bytes in flight, and each role's waits."""
    where = f"CTA {life.cta} of {life.ctas} on this SM, {life.places} resident at a time"
    lines = [f"kernel {life.kernel[:90]}", f"{where}; {life.end - life.start:,.0f} clocks", ""]
    for name, segments, first, last in life.warps:
        lines.append(f"{name[:14]:14} |{''.join(letters(life, segments, first, last, width))}|")
    for label, steps in (("state, CTA", life.in_flight), ("state, SM", life.sm_in_flight)):
        values = level(steps, life.start, life.end, width)
        top = max([*values, 1.0])
        bar = "".join(BLOCKS[round(v / top * (len(BLOCKS) - 1))] for v in values)
        lines.append(f"{label:14} |{bar}| mean {life.mean_in_flight(steps) / 1024:.1f} KiB, most {top / 1024:.1f} KiB")
    lines += ["", "  ".join(f"{letter} {name}" for name, (letter, _, _) in CLASSES.items()), ""]
    for role in dict.fromkeys(name for name, _, _, _ in life.warps):
        shares = [f"{share:.0%} {why}" for why, share in life.waits(role).items() if share >= 0.02]
        lines.append(f"{role[:14]:14} {', '.join(shares)}")
    return "\n".join(lines)


def letters(life: Life, segments: list, first: float, last: float, width: int) -> list[str]:
    """One letter per part of the CTA's life: what the warp did for most of it."""
    step = (life.end - life.start) / width or 1.0
    parts = [Counter() for _ in range(width)]
    for start, end, reason in segments:
        for at, clocks in spread(start, end, (life.start, life.end), width):
            parts[at][class_of(reason)] += clocks
    out = []
    for at, part in enumerate(parts):
        a, b = life.start + at * step, life.start + (at + 1) * step
        alive = max(0.0, min(b, last) - max(a, first))
        part["issuing"] = alive - sum(part.values())
        out.append(CLASSES[part.most_common(1)[0][0]][0] if alive > 0.5 * step else " ")
    return out


def picture(found: list[Life], path: str, title: str) -> None:
    """Write a PNG: a bar per warp, and the state's bytes in flight below, for each launch."""
    pyplot = plotting.pyplot("bench")
    from matplotlib.patches import Patch

    rows = [max(2.0, 0.28 * len(life.warps) + 0.6) for life in found]
    ratios = [height for row in rows for height in (row, 1.4)]
    figure, axes = pyplot.subplots(
        2 * len(found), 1, figsize=(13, sum(ratios) + 1.6), squeeze=False, gridspec_kw={"height_ratios": ratios}
    )
    for i, life in enumerate(found):
        bars, below = axes[2 * i][0], axes[2 * i + 1][0]
        for y, (_, segments, first, last) in enumerate(life.warps):
            bars.broken_barh([(first - life.start, last - first)], (y - 0.4, 0.8), color=CLASSES["issuing"][1])
            for name, (_, colour, _) in CLASSES.items():
                spans = [(a - life.start, b - a) for a, b, why in segments if class_of(why) == name]
                if spans and name != "issuing":
                    bars.broken_barh(spans, (y - 0.4, 0.8), color=colour, linewidth=0)
        bars.set_yticks(range(len(life.warps)), [warp[0] for warp in life.warps], fontsize=8)
        bars.invert_yaxis()
        bars.set_xlim(0, life.end - life.start)
        bars.set_title(f"CTA {life.cta} of {life.ctas} on one SM, {life.places} resident", fontsize=9, loc="left")
        for steps, label, colour in (
            (life.sm_in_flight, "to the SM", "#e8b4b0"),
            (life.in_flight, "to this CTA", "#b3261e"),
        ):
            clocks = [life.start, *(clock for clock, _ in steps), life.end]
            values = [0, *(n for _, n in steps), 0]
            x = [clock - life.start for clock in clocks]
            below.fill_between(x, [n / 1024 for n in values], step="post", color=colour, label=label, linewidth=0)
        below.set_xlim(0, life.end - life.start)
        below.set_ylabel("KiB of state\nin flight", fontsize=8)
        below.legend(fontsize=7, loc="upper right")
        below.set_xlabel("clocks (modelled)", fontsize=8)
    legend = [Patch(color=colour, label=name) for name, (_, colour, _) in CLASSES.items()]
    figure.legend(handles=legend, ncol=len(legend), loc="lower center", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.04, 1, 0.98))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, replay, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("op", choices=workloads.OPERATORS)
    parser.add_argument("keys", nargs="*", metavar="key=value")
    parser.add_argument("--machine", default="H200", choices=machine.MACHINES)
    parser.add_argument("--cta", type=int, help="number of the CTA among those of the SM")
    parser.add_argument("--png", metavar="FILE", help="write a picture (needs the extra 'bench')")
    parser.add_argument("--json", action="store_true", help="print one JSON object per launch instead of text")
    parser.add_argument("--width", type=int, default=100, help="columns of the text")
    options = parser.parse_args(argv)
    keys = dict(item.partition("=")[::2] for item in options.keys)
    try:
        found = lives(options.op, keys, options.machine, options.cta)
    except ValueError as error:
        parser.error(str(error))
    said = " ".join([options.op, *options.keys])
    title = f"{said} on {options.machine}: modelled, constants not fitted"
    if options.json:
        for life in found:
            print(json.dumps(life.as_dict()))
    else:
        print(title)
        for life in found:
            print("\n" + text(life, options.width))
    if options.png:
        picture(found, options.png, title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
