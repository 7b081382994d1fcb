"""No value of a later token reaches an earlier output or a state before it: `gated_delta_rule_mtp` and `_replay`.

Every request of a batch has one poison: a value in one or several tensors, at one token or from it on.  What lies
before must be the bits of the same batch without poison; and, if a single element of v is poisoned, all other rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
from typing import NamedTuple

import gdn_cases
import kernel_backends
import pytest
import replay_cases
import torch
from bits import equal
from memory import copy

import cute_ssm
from cute_ssm import tuning
from cute_ssm.ops.gated_delta_rule_mtp.reference import gated_delta_rule_products
from cute_ssm.serving import commit

NAN, INF = float("nan"), float("inf")
VALUES = (NAN, INF, -INF, 1e10, 1e20, -1e30, 3e38)  # squares, products or sums of the finite ones overflow
ROW = 13  # of v, that a single value lies in
GROUPS = (("q",), ("k",), ("v",), ("a",), ("b",), ("k", "v"), ("q", "k"), ("q", "k", "v", "a", "b"))


class Poison(NamedTuple):
    """`value` in all of `names`, at token `first`, and at later ones too if `rest`; `single`: of v, one row alone."""

    names: tuple[str, ...]
    value: float
    first: int
    rest: bool
    single: bool = False


def poisons(tokens: int, count: int | None, seed: int = 0) -> list[Poison]:
    """All of them, or `count`: every tensor and value, at random tokens."""
    pick = random.Random(seed)
    if count is None:
        every = [Poison(*x) for x in itertools.product(GROUPS, VALUES, range(1, tokens), (False, True))]
        return every + [Poison(("v",), value, t, False, True) for value in VALUES for t in range(tokens)]
    kinds = itertools.product(GROUPS, VALUES)
    pairs = [Poison(names, value, pick.randrange(1, tokens), pick.random() < 0.5) for names, value in kinds]
    singles = [Poison(("v",), value, pick.randrange(tokens), False, True) for value in VALUES]
    return pick.sample(pairs, count - 4) + pick.sample(singles, 4)


def poisoned(call: dict, found: list[Poison]) -> dict:
    """The call with poison i in request i; values beyond a type's range are infinite there."""
    twin = copy(call)
    for i, poison in enumerate(found):
        tokens = slice(poison.first, None if poison.rest else poison.first + 1)
        for name in poison.names:
            row = twin[name][i, tokens]
            (row[..., ROW] if poison.single else row).copy_(torch.tensor(poison.value))
    return twin


def check_rows(got: torch.Tensor, want: torch.Tensor, poison: Poison, what: str) -> None:
    """(tokens, value_heads, V, ...): all before the poison, and what a single element of v does not belong to."""
    parts = [(got[: poison.first], want[: poison.first])]
    if poison.single:
        kept = torch.arange(want.shape[2]) != ROW
        parts.append((got[:, :, kept], want[:, :, kept]))
    for one, other in parts:
        assert other.isfinite().all()
        equal(one, other, f"{poison}: {what} differs in {(one != other).sum()} of {other.numel()}")


def run(backend: str, operator, call: dict, **config) -> torch.Tensor:
    with contextlib.ExitStack() as stack:
        if backend != "reference":
            stack.enter_context(kernel_backends.kernel(backend, checks=False))
            stack.enter_context(tuning.override(**config))
        return operator(**call)[0]


class Form(NamedTuple):
    """A call of `gated_delta_rule_mtp`, and whether it passes one token after the other."""

    tokens: int
    mode: str = "accepted"
    sequential: int = 0
    out: str | None = None
    state: str = "f32"
    l2norm: bool = True
    io: str = "bf16"
    K: int = 64


