"""The test suites of FlashInfer, fla, mamba_ssm and others pass over `cute_ssm.compat`: see docs/peers.md."""

from __future__ import annotations

import json

import pytest

run = pytest.importorskip("peer_suites.run", reason="tools/ is not on the path")
from peer_suites.suites import KERNEL, SUITES  # noqa: E402


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"), [(name, backend) for name, suite in SUITES.items() for backend in suite.backends]
)
def test_a_suite_passes_but_for_what_is_said_not_to_apply(name, backend):
    suite = SUITES[name]
    why = run.missing(suite)
    if why:
        pytest.skip(why)
    row = run.run(suite, backend)
    assert not row["failures"], f"{row['failures']}\n{row['output'][-4000:]}"
    assert run.not_shown(row, json.loads(run.RESULTS.read_text())) is None
    if backend == KERNEL:
        assert row["launches"] >= row["outcomes"]["passed"] > 0


@pytest.mark.parametrize(
    ("outcomes", "recorded", "is_right"),
    [
        ({"passed": 20, "over the time": 2}, {"passed": 22}, True),
        ({"passed": 20, "over the time": 3}, {"passed": 22}, False),
        ({"passed": 4, "over the memory": 3}, {"passed": 4, "over the memory": 3}, True),
        ({"passed": 3, "over the memory": 4}, {"passed": 4, "over the memory": 3}, False),
        ({"passed": 4, "skipped by the suite": 9}, {"passed": 4, "skipped by the suite": 9, "left out": 7}, True),
        ({"passed": 1, "over the time": 9, "left out": 7}, None, False),
        ({"skipped by the suite": 9}, {"skipped by the suite": 9}, False),
    ],
)
def test_a_run_where_most_cases_go_over_the_bounds_is_no_pass(outcomes, recorded, is_right):
    row = {"suite": "a", "backend": KERNEL, "outcomes": outcomes}
    other = row | {"backend": "reference", "outcomes": {"passed": 1, "over the time": 100}}
    rows = [other, *([row | {"outcomes": recorded}] if recorded else [])]
    assert (run.not_shown(row, {"rows": rows}) is None) == is_right
