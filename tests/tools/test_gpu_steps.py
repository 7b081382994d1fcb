"""The steps of a GPU pass on the emulator or on doubles: what they compare, time and tune, and the faults they find."""

from __future__ import annotations

import gpu_calls
import numpy as np
import pytest
import torch
from bench import circumstances
from bench.cases import Case
from gpu_pass import calls, checks, emulated, times, tuning
from gpu_pass.records import Wrong

import cute_ssm
import ptxsim
from cute_ssm import workloads
from cute_ssm.arch import SM_90A
from cute_ssm.tuner import timing
from cute_ssm.tuner.journal import Measurement

STEP, GATED = gpu_calls.base("selective_state_update"), gpu_calls.base("gated_delta_rule_mtp")


# ---------------------------------------------------------------------------------------- beside the emulator's results
@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulated") / "emulated.npz"
    emulated.write(path, "sm_90a", 132, "hardware", [STEP, GATED], say=lambda _: None)
    return path


@pytest.mark.parametrize("made", [STEP, GATED], ids=lambda made: made.op)
def test_stored_results_are_those_of_another_run(stored, made):
    with ptxsim.emulate(arch="sm_90a", sm_count=132, arithmetic="hardware"):
        found = emulated.Stored(stored, "sm_90a").compare(made, "cpu")
    assert found["ratio"] <= 1
    assert all(one["equal"] == 1 and one["all_bytes_equal"] for one in found["outputs"].values())


def test_bits_that_differ_are_told_and_decide_nothing(stored):
    """Exact arithmetic gives other last bits than those of the file, as a GPU does."""
    with ptxsim.emulate(arch="sm_90a", sm_count=132):
        found = emulated.Stored(stored).compare(GATED, "cpu")
    assert found["ratio"] <= 1 and not found["outputs"]["output"]["all_bytes_equal"]
    assert 0.5 < found["outputs"]["output"]["equal"] < 1


def test_results_that_are_slightly_off_are_found(stored, monkeypatch):
    """Inputs that are off by a hundredth, which the reference's bound on a mode would let pass."""
    run = workloads.Call.run

    def off(call):
        call.arguments["x"] = call.arguments["x"] * 1.01
        return run(call)

    monkeypatch.setattr(workloads.Call, "run", off)
    with ptxsim.emulate(arch="sm_90a", sm_count=132), pytest.raises(Wrong, match="its rms error") as raised:
        emulated.Stored(stored).compare(STEP, "cpu")
    assert raised.value.data["max_error"] > 0


def test_other_inputs_are_said_and_not_taken_for_errors(stored, monkeypatch):
    monkeypatch.setattr(calls, "made_on", lambda made, device: made.build(seed=1))
    with pytest.raises(Wrong, match="another generator of random numbers"):
        emulated.Stored(stored).compare(STEP, "cpu")


def test_a_file_for_another_target_is_refused(stored):
    with pytest.raises(ValueError, match="got form 1 for sm_90a; make it anew"):
        emulated.Stored(stored, "sm_100a")


def test_the_verdict_is_by_errors():
    exact = np.linspace(1, 2, 1000)
    rounded = exact.astype(np.float32).astype(np.float64)
    noise = np.random.default_rng(0).normal(size=1000) * 1e-3
    assert emulated.verdict(rounded, exact, exact, "float32")["ratio"] < 1
    assert emulated.verdict(exact + noise, exact + noise, exact, "bfloat16")["ratio"] < 1
    assert emulated.verdict(exact + 2 * noise, exact + noise, exact, "float32")["ratio"] == pytest.approx(4 / 3)
    step = 2.0**-7 * np.sign(noise)  # the last bit of a bfloat16
    assert emulated.verdict(exact + step * (np.arange(1000) % 200 == 0), exact, exact, "bfloat16")["ratio"] < 1
    assert emulated.verdict(exact + step, exact, exact, "bfloat16")["ratio"] > 5, "all rounded the other way"
    bad = np.where(np.arange(1000) == 3, np.nan, exact)
    assert emulated.verdict(bad, exact, exact, "float32")["ratio"] == float("inf")


