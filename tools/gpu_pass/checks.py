"""Steps that tell whether operators are right on this GPU: all modes, then graphs, streams, dependent launches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_calls import Made

from cute_ssm import workloads
from cute_ssm.tuner.gate import Gate
from gpu_pass import calls
from gpu_pass.records import Item, Wrong


def smoke() -> list[Item]:
    """One call of every mode and type beside the reference, and once more by its memorised plan."""
    return [Item(made.text(), lambda made=made: beside_reference(made)) for made in calls.every_mode()]


def beside_reference(made: Made) -> dict[str, Any]:
    """Run a call on the GPU and by the reference.

    Raises
    ------
    Wrong
        They differ by more than rounding explains, or a second call has other bits.
    """
    here, there = made._replace(arguments=()).build(), calls.made_on(made)
    gate = Gate(there, {})
    wanted = Gate(here, {}).results()
    errors = {name: distance(value, wanted[name]) for name, value in gate.expected.items()}
    data = {"max_error": max(errors.values()), "errors": errors}
    for problem in (gate.problem_of_rule(wanted), gate.problem({})):
        if problem:
            raise Wrong(problem, **data)
    return data


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the largest distance as a part of the largest value wanted; infinite where one alone is not finite."""
    a, b = got.cpu().double(), want.cpu().double()
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    return float((a - b)[finite].abs().max() / b[finite].abs().max().clamp_min(1e-30))


def launching() -> list[Item]:
    """Graphs, another stream, no hidden wait, and dependent launches, for each operator; of one kind for all first."""
    found = []
    ways: dict[str, Callable[[Made], dict[str, Any]]] = {
        "graph": replayed, "stream": on_another_stream, "no wait": waits_for_nothing,
    }  # fmt: skip
    for way, function in ways.items():
        for made in calls.plain() + calls.dependent():
            found.append(Item(f"{way}: {made.text()}", lambda f=function, made=made: f(made)))
    for made in calls.plain() + calls.dependent():
        found.append(Item(f"chain: {made.text()}", lambda made=made: follows_its_producer(made)))
    return found


def _prepared(made: Made) -> tuple[workloads.Call, Gate]:
    """A call that has run, and its results; nothing of it is written."""
    call = calls.made_on(made)
    gate = Gate(call, {})
    gate.restore()
    return call, gate


def _compare(call: workloads.Call, gate: Gate, when: str) -> None:
    torch.cuda.synchronize()
    for name, value in call.results().items():
        if not calls.same_bytes(value, gate.expected[name]):
            raise Wrong(f"{name} has other bits {when}", max_error=distance(value, gate.expected[name]))


def replayed(made: Made) -> dict[str, Any]:
    """A graph repeats, at each replay, what the call did."""
    call, gate = _prepared(made)
    graph = calls.captured(call.run)
    for when in ("after a replay", "after a second replay"):
        gate.restore()
        graph.replay()
        _compare(call, gate, when)
    return {}


def on_another_stream(made: Made) -> dict[str, Any]:
    """A call on a stream of its own, behind work that is slow to end, sees what that work wrote."""
    call, gate = _prepared(made)
    for name, value in call.results().items():
        value.copy_(gate.expected[name])  # not what the call needs: the slow work below puts that back
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        slow = torch.ones(1 << 22, device="cuda")
        for _ in range(20):
            slow.mul_(1.0001)
        gate.restore()
        call.run()
    stream.synchronize()
    _compare(call, gate, "on another stream")
    return {}


@contextlib.contextmanager
def _waiting_forbidden() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits_for_nothing(made: Made) -> dict[str, Any]:
    """A call in steady state never waits for the GPU."""
    call, gate = _prepared(made)
    with _waiting_forbidden():
        call.run()
    _compare(call, gate, "where waiting is forbidden")
    return {}


def follows_its_producer(made: Made) -> dict[str, Any]:
    """Calls one behind the other, in a stream and in a graph, read what the one before wrote.

    The second call starts while the first runs, where launches are dependent ones.  What it gives must be what it gives
    if everything waits between the two.
    """
    call, gate = _prepared(made)
    call.run()
    torch.cuda.synchronize()
    call.run()
    torch.cuda.synchronize()
    gate.expected = calls.clones(call)
    gate.restore()

    def twice() -> None:
        call.run()
        call.run()

    twice()
    _compare(call, gate, "one call behind the other")
    gate.restore()
    graph = calls.captured(twice)
    gate.restore()
    graph.replay()
    _compare(call, gate, "one call behind the other in a graph")
    return {}


def sanitized() -> list[Item]:
    """One call of each operator, for a sanitizer or a profiler around this process."""

    def once(made: Made) -> dict[str, Any]:
        call = calls.made_on(made)
        call.run()
        torch.cuda.synchronize()
        return {}

    return [Item(made.text(), lambda made=made: once(made)) for made in calls.plain()]
