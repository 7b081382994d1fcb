"""Draw the modelled life of a CTA: what every warp waits for, and how many bytes are on their way.

`life_of` takes a `KernelTime` that was modelled with ``timeline=True``; `text` and `picture` draw the result.  The
model is validated for whole calls alone: a drawing shows the order of events and what overlaps, not times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .model import KernelTime
from .replay import Flight, Wait


class Watched(NamedTuple):
    """Tensors with a colour and a curve of their own: what to call them, and whether a tensor's name is one of them."""

    name: str
    holds: Callable[[str], bool]


ALL_DATA = Watched("data", lambda tensor: True)


class Style(NamedTuple):
    """How a class of waits is drawn, and what their reasons begin with."""

    letter: str
    colour: str
    beginnings: tuple[str, ...] = ()


CLASSES = {
    "issuing": Style("#", "#2b6a4d"),
    "watched": Style("S", "#b3261e"),
    "other data": Style("d", "#e08a1e", ("load of", "copy of", "cp.async")),
    "stores": Style("w", "#8e6bbf", ("bulk store",)),
    "another warp": Style("b", "#3b6fb6", ("barrier", "mbarrier", "warp barrier")),
    "shared memory": Style("s", "#6aa5d8", ("shared memory", "load/store unit", "lsu", "local memory")),
    "arithmetic": Style("a", "#c9c9c9"),
    "issue slots": Style("i", "#8fbf9f", ("issue",)),
    "code": Style("c", "#b8a13a", ("instruction cache",)),
    "the kernel before": Style("k", "#4a4a4a", ("kernel before",)),
}
BLOCKS = " ▁▂▃▄▅▆▇█"


class WarpLife(NamedTuple):
    """A warp from its first clock to its last, with its waits."""

    name: str
    waits: list[Wait]
    first: float
    last: float


class Step(NamedTuple):
    """From ``clock`` on, ``n_bytes`` are on their way."""

    clock: float
    n_bytes: int


@dataclass
class Life:
    """One CTA's life on the modelled SM.

    ``in_flight`` are the steps of the watched bytes on their way to this CTA, ``sm_in_flight`` of those to its SM.
    """

    kernel: str
    cta: int
    ctas: int
    resident_ctas: int
    start: float
    end: float
    watched: Watched = ALL_DATA
    warps: list[WarpLife] = field(default_factory=list)
    in_flight: list[Step] = field(default_factory=list)
    sm_in_flight: list[Step] = field(default_factory=list)

    def waits(self, role: str) -> dict[str, float]:
        """Return the share of each reason to wait, and of issuing, in the lives of a role's warps."""
        mine = [warp for warp in self.warps if warp.name == role]
        total = sum(warp.last - warp.first for warp in mine)
        reasons: Counter[str] = Counter()
        for warp in mine:
            for wait in warp.waits:
                reasons[wait.reason] += wait.end - wait.start
        shares = {reason: clocks / total for reason, clocks in reasons.most_common()}
        return {"issuing": 1 - sum(shares.values()), **shares}

    def mean_in_flight(self, steps: list[Step]) -> float:
        """Return the mean of ``in_flight`` or ``sm_in_flight`` over the CTA's life."""
        return sum(level(steps, self.start, self.end, 400)) / 400

    def as_dict(self) -> dict:
        """Return the content of the text as plain values."""
        roles = list(dict.fromkeys(warp.name for warp in self.warps))
        return {
            "kernel": self.kernel,
            "cta": self.cta,
            "ctas_of_sm": self.ctas,
            "resident_ctas": self.resident_ctas,
            "clocks": round(self.end - self.start),
            "roles": {role: {why: round(share, 4) for why, share in self.waits(role).items()} for role in roles},
            f"{self.watched.name}_bytes_in_flight": {
                "cta_mean": round(self.mean_in_flight(self.in_flight)),
                "sm_mean": round(self.mean_in_flight(self.sm_in_flight)),
                "sm_most": max((step.n_bytes for step in self.sm_in_flight), default=0),
            },
        }


def class_of(reason: str, watched: Watched = ALL_DATA) -> str:
    """Return the class that a reason to wait belongs to."""
    if reason.startswith(("load of ", "copy of ")) and any(map(watched.holds, reason.split(" of ")[1].split(", "))):
        return "watched"
    for name, style in CLASSES.items():
        if reason.startswith(style.beginnings):
            return name
    return "issuing" if reason == "issuing" else "arithmetic"