# ------------------------------------------------------------------------------------------------- beside the reference
@pytest.fixture
def on_emulator(monkeypatch):
    """Steps' calls on a GPU run in the emulator, on CPU tensors; calls for the reference leave it."""
    monkeypatch.setattr(calls, "made_on", lambda made, device="cuda": Emulated(made.build()))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)


class Emulated(workloads.Call):
    """A call that runs in the emulator."""

    def __init__(self, call):
        super().__init__(**vars(call))

    def run(self):
        with ptxsim.emulate(arch="sm_90a", sm_count=132):
            return super().run()


def test_a_mode_is_run_beside_the_reference(on_emulator):
    found = checks.beside_reference(STEP)
    assert 0 <= found["max_error"] < 2.0**-5 and set(found["errors"]) == {"out", "state"}


def test_a_wrong_mode_is_found_with_its_error(on_emulator, monkeypatch):
    update = cute_ssm.selective_state_update

    def wrong(**arguments):
        update(**arguments)
        if ptxsim.current() is not None:
            arguments["out"][1] *= 1.5

    monkeypatch.setattr(cute_ssm, "selective_state_update", wrong, raising=False)
    with pytest.raises(Wrong, match="out differs from the reference") as raised:
        checks.beside_reference(STEP)
    assert raised.value.data["max_error"] > 0.1


def test_what_a_call_launches_is_checked_in_each_way_for_each_operator():
    names = [item.name for item in checks.launching()]
    assert len(set(names)) == len(names)
    for op in workloads.OPERATORS:
        for way in ("graph", "stream", "no wait", "chain"):
            assert any(name.startswith(f"{way}: {op} ") for name in names), (way, op)
    assert [name.split(":")[0] for name in names[: len(workloads.OPERATORS)]] == ["graph"] * len(workloads.OPERATORS)


# ---------------------------------------------------------------------------------------------------------------- times
def test_each_operator_is_timed_first_once_and_at_all_batches():
    first = list(times.declared(True))
    assert {case.op for case, _ in first[: len(workloads.OPERATORS)]} == set(workloads.OPERATORS)
    assert [batch for case, batch in first if case.op == "selective_scan"] == [8, 1], (
        "the most sequences that it is given"
    )
    for op in ("selective_state_update", "checkpointing_ssu", "gated_delta_rule_mtp", "gated_delta_rule_replay"):
        assert [batch for case, batch in first if case.op == op] == list(times.BATCHES)
    more = list(times.declared(False))
    assert not {(c.op, c.name) for c, _ in first} & {(c.op, c.name) for c, _ in more}


def test_each_half_of_the_times_is_rehearsed_by_small_calls_whose_kernels_are_in_the_kit():
    known = set(gpu_calls.of_calls([*gpu_calls.modes(), *gpu_calls.checked(), *gpu_calls.timed()], SM_90A))
    for first, batch in ((True, 1), (False, 3)):
        found = list(times.declared(first, rehearse=True))
        assert all(case.name.startswith("small") for case, _ in found) and {b for _, b in found} == {batch}
        assert set(gpu_calls.of_calls((gpu_calls.Made(c.op, c.call(b)) for c, b in found), SM_90A)) <= known
        assert len({case.op for case, _ in found}) == (len(workloads.OPERATORS) if first else 1)


def test_kernels_of_everything_that_is_timed_are_in_the_kit():
    known = set(gpu_calls.of_calls(gpu_calls.timed(), SM_90A))
    found = [*times.declared(True), *times.declared(False)]
    made = [gpu_calls.Made(case.op, case.call(batch)) for case, batch in found]
    assert set(gpu_calls.of_calls(made, SM_90A)) <= known


class Graphs:
    """Captured passes whose replays take as long as their calls say."""

    costs = {"tiny": 1.0, "evictor": 40.0, "ours": 5.0, "peer": 7.0, "copy": 3.0}  # noqa: RUF012

    def capture(self, made):
        return [call() for call in made]

    def alternate(self, passes, samples, warm_up):
        return {
            name: [sum(self.costs[word] for word in graph) / count] * samples for name, (graph, count) in passes.items()
        }