FORMS = [
    Form(2, "buffer_update", sequential=1),
    Form(4),
    Form(4, "buffer_update", out="f32"),
    Form(8, "buffer_update", l2norm=False),
    Form(16, state="bf16"),
]
MORE_FORMS = [
    *[Form(t, m) for t in (2, 3, 4, 7, 8, 11, 16) for m in ("verify", "update", "scatter", "buffer_update")],
    *[Form(t, "accepted_split") for t in (3, 7, 16)],
    *[Form(t, l2norm=False, out="f32", K=128) for t in (2, 4, 8, 16)],
    *[Form(t, "buffer_update", io="f16", state="f16", K=256) for t in (4, 8, 16)],
    *[Form(2, m, sequential=1, state=s) for m in ("accepted", "scatter") for s in ("f32", "bf16")],
]  # fmt: skip


def check_mtp(form: Form, backend: str, count: int | None) -> None:
    found = poisons(form.tokens, count)
    fields = {name: value for name, value in form._asdict().items() if name != "sequential"}
    case = gdn_cases.Case(**fields, batch=len(found), ratio=1, pads=())
    clean = gdn_cases.arguments(case)
    clean["initial_state"].nan_to_num_(0.0)
    for name in ("ssm_state_indices", "output_state_indices"):
        if name in clean:
            clean[name].abs_()
            clean[name][0] = -1
    if "accepted_steps" in clean:  # nothing, all before the poison, or less
        steps = [(p.first, max(p.first - 1, 0), 0)[i % 3] for i, p in enumerate(found)]
        clean["accepted_steps"] = torch.tensor(steps)
    dirty = poisoned(clean, found)
    src = clean["initial_state_indices"].long()
    config = {"sequential": form.sequential}
    want = run(backend, cute_ssm.gated_delta_rule_mtp, clean, **config)
    got = run(backend, cute_ssm.gated_delta_rule_mtp, dirty, **config)
    for i, poison in enumerate(found):
        check_rows(got[i], want[i], poison, "out")
        if "intermediate_states_buffer" in clean:
            buffers = (x["intermediate_states_buffer"][i, : form.tokens] for x in (dirty, clean))
            check_rows(*buffers, poison, "buffer")
        if form.mode == "scatter" and i:
            slots = clean["ssm_state_indices"][i].long()
            check_rows(dirty["initial_state"][slots], clean["initial_state"][slots], poison, "scattered state")
        elif form.mode in ("accepted", "accepted_split"):
            slot = clean.get("output_state_indices", src)[i].long()
            if slot >= 0:
                equal(dirty["initial_state"][slot], clean["initial_state"][slot], f"{poison}: state")
        elif poison.single and form.mode in ("update", "buffer_update"):
            states = (x["initial_state"][src[i]][None] for x in (dirty, clean))
            check_rows(*states, poison._replace(first=0), "final state")


@pytest.mark.thin(3, "mode")
@pytest.mark.parametrize("form", FORMS + MORE_FORMS, ids=str)
def test_later_tokens_do_not_reach_the_reference(form):
    check_mtp(form, "reference", 40)


@pytest.mark.thin(3)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_later_tokens_do_not_reach_earlier_outputs_and_states(form):
    check_mtp(form, "sm_90a", 24)


def test_later_tokens_on_sm_100a():
    check_mtp(Form(4, "buffer_update"), "sm_100a", 12)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("form", FORMS + MORE_FORMS, ids=str)
def test_every_poison(form, arch):
    check_mtp(form, arch, None if form.tokens <= 4 else 150)


@pytest.mark.parametrize("l2norm", [True, False])
def test_overflow_that_comes_from_the_state(l2norm):
    """Later keys and values are those of any token: what overflows is their product with a state."""
    case = gdn_cases.Case(batch=2, tokens=8, ratio=1, K=64, pads=(), mode="accepted", l2norm=l2norm, out=None)
    clean = gdn_cases.arguments(case)
    src = clean["initial_state_indices"].long()
    clean["initial_state"][src] *= 1e36
    clean["k"][:, :5], clean["q"][:, :5] = 0, 0  # tokens before the one that meets the state
    clean["accepted_steps"] = torch.tensor([5, 3])
    dirty = copy(clean)
    dirty["k"][:, 5:] *= 1e4
    for backend in ("reference", "sm_90a"):
        calls = [copy(clean), copy(dirty)]
        outs = [run(backend, cute_ssm.gated_delta_rule_mtp, call) for call in calls]
        equal(outs[0][:, :5], outs[1][:, :5])
        states = [call["initial_state"][src] for call in calls]
        assert states[0].isfinite().all()
        assert torch.equal(*states)