def legend(watched: Watched) -> dict[str, str]:
    """Return the name of each class in a drawing."""
    return {name: watched.name if name == "watched" else name for name in CLASSES}


def steps_of(flights: Sequence[Flight]) -> list[Step]:
    """Return the bytes on their way, summed over flights, as steps."""
    changes = sorted([(f.start, f.n_bytes) for f in flights] + [(f.end, -f.n_bytes) for f in flights])
    steps, now = [], 0
    for clock, change in changes:
        now += change
        steps.append(Step(clock, now))
    return steps


def spread(start: float, end: float, life: tuple[float, float], count: int) -> Iterator[tuple[int, float]]:
    """Cut ``life`` into ``count`` equal parts, and yield (part, clocks) for each part that the interval overlaps."""
    first, last = life
    step = (last - first) / count or 1.0
    start, end = max(start, first), min(end, last)
    for part in range(max(0, int((start - first) / step)), min(count, int((end - first) / step) + 1)):
        clocks = min(end, first + (part + 1) * step) - max(start, first + part * step)
        if clocks > 0:
            yield part, clocks


def level(steps: Sequence[tuple[float, int]], start: float, end: float, count: int) -> list[float]:
    """Return the mean bytes in flight in each of ``count`` equal parts of an interval."""
    out = [0.0] * count
    for (clock, n), (until, _) in zip(steps, [*steps[1:], (end, 0)]):
        for part, clocks in spread(clock, until, (start, end), count):
            out[part] += n * clocks * count / (end - start)
    return out


