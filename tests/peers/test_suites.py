"""The test suites of FlashInfer, fla, mamba_ssm and others pass over `cute_ssm.compat`: see docs/peers.md."""

from __future__ import annotations

import pytest

run = pytest.importorskip("peer_suites.run", reason="tools/ is not on the path")
from peer_suites.suites import KERNEL, SUITES  # noqa: E402

pytestmark = [pytest.mark.peers, pytest.mark.slow]


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
    assert row["outcomes"]["passed"] > 0, row["outcomes"]
    if backend == KERNEL:
        assert row["launches"] >= row["outcomes"]["passed"]