def test_products_of_the_reference_are_isolated_too():
    found = poisons(5, None)
    clean = gdn_cases.arguments(gdn_cases.Case(batch=len(found), tokens=5, ratio=1, K=64, pads=()))
    dirty = poisoned(clean, found)
    first = clean["initial_state"][clean["initial_state_indices"].long()]
    names = ("q", "k", "v", "a", "b", "A_log", "dt_bias")
    want, got = (gated_delta_rule_products(first, *(x[n] for n in names), 1.0, True) for x in (clean, dirty))
    for i, poison in enumerate(found):
        for one, other, what in zip(got, want, ("out", "states")):
            check_rows(one[i], other[i], poison, what)


# ------------------------------------------------------------------------------------------------------------- replay
REPLAYS = [
    replay_cases.Case(tokens=4, window=8),
    replay_cases.Case(tokens=8, window=8, state="bf16", l2norm=False),
    replay_cases.Case(tokens=16, window=16, out=None),
]
MORE_REPLAYS = [
    replay_cases.Case(tokens=t, window=w, state=s, out=o)
    for t, w, s, o in [(2, 4, "f16", "f32"), (3, 16, "f32", None), (7, 8, "bf16", "f32"), (11, 32, "f32", None)]
]


def check_replay(case: replay_cases.Case, backend: str, count: int) -> None:
    """A step whose later tokens are poisoned, of which those before are accepted, and the step behind it."""
    found = [p for p in poisons(case.tokens, count, seed=1) if not p.single]
    pending = tuple(i % (case.window + 1) for i in range(len(found)))
    case = dataclasses.replace(case, batch=len(found), ratio=1, K=64, pads=(), pending=pending, spare=2)
    clean = replay_cases.arguments(case)
    src = clean["initial_state_indices"].long()
    dirty = poisoned(clean, found)
    for name in replay_cases.RINGS:  # rows that are not pending hold NaN in one, and anything in the other
        stale = dirty[name].isnan()
        noise = torch.tensor(VALUES)[torch.randint(len(VALUES), stale.shape)]
        dirty[name][stale] = noise.to(dirty[name].dtype)[stale]
    accepted = torch.tensor([min(p.first, case.window) for p in found], dtype=torch.int32)
    fresh = {n: replay_cases.arguments(case, seed=7)[n] for n in ("q", "k", "v", "a", "b")}
    for step in range(2):
        want, got = (run(backend, cute_ssm.gated_delta_rule_replay, call) for call in (clean, dirty))
        for i, poison in enumerate(found):
            check_rows(got[i], want[i], poison if step == 0 else poison._replace(first=case.tokens), f"out {step}")
        equal(dirty["initial_state"][src], clean["initial_state"][src], f"state {step}")
        assert clean["initial_state"][src].isfinite().all()
        if step:
            break
        for call in (clean, dirty):
            commit(
                call["prev_num_accepted_tokens"], accepted, window=case.window, ring_start=call["ring_start"],
                ring_length=call["k_cache"].shape[2], tokens=case.tokens,
                state_batch_indices=call["initial_state_indices"],
            )  # fmt: skip
            call.update({name: value.clone() for name, value in fresh.items()})


@pytest.mark.parametrize("case", REPLAYS + MORE_REPLAYS, ids=str)
def test_later_and_rejected_tokens_do_not_reach_the_reference_of_replays(case):
    check_replay(case, "reference", 40)


@pytest.mark.thin(3)
@pytest.mark.parametrize("case", REPLAYS, ids=str)
def test_later_stale_and_rejected_tokens_do_not_reach_replays(case):
    check_replay(case, "sm_90a", 24)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("case", REPLAYS + MORE_REPLAYS, ids=str)
def test_every_replay(case, arch):
    check_replay(case, arch, 60)