@pytest.fixture
def clockwork(monkeypatch):
    """A clock of calls that are words, and its line of one case."""
    graphs = Graphs()
    monkeypatch.setattr(timing, "capture", graphs.capture)
    monkeypatch.setattr(timing, "alternate", graphs.alternate)
    call = workloads.Call("checkpointing_ssu", {}, (), 1.0, 1000)
    monkeypatch.setattr(workloads.Call, "run", lambda self: "ours")
    monkeypatch.setattr(timing, "rotated", lambda *_: [call, call])
    monkeypatch.setattr(
        circumstances.peers, "of", lambda *_: ({"fla": [lambda: "peer"] * 2}, {"flashinfer": "not installed"})
    )
    monkeypatch.setattr(circumstances.roof, "copies", lambda *_: [lambda: "copy"] * 3)
    monkeypatch.setattr(circumstances.roof, "clocks", lambda _: {})
    made = object.__new__(circumstances.Clockwork)
    made.device, made.effort, made.copy, made.about = (
        torch.device("cpu"),
        circumstances.Effort(),
        1e12,
        {"device": "none"},
    )
    made.between, made.why_not = {"apart": lambda: "tiny", "evicted": lambda: "evictor"}, {}
    return made


def test_a_line_has_every_circumstance_of_ours_and_of_peers(clockwork):
    case = Case("small", "checkpointing_ssu", (), (1,))
    line = clockwork.line(case, 1)
    ours = {name: one["median"] for name, one in line["variants"].items()}
    assert ours == {"chained": 5.0, "warm": 5.0, "apart": 5.0, "evicted": 5.0, "dependent": 5.0}
    assert line["us"]["median"] == 5.0 and line["pdl"] == "asked"
    peer = line["peers"]["fla"]
    assert peer["ratio"] == 1.4 and peer["variants"]["apart"]["median"] == pytest.approx(7.0)
    assert line["peers"]["copy"]["variants"]["evicted"]["median"] == pytest.approx(3.0)
    assert line["peers"]["flashinfer"] == {"absent": "not installed"}


def test_a_peer_that_refuses_a_call_is_absent_and_ours_is_timed(clockwork, monkeypatch):
    def refuse():
        raise ValueError("no such mode")

    monkeypatch.setattr(circumstances.peers, "of", lambda *_: ({"fla": [refuse]}, {}))
    monkeypatch.setattr(circumstances, "device_is_alive", lambda: True)
    line = clockwork.line(Case("small", "selective_state_update", (), (1,)), 1)
    assert line["peers"]["fla"] == {"absent": "ValueError: no such mode"}
    assert line["pdl"] == "always" and "dependent" not in line["variants"]


# --------------------------------------------------------------------------------------------------------------- tuning
class Objective:
    """Measures: one field's largest value is the fastest."""

    how, noise, error = "measured", 0.01, 0.0

    def on(self):
        return {"objective": "gpu", "device": "none"}

    def measure(self, case, fields, rule, rounds):
        best = fields["rows"] == 64
        return Measurement(5.0 if best else 10.0, 10.0)


def test_a_round_of_tuning_leaves_a_row_and_every_measurement(tmp_path):
    from cute_ssm.tuner import problems

    problem = problems.problem("selective_state_update", {"batch": 2, "nheads": 4}, SM_90A, 132)
    assert problem.rule()["rows"] != 64 and 64 in problem.space["rows"]
    found = tuning.Round(tmp_path, Objective(), 30, 1).solve(problem)
    assert found["config"] == {**found["config"], "rows": 64} and found["us"] == 5.0 and found["rule_us"] == 10.0
    assert '"measured"' in (tmp_path / tuning.TABLE).read_text()
    assert len((tmp_path / "tune-selective_state_update.jsonl").read_text().splitlines()) >= found["tried"]


def test_a_rule_that_is_wrong_is_a_failure_of_the_round(tmp_path):
    from cute_ssm.tuner import problems

    class Wrongly(Objective):
        def measure(self, *_):
            return Measurement(None, error="out differs from the reference")

    problem = problems.problem("selective_state_update", {"batch": 2, "nheads": 4}, SM_90A, 132)
    with pytest.raises(Wrong, match="out differs from the reference"):
        tuning.Round(tmp_path, Wrongly(), 30, 1).solve(problem)
