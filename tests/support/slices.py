"""Which cases of a test a plain ``pytest`` runs: a slice, chosen by rule, of tests whose cases are many and alike.

``@pytest.mark.thin(8, "state", "mode")`` keeps every eighth case of a test, and of the fields named also the first case
of every value; all others become `wide`, which ``pytest`` leaves out and CI runs.  A field is a parameter of the test,
or a field of a dataclass that is one.  Cases marked `slow` stay `slow`.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator

import pytest


def mark(items: Iterable[pytest.Item]) -> None:
    """Mark as `wide` what the tests marked `thin` do not keep."""
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("thin") and not item.get_closest_marker("slow"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        every, *names = cases[0].get_closest_marker("thin").args
        seen: set[tuple[str, str]] = set()
        for i, item in enumerate(cases):
            values = set(_values(item, names))
            if i % every and values <= seen:
                item.add_marker("wide")
            else:
                seen |= values


def _values(item: pytest.Item, names: list[str]) -> Iterator[tuple[str, str]]:
    """(field, value) of a case, of the fields named."""
    for parameter, value in item.callspec.params.items():
        if parameter in names:
            yield parameter, str(value)
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                if field.name in names:
                    yield field.name, str(getattr(value, field.name))
