"""Every operator with declared calls can be tuned: what its tuning module provides is complete."""

from __future__ import annotations

import itertools
import json

import pytest

from cute_ssm import arch, workloads
from cute_ssm.tuner import problems
from cute_ssm.tuning import tables

each = pytest.mark.parametrize("op", workloads.OPERATORS)


def first(op, batch=16, target=arch.SM_90A):
    keys = workloads.of_operator(op, [batch])[0].calls()[0]
    return problems.problem(op, keys, target)


@each
@pytest.mark.parametrize("target", arch.ARCHS.values(), ids=str)
def test_the_space_is_of_free_fields_and_has_valid_neighbours(op, target):
    found = first(op, target=target)
    assert found.valid(found.rule())
    assert set(found.space) <= set(found.lookup.free)
    rule = found.rule()
    single = [{**rule, name: value} for name, values in found.space.items() for value in values if value != rule[name]]
    pairs = itertools.combinations(found.space, 2)
    assert single
    assert any(map(found.valid, single)) or any(
        found.valid({**rule, a: x, b: y}) for a, b in pairs for x in found.space[a] for y in found.space[b]
    )


@each
def test_a_call_asks_the_tables_every_time(op):
    """A memo around `tables.tuned` would hide the question from whoever watches."""
    assert first(op) == first(op)
    assert first(op).lookup.heads < first(op, batch=64).lookup.heads, "the amount of work grows with the requests"


@each
def test_overrides_reach_the_kernels(op):
    found = first(op)
    rule = found.rule()
    kernels = found.kernels({})
    changed = next(
        fields
        for name, values in found.space.items()
        for value in values
        if value != rule[name] and found.valid(fields := {**rule, name: value})
    )
    assert found.kernels(changed) != kernels


@each
def test_a_row_names_fields_of_the_spec_and_is_found_again(op, settings, tmp_path):
    found = first(op)
    settings()
    tables.forget()
    config = next(
        fields
        for name, values in found.space.items()
        for value in values
        if value != found.rule()[name] and found.valid(fields := {**found.rule(), name: value})
    )
    row = json.loads(json.dumps(found.row(config, {"how": "modelled"})))
    tables.merge(tmp_path / "table.json", [row])
    settings(TUNING_DIR=tmp_path)
    tables.forget()
    try:
        chosen = [kernel[1] for kernel in found.kernels({})]
    finally:
        settings()
        tables.forget()
    assert found.config(config) in chosen


def test_rows_of_the_bundled_table_say_how_they_were_found():
    rows = json.loads(tables.BUNDLED.read_text())
    for row in rows:
        evidence = row[tables.EVIDENCE]
        assert evidence["how"] in ("modelled", "measured")
        assert evidence["call"].startswith(row["op"])
        gained = evidence["us"] < evidence["rule_us"]
        assert bool(row["config"]) == gained
    assert len({tables._identity(row) for row in rows}) == len(rows)


def test_rows_of_the_bundled_table_can_run_where_they_apply():
    """Every row is what its own call gets."""
    for row in json.loads(tables.BUNDLED.read_text()):
        keys = dict(item.split("=") for item in row[tables.EVIDENCE]["call"].split()[1:])
        found = problems.problem(row["op"], keys, arch.by_name(row["arch"]))
        assert found.lookup.heads == row["heads"]
        assert all(getattr(found.lookup.spec, name) == value for name, value in row["spec"].items())
        assert found.config(row["config"]) in [kernel[1] for kernel in found.kernels({})]