def life_of(
    kernel: KernelTime, cta: int | None = None, roles: Sequence[str] | None = None, watched: Watched = ALL_DATA
) -> Life:
    """Return the life of one of the CTAs that the model replayed.

    Parameters
    ----------
    kernel : KernelTime
        Of a call that was modelled with ``timeline=True``.
    cta : int, optional
        Index of the CTA among those of the SM.  Default: one that starts when the SM is full, if there is one.
    roles : sequence of str, optional
        Names of the CTA's warps.  The last name is used for all further warps.
    watched : Watched
        Tensors with a colour and a curve of their own.  Default: all.

    Raises
    ------
    ValueError
        If there is no such CTA, or the waits of the warps were not kept.
    """
    if kernel.timing.waits is None:
        raise ValueError("kernel: expected one modelled with timeline=True, got one whose waits were not kept")
    timing, per_cta = kernel.timing, kernel.trace.warps_per_cta
    spans = {}
    for warp, (first, last) in timing.lives.items():
        a, b = spans.get(warp // per_cta, (first, last))
        spans[warp // per_cta] = (min(a, first), max(b, last))
    order = sorted(spans, key=lambda c: spans[c])
    if cta is None:
        full = len(order) > kernel.resident_ctas
        cta = order[min(len(order) // 2, 2 * kernel.resident_ctas) if full else len(order) // 2]
    if cta not in spans:
        raise ValueError(f"cta: expected 0 to {len(spans) - 1}, got {cta}")
    start, end = spans[cta]
    life = Life(kernel.name, cta, len(spans), kernel.resident_ctas, start, end, watched)
    for i in range(per_cta):
        warp = cta * per_cta + i
        if warp in timing.lives:
            name = roles[min(i, len(roles) - 1)] if roles else f"warp {i}"
            life.warps.append(WarpLife(name, [wait for wait in timing.waits if wait.warp == warp], *timing.lives[warp]))
    flights = [flight for flight in timing.flights if watched.holds(flight.tensor)]
    life.in_flight = steps_of([flight for flight in flights if flight.cta == cta])
    life.sm_in_flight = steps_of(flights)
    return life


def text(life: Life, width: int = 100) -> str:
    """Return the life as text: a row of letters per warp, bytes in flight, and the waits of each role."""
    said = life.watched.name
    where = f"CTA {life.cta} of {life.ctas} on this SM, {life.resident_ctas} resident at a time"
    lines = [f"kernel {life.kernel[:90]}", f"{where}; {life.end - life.start:,.0f} clocks", ""]
    for warp in life.warps:
        lines.append(f"{warp.name[:14]:14} |{''.join(letters(life, warp, width))}|")
    for label, steps in ((f"{said}, CTA", life.in_flight), (f"{said}, SM", life.sm_in_flight)):
        values = level(steps, life.start, life.end, width)
        top = max([*values, 1.0])
        bar = "".join(BLOCKS[round(v / top * (len(BLOCKS) - 1))] for v in values)
        lines.append(f"{label:14} |{bar}| mean {life.mean_in_flight(steps) / 1024:.1f} KiB, most {top / 1024:.1f} KiB")
    lines += ["", "  ".join(f"{CLASSES[name].letter} {called}" for name, called in legend(life.watched).items()), ""]
    for role in dict.fromkeys(warp.name for warp in life.warps):
        shares = [f"{share:.0%} {why}" for why, share in life.waits(role).items() if share >= 0.02]
        lines.append(f"{role[:14]:14} {', '.join(shares)}")
    return "\n".join(lines)


def letters(life: Life, warp: WarpLife, width: int) -> list[str]:
    """Return a letter for each part of the CTA's life: what the warp did most of the time."""
    step = (life.end - life.start) / width or 1.0
    parts = [Counter() for _ in range(width)]
    for wait in warp.waits:
        for at, clocks in spread(wait.start, wait.end, (life.start, life.end), width):
            parts[at][class_of(wait.reason, life.watched)] += clocks
    out = []
    for at, part in enumerate(parts):
        a, b = life.start + at * step, life.start + (at + 1) * step
        alive = max(0.0, min(b, warp.last) - max(a, warp.first))
        part["issuing"] = alive - sum(part.values())
        ((most, _),) = part.most_common(1)
        out.append(CLASSES[most].letter if alive > 0.5 * step else " ")
    return out


def picture(found: list[Life], path: str, title: str) -> None:
    """Write a PNG: a bar per warp, and the watched bytes in flight below, for each launch.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    pyplot = _pyplot()
    from matplotlib.patches import Patch

    rows = [max(2.0, 0.28 * len(life.warps) + 0.6) for life in found]
    ratios = [height for row in rows for height in (row, 1.4)]
    figure, axes = pyplot.subplots(
        2 * len(found), 1, figsize=(13, sum(ratios) + 1.6), squeeze=False, gridspec_kw={"height_ratios": ratios}
    )
    for i, life in enumerate(found):
        bars, below = axes[2 * i][0], axes[2 * i + 1][0]
        for y, warp in enumerate(life.warps):
            whole = [(warp.first - life.start, warp.last - warp.first)]
            bars.broken_barh(whole, (y - 0.4, 0.8), color=CLASSES["issuing"].colour)
            for name, style in CLASSES.items():
                waits = [wait for wait in warp.waits if class_of(wait.reason, life.watched) == name]
                if waits and name != "issuing":
                    spans = [(wait.start - life.start, wait.end - wait.start) for wait in waits]
                    bars.broken_barh(spans, (y - 0.4, 0.8), color=style.colour, linewidth=0)
        bars.set_yticks(range(len(life.warps)), [warp.name for warp in life.warps], fontsize=8)
        bars.invert_yaxis()
        bars.set_xlim(0, life.end - life.start)
        bars.set_title(
            f"CTA {life.cta} of {life.ctas} on one SM, {life.resident_ctas} resident", fontsize=9, loc="left"
        )
        for steps, label, colour in (
            (life.sm_in_flight, "to the SM", "#e8b4b0"),
            (life.in_flight, "to this CTA", "#b3261e"),
        ):
            clocks = [life.start, *(step.clock for step in steps), life.end]
            kib = [0.0, *(step.n_bytes / 1024 for step in steps), 0.0]
            x = [clock - life.start for clock in clocks]
            below.fill_between(x, kib, step="post", color=colour, label=label, linewidth=0)
        below.set_xlim(0, life.end - life.start)
        below.set_ylabel(f"KiB of {life.watched.name}\nin flight", fontsize=8)
        below.legend(fontsize=7, loc="upper right")
        below.set_xlabel("clocks (modelled)", fontsize=8)
    handles = [Patch(color=CLASSES[name].colour, label=called) for name, called in legend(found[0].watched).items()]
    figure.legend(handles=handles, ncol=len(handles), loc="lower center", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.04, 1, 0.98))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _pyplot() -> Any:
    """Return matplotlib's pyplot, drawing to files only."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("picture: pictures are drawn by matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
