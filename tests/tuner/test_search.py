"""The search itself, on costs that are known; and the journal."""

from __future__ import annotations

import itertools
import time

import pytest

from cute_ssm.tuner import search
from cute_ssm.tuner.journal import Journal, Measurement

SPACE = {"rows": (8, 16, 32, 64), "warps": (1, 2, 4, 8), "stages": (1, 3), "ctas": (1, 2, 4)}
START = {"rows": 8, "warps": 1, "stages": 1, "ctas": 1}


def cost(fields):
    """Rows and warps must change together, the others one by one."""
    product = abs(fields["rows"] * fields["warps"] - 256)
    balance = abs(fields["rows"] - 16 * fields["warps"])
    return 10 + product + balance + (3 - fields["stages"]) + abs(fields["ctas"] - 2)


def measure(configs):
    return [cost(fields) for fields in configs]


def always(_):
    return True


def best():
    combinations = (dict(zip(SPACE, values)) for values in itertools.product(*SPACE.values()))
    return min(map(cost, combinations))


def test_it_finds_what_needs_two_fields_at_once():
    found = search.descend(START, SPACE, always, measure)
    assert found.complete
    assert found.cost == best()
    assert found.cost == cost(found.best)
    assert found.start_cost == cost(START)
    assert found.tried < 0.6 * len(list(itertools.product(*SPACE.values())))
    assert found.tried == len(found.costs), "nothing is measured twice"


def test_a_gain_of_the_last_pair_is_followed_by_all_pairs_again():
    """What the first pair gains needs what the last one found."""

    def stairs(fields):
        lifted = fields["stages"] == 3 and fields["rows"] == 16
        return 10 - lifted - 4 * (lifted and fields["warps"] == 2)

    space = {"rows": (8, 16), "warps": (1, 2), "stages": (1, 3)}
    start = {"rows": 8, "warps": 1, "stages": 1}
    found = search.descend(start, space, always, lambda configs: [stairs(fields) for fields in configs])
    assert found.best == {"rows": 16, "warps": 2, "stages": 3}
    assert (found.cost, found.complete) == (5, True)


def test_what_is_not_valid_is_not_measured():
    def valid(fields):
        return fields["rows"] < 64

    def checked(configs):
        assert all(map(valid, configs))
        return measure(configs)

    assert search.descend(START, SPACE, valid, checked).best["rows"] < 64


def test_failures_are_passed_over():
    found = search.descend(START, SPACE, always, lambda c: [None if f["stages"] == 3 else cost(f) for f in c])
    assert found.best["stages"] == 1
    assert None in found.costs.values()
    with pytest.raises(ValueError, match="the config to start from fails"):
        search.descend(START, SPACE, always, lambda configs: [None for _ in configs])


def test_a_deadline_ends_it_with_the_best_so_far():
    found = search.descend(START, SPACE, always, measure, deadline=time.monotonic())
    assert not found.complete
    assert found.cost <= found.start_cost
    assert found.tried <= 1 + 8


def test_noise_is_no_gain_and_a_challenger_is_confirmed():
    found = search.descend(START, SPACE, always, measure, noise=0.99)
    assert found.best == START
    doubted = []

    def confirm(configs):
        doubted.append(configs)
        return [1.0, 1.0]  # none is better than the other when measured again

    assert search.descend(START, SPACE, always, measure, confirm).best == START
    assert doubted
    found = search.descend(START, SPACE, always, measure, measure)
    assert found.cost == best()


@pytest.mark.parametrize(("gain", "taken"), [(0.04, False), (0.06, True)])
def test_a_gain_that_is_confirmed_must_exceed_the_noise_too(gain, taken):
    """Measured once, half the time; measured with care, a little less or more than the noise."""
    space = {"rows": (8, 16)}

    def confirm(configs):
        return [1.0 if fields["rows"] == 8 else 1.0 - gain for fields in configs]

    found = search.descend(
        {"rows": 8}, space, always, lambda c: [1.0 if f["rows"] == 8 else 0.5 for f in c], confirm, 0.05
    )
    assert found.best == {"rows": 16 if taken else 8}
    assert found.cost == (1.0 - gain if taken else 1.0)


def test_batches_are_bounded():
    sizes = []

    def counted(configs):
        sizes.append(len(configs))
        return measure(configs)

    search.descend(START, SPACE, always, counted, batch=3)
    assert max(sizes) <= 3


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ({"a": (1,)}, []),
        ({"a": (1, 2), "b": (1,)}, [("a",)]),
        ({"a": (1, 2), "b": (1, 2)}, [("a", "b")]),
        ({"a": (1, 2), "b": (1, 2), "c": (1, 2)}, [("a", "b"), ("b", "c"), ("c", "a")]),
    ],
)
def test_blocks(space, expected):
    assert search.blocks(space) == expected


def test_a_journal_is_read_again_and_keeps_objectives_apart(tmp_path):
    path = tmp_path / "deep" / "journal.jsonl"
    journal = Journal(path, "one")
    journal.put("case", {"a": 1, "b": 2}, Measurement(3.5, 4.0))
    journal.put("case", {"a": 2, "b": 2}, Measurement(None, error="no"))
    journal.close()
    with open(path, "a") as file:
        file.write('{"case": "case", "fie')  # killed while it wrote
    again = Journal(path, "one")
    assert again.get("case", {"b": 2, "a": 1}) == Measurement(3.5, 4.0)
    assert again.get("case", {"a": 2, "b": 2}) == Measurement(None, error="no")
    assert again.get("other", {"a": 2, "b": 2}) is None
    assert Journal(path, "two").known == {}
    assert Journal(None, "one").known == {}
