"""How exact written states are: their errors in root mean square, as multiples of those of one rounding.

The truth is the recurrence token by token in float64.  A new state of every narrow type errs at most 1.1 times as much
as the truth rounded once does.  A float32 state cannot: what sums of float32 round is as much as its last rounding.  It
errs at most 1.1 times as much as the reference, which computes in float32, and by what approximate functions add: the
kernel takes one power of two for the stored state, and one for each pending token.
"""

from __future__ import annotations

import contextlib

import approximations
import kernel_backends
import numpy as np
import pytest
import torch
from checkpointing_cases import LARGEST, STATES, Case, Sequence, arguments, numpy, place, run, slots_of, stored_state
from memory import copy

from cute_ssm.reference import rounding

MOST = 1.1
NARROW = ("bf16", "f16", "i16", "i8", "f8")
COUNTS = {1: (1,), 8: (1, 3, 8), 16: (1, 2, 5, 16), 33: (17, 33), 64: (48, 64)}  # window: pending tokens
DECAYS = ("slow", "typical", "fast", "burst")  # of a burst, all tokens but the last three decay by far more


def one(state, window=16, decay="fast", history="double", **changes):
    """A step that writes the states of sequences with few to as many pending tokens as a window holds."""
    counts = COUNTS[window]
    lengths = tuple(window + 1 - count for count in counts)
    few = {"pads": (), "nheads": 8, "dim": 16, "has_z": False}
    return Case(
        batch=len(counts), tokens=max(lengths), lengths=lengths, window=window, accepted=counts, state=state,
        decay="typical" if decay == "burst" else decay, history=history, **{**few, **changes},
    )  # fmt: skip


def burst(case, call):
    """Lengthen the steps of all pending tokens but the last three of each sequence."""
    for slot, count, cursor in slots_of(case, call):
        for j in range(count - 3):
            call[case.names[2]][place(case, slot, cursor, j)[2]] *= 300.0


def rounded(case, value, seed):
    """The truth, (nheads, dim, dstate), as the state's type holds it."""
    wide = torch.from_numpy(value)
    dtype = STATES[case.state]
    if case.rounds:
        bits = torch.randint(65536, wide.shape, generator=torch.Generator().manual_seed(seed))
        return numpy(rounding.load(*rounding.store(wide.float(), dtype, bits=bits)))
    if case.state not in LARGEST:
        return numpy(wide.to(dtype))
    scale = wide.abs().amax(-1, keepdim=True) / LARGEST[case.state]
    return numpy(((wide / scale).round() if case.state != "f8" else (wide / scale).to(dtype).double()) * scale)


def squares(error):
    """Mean squares of each head."""
    return np.mean(np.square(error), (1, 2))


def measured(case, seed, of_burst, emulated, arch="sm_90a"):
    """By number of pending tokens: mean squares of errors of each head, of a rounding, and of approximate functions."""
    call = arguments(case, seed)
    if of_burst:
        burst(case, call)
    before = copy(call)
    with kernel_backends.kernel(arch, checks=False) if emulated else contextlib.nullcontext():
        run(case, call)
        ex2 = approximations.in_use().ex2
    A, errors = numpy(before["A"])[:, 0, 0], {}
    for slot, count, cursor in slots_of(case, before):
        state = Sequence.of(case, before, slot, count, cursor).state(A)
        want, got = state.value, stored_state(case, call, slot)
        added = ex2 * (state.of_state + state.of_tokens)
        errors[count] = squares(got - want), squares(rounded(case, want, seed) - want), squares(added)
    return errors


def ratio(errors, least):
    return float(np.sqrt(np.mean(errors / least)))


CASES = [
    (one("bf16"), "fast"),
    (one("bf16", 64, "typical", "ring"), "typical"),
    (one("i8"), "fast"),
    (one("i16"), "burst"),
    (one("f16", history="ring", rounds=10), "burst"),
]
MORE = [
    *((one(state, window, decay, history), decay) for state in NARROW for window in COUNTS for decay in DECAYS
      for history in ("double", "ring")),
    *((one(state, 16, decay, io="f16"), decay) for state in NARROW for decay in DECAYS),
    *((one(state, 16, decay, rounds=10), decay) for state in NARROW for decay in DECAYS),
    *((one(state, 64, decay, dim=64, dstate=128), decay) for state in NARROW for decay in DECAYS),
]  # fmt: skip


@pytest.mark.thin(5)
@pytest.mark.parametrize(
    "emulated", [False, pytest.param(True, marks=pytest.mark.accuracy)], ids=["reference", "emulated"]
)
@pytest.mark.parametrize(
    ("case", "decay"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE if case not in CASES)],
    ids=str,
)
def test_a_narrow_state_errs_like_one_rounding(case, decay, emulated):
    for count, (errors, least, _) in measured(case, 0, decay == "burst", emulated).items():
        got = ratio(errors, least)
        assert got <= MOST, f"{count} pending tokens: {got:.3f} times the error of one rounding"


WIDE = [
    (one("f32", history="ring"), "burst"),
    *((one("f32", window, decay, history, io=io), decay) for window in COUNTS for decay in DECAYS
      for history in ("double", "ring") for io in ("bf16", "f16")),
]  # fmt: skip


@pytest.mark.accuracy
@pytest.mark.parametrize(
    ("case", "decay"), [WIDE[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in WIDE[1:])], ids=str
)
def test_a_float32_state_errs_like_the_reference(case, decay):
    theirs = measured(case, 0, decay == "burst", False)
    for count, (errors, least, added) in measured(case, 0, decay == "burst", True).items():
        got, reference = ratio(errors, least), ratio(*theirs[count][:2])
        limit = MOST * reference + ratio(added, least)
        assert got <= limit, f"{count} pending tokens: {got:.3f} times a rounding, reference {reference:.3f}"
        assert reference <= 8, f"{count} pending tokens: the reference errs {reference:.3f} times a rounding"
