"""Block coordinate descent: fields are improved two at a time, jointly, until no pair improves the config any more."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Fields = dict[str, "int | str"]
Measure = Callable[[Sequence[Fields]], "list[float | None]"]


@dataclass
class Outcome:
    """The best fields found, their cost and that of the start, and what was tried.

    Attributes
    ----------
    best : dict
    cost, start_cost : float
    tried : int
        Configs that were measured.
    complete : bool
        False: time ran out before a whole cycle without improvement.
    costs : dict
        Cost of every config tried, by its items; None: it cannot run, or gives wrong results.
    """

    best: Fields
    cost: float
    start_cost: float
    tried: int = 0
    complete: bool = False
    costs: dict[tuple[tuple[str, int | str], ...], float | None] = field(default_factory=dict)


def blocks(space: Mapping[str, Sequence[int | str]]) -> list[tuple[str, ...]]:
    """Return pairs of neighbouring fields, each field in two of them, with a choice at all in each."""
    names = [name for name, values in space.items() if len(values) > 1]
    if len(names) < 3:
        return [tuple(names)] if names else []
    return [(names[i], names[(i + 1) % len(names)]) for i in range(len(names))]


def descend(
    start: Fields,
    space: Mapping[str, Sequence[int | str]],
    valid: Callable[[Fields], bool],
    measure: Measure,
    confirm: Measure | None = None,
    noise: float = 0.0,
    deadline: float | None = None,
    batch: int = 8,
) -> Outcome:
    """Search from a start.

    Parameters
    ----------
    start : dict
        A valid config's fields.
    space : mapping
        Values of each field.
    valid : callable
        Whether a config can run.
    measure : callable
        Costs of configs, None for those that fail; called with at most `batch` at once.
    confirm : callable, optional
        Costs anew and with more care, of the best so far and a challenger; without it, `measure` is believed.
    noise : float
        Part of the cost by which a challenger must be better.
    deadline : float, optional
        Value of ``time.monotonic()`` after which nothing new is measured.
    batch : int
        Configs that are measured together, so that a deadline is kept.

    Raises
    ------
    ValueError
        If the start itself fails.
    """
    (cost,) = measure([start])
    if cost is None:
        raise ValueError(f"the config to start from fails: {start}")
    found = Outcome(dict(start), cost, cost, 1, False, {_items(start): cost})
    cycle = blocks(space)
    unchanged = 0
    for names in itertools.cycle(cycle):
        if unchanged >= len(cycle):
            break
        if not _improve(found, names, space, valid, measure, confirm, noise, deadline, batch):
            unchanged += 1
        else:
            unchanged = 1  # the pair itself has been searched
        if deadline is not None and time.monotonic() >= deadline:
            return found
    found.complete = True
    return found


def _improve(
    found: Outcome,
    names: Sequence[str],
    space: Mapping[str, Sequence[int | str]],
    valid: Callable[[Fields], bool],
    measure: Measure,
    confirm: Measure | None,
    noise: float,
    deadline: float | None,
    batch: int,
) -> bool:
    """Try all values of some fields together; say whether the best changed."""
    candidates = []
    for values in itertools.product(*(space[name] for name in names)):
        fields = {**found.best, **dict(zip(names, values))}
        if _items(fields) not in found.costs and valid(fields):
            candidates.append(fields)
    for i in range(0, len(candidates), batch):
        if deadline is not None and time.monotonic() >= deadline:
            break
        part = candidates[i : i + batch]
        for fields, cost in zip(part, measure(part)):
            found.costs[_items(fields)] = cost
            found.tried += 1
    ranked = [
        (cost, fields)
        for fields in candidates
        if (cost := found.costs.get(_items(fields))) is not None and cost < found.cost * (1 - noise)
    ]
    for cost, fields in sorted(ranked, key=lambda entry: entry[0]):
        if confirm is not None:
            own, challenger = confirm([found.best, fields])
            if own is None or challenger is None or challenger >= own * (1 - noise):
                continue
            found.start_cost *= own / found.cost  # what the same config costs today
            cost = challenger
        found.best, found.cost = fields, cost
        return True
    return False


def _items(fields: Mapping[str, int | str]) -> tuple[tuple[str, int | str], ...]:
    return tuple(sorted(fields.items()))
