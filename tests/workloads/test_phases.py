"""cute_ssm.workloads.phases: the stationary mixture, against published figures and a simulation."""

from __future__ import annotations

import random

import pytest

from cute_ssm.workloads import phases

SIX = phases.accepted(6)


@pytest.mark.parametrize(
    ("window", "writes", "mean"),
    [(6, 1.0, 3.95), (8, 0.766, 4.29), (12, 0.427, 6.33), (16, 0.308, 8.04), (24, 0.189, 12.07), (32, 0.137, 16.04),
     (48, 0.088, 24.02)],
)  # fmt: skip
def test_counted_acceptance(window, writes, mean):
    assert phases.write_fraction(window, SIX) == pytest.approx(writes, abs=6e-4)
    assert sum(k * share for k, share in enumerate(phases.stationary(window, SIX))) == pytest.approx(mean, abs=6e-3)


@pytest.mark.parametrize(
    ("tokens", "chance", "window", "writes"),
    [(1, 0.5, 16, 0.063), (2, 0.7, 8, 0.228), (4, 0.8, 16, 0.207), (5, 0.9, 8, 0.769), (6, 0.8, 16, 0.288),
     (8, 0.7, 32, 0.117), (8, 0.9, 8, 1.0)],
)  # fmt: skip
def test_geometric_acceptance(tokens, chance, window, writes):
    accepts = phases.geometric(tokens, chance)
    assert sum(accepts) == pytest.approx(1)
    assert phases.write_fraction(window, accepts) == pytest.approx(writes, abs=6e-4)


@pytest.mark.parametrize(("tokens", "window"), [(6, 16), (1, 7), (3, 2), (8, 8)])
def test_simulation_agrees(tokens, window):
    accepts, source, k, counted = phases.accepted(tokens), random.Random(0), 0, {}
    for _ in range(60000):
        counted[k] = counted.get(k, 0) + 1
        n = source.choices(range(1, tokens + 1), accepts)[0]
        k = n if k + tokens > window else k + n
    for k, share in enumerate(phases.stationary(window, accepts)):
        assert counted.get(k, 0) / 60000 == pytest.approx(share, abs=0.01)


def test_a_batch_has_the_shares_of_the_distribution():
    drawn = phases.draw(1000, 16, SIX, seed=3)
    shares = phases.stationary(16, SIX)
    for k in range(17):
        assert (drawn == k).sum().item() == pytest.approx(1000 * shares[k], abs=1.01)
    assert ((drawn + 6 > 16).sum() / 1000).item() == pytest.approx(0.308, abs=2e-3)
    assert not drawn.equal(phases.draw(1000, 16, SIX, seed=4))
    assert drawn.sort().values.equal(phases.draw(1000, 16, SIX, seed=4).sort().values)
    assert phases.draw(1, 16, SIX).tolist() == [8]
