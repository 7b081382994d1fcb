"""``python -m cute_ssm tune`` from a call to a table, with counters as costs, on every engine."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import time

import pytest
import torch

from cute_ssm import arch, workloads
from cute_ssm.__main__ import main
from cute_ssm.errors import CuteSsmError
from cute_ssm.ops.selective_state_update import config as selective_step
from cute_ssm.runtime import bundles, toolchain
from cute_ssm.tuner import cli, engines, objectives, problems, tune
from cute_ssm.tuner.gate import Gate
from cute_ssm.tuner.journal import Journal, Measurement
from cute_ssm.tuning import tables

OP = "selective_state_update"
KEYS = {"batch": 4, "nheads": 2, "dim": 32, "dstate": 16}
SHAPES = [f"{key}={value}" for key, value in KEYS.items()]
SPACE = {"rows": (16, 32), "warps": (1, 2)}


@pytest.fixture(autouse=True)
def small(settings, monkeypatch):
    """Four configs, so that few kernels are compiled."""
    settings()
    monkeypatch.setattr(selective_step.SelectiveStepConfig, "space", lambda spec, target: dict(SPACE))
    tables.forget()
    yield
    tables.forget()


@pytest.fixture
def problem():
    return problems.problem(OP, KEYS, arch.SM_90A)


class Fake:
    """Costs without kernels: 10 us, less 2 for each further warp, on a worker that is `slow` times slower."""

    how, noise, error, slow = "modelled", 0.0, 0.0, 1.0
    calls = 0

    def on(self):
        return {"objective": "fake"}

    def measure(self, case, fields, rule, rounds):
        Fake.calls += 1
        if fields["rows"] == 32:
            raise ValueError("no rows of 32")
        return Measurement(self.slow * (12.0 - 2 * fields["warps"]), self.slow * (12.0 - 2 * rule["warps"]))


def solve(problem, objective, path=None, **options):
    worker = engines.Inline.__new__(engines.Inline)
    worker._worker = engines.Worker.__new__(engines.Worker)
    worker._worker.objective = objective
    journal = Journal(path, "fake")
    (solved,) = tune.Tuner(worker, objective, journal, **options).solve([problem])
    journal.close()
    return solved


def test_a_problem_is_what_the_call_asks_the_tables(problem):
    assert problem.lookup.heads == KEYS["batch"] * KEYS["nheads"]
    assert problem.lookup.spec.dim == 32
    assert problem.rule() == {name: getattr(problem.lookup.rule, name) for name in SPACE}
    assert all(value in problem.space[name] for name, value in problem.rule().items())
    assert problem.valid({"rows": 32, "warps": 2})
    assert not problem.valid({"rows": 24, "warps": 2})
    ((spec, config, _),) = problem.kernels({"rows": 32, "warps": 2})
    assert (spec, config.rows, config.warps) == (problem.lookup.spec, 32, 2)


def test_fields_that_mean_nothing_stay_as_they_are(problem):
    loose = dataclasses.replace(problem, space={**SPACE, "stages": (1, 3), "ctas_per_sm": (1, 2)})
    rule = problem.lookup.rule
    assert rule.stages == 1
    assert not loose.valid({"rows": 32, "warps": 1, "stages": 1, "ctas_per_sm": rule.ctas_per_sm + 1})
    assert loose.valid({"rows": 32, "warps": 1, "stages": 3, "ctas_per_sm": rule.ctas_per_sm + 1})


def test_an_operator_that_cannot_be_tuned_is_named(monkeypatch):
    config = selective_step.SelectiveStepConfig
    with monkeypatch.context() as patch:
        patch.setattr(config, "FREE", ())
        with pytest.raises(ValueError, match=r"op: expected an operator whose config has fields .* has none"):
            problems.problem(OP, KEYS, arch.SM_90A)
    monkeypatch.setattr(config, "space", lambda *_: {"lanes": (4, 8)})
    with pytest.raises(ValueError, match="expected fields of FREE, got lanes"):
        problems.problem(OP, KEYS, arch.SM_90A)


def test_the_winner_becomes_a_row_that_the_operator_finds(problem, settings, tmp_path):
    solved = solve(problem, Fake())
    assert solved.outcome.complete
    assert solved.row["config"] == {"rows": 16, "warps": 2}
    assert solved.row["evidence"]["us"] == 8.0
    assert solved.row["evidence"]["rule_us"] == 10.0
    assert solved.row["evidence"]["how"] == "modelled"
    tables.merge(tmp_path / "table.json", [solved.row])
    settings(TUNING_DIR=tmp_path)
    tables.forget()
    again = problems.problem(OP, KEYS, arch.SM_90A)
    ((_, config, _),) = again.kernels({})
    assert config.warps == 2


def test_a_gain_below_the_margin_is_a_row_of_the_rule(problem):
    solved = solve(problem, Fake(), margin=0.25)
    assert solved.row["config"] == {}
    assert solved.row["evidence"]["us"] == 10.0


def test_a_search_goes_on_where_it_was_stopped(problem, tmp_path):
    Fake.calls = 0
    solve(problem, Fake(), tmp_path / "journal")
    assert Fake.calls > 0
    Fake.calls = 0
    assert solve(problem, Fake(), tmp_path / "journal").row["config"]["warps"] == 2
    assert Fake.calls == 0


def test_slow_workers_favour_nothing(problem):
    """Costs are relative to the rule's config on the same worker."""

    class Drifting(Fake):
        def measure(self, case, fields, rule, rounds):
            self.slow = 1.0 if self.slow > 1.5 else 2.0  # every other measurement takes twice as long
            return super().measure(case, fields, rule, rounds)

    solved = solve(problem, Drifting())
    assert solved.row["config"] == {"rows": 16, "warps": 2}
    assert solved.gain == pytest.approx(10 / 8)


def test_a_call_whose_rule_fails_is_reported(problem):
    class Broken(Fake):
        def measure(self, *_):
            raise CuteSsmError("out differs")

    solved = solve(problem, Broken())
    assert solved.row is None
    assert "out differs" in solved.error
    assert "FAILED" in "".join(cli.report([solved], "modelled"))


def test_time_is_shared_and_what_is_not_reached_is_left_out(problem):
    worker = engines.Inline.__new__(engines.Inline)
    worker._worker = engines.Worker.__new__(engines.Worker)
    worker._worker.objective = Fake()
    tuner = tune.Tuner(worker, Fake(), Journal(None, ""))
    assert list(tuner.solve([problem, problem], seconds=0.0)) == []
    assert len(list(tuner.solve([problem, problem], seconds=60.0))) == 2


def test_without_a_compiler_only_configs_of_bundles_are_tried(problem, monkeypatch):
    monkeypatch.setattr(toolchain, "installed", lambda name: None)
    own = problem.rule()["warps"]
    monkeypatch.setattr(bundles, "has", lambda key: key.config.warps == own)
    outcome = solve(problem, Fake()).outcome
    tried = [dict(fields) for fields in outcome.costs]
    assert {fields["warps"] for fields in tried} == {own}
    assert len(tried) == sum(problem.valid({**problem.rule(), "rows": rows}) for rows in problem.space["rows"])


def test_counters_prefer_less_work_and_the_gate_is_passed(problem):
    objective = objectives.Counters()
    fields, rule = {"rows": 16, "warps": 1}, problem.rule()
    found = objective.measure(problem.case, fields, rule, 1)
    assert found.error == ""
    assert found.us > 4.0, "a launch and the bytes"
    assert found.reference_us > 0
    many = problems.Case(OP, tuple(sorted({**KEYS, "batch": 300}.items())), "sm_90a")
    assert objective.measure(many, fields, rule, 1).us > found.us


def test_a_config_that_spills_is_refused(problem, monkeypatch):
    objective = objectives.Counters()
    monkeypatch.setattr(Gate, "problem", lambda self, fields: setattr(objective, "_spills", "8 bytes") or "")
    assert objective.measure(problem.case, {"rows": 16, "warps": 2}, problem.rule(), 1).error == "8 bytes"


def test_the_gate_refuses_other_bits(problem, monkeypatch):
    call = workloads.build(OP, KEYS)
    gate = Gate(call, problem.rule())
    assert gate.problem({"rows": 32, "warps": 1}) == ""
    assert gate.problem_of_rule(gate.results()) == ""
    run = type(call).run

    def wrong(self):
        run(self)
        self.arguments["out"][0, 0, 0] += 1

    monkeypatch.setattr(type(call), "run", wrong)
    assert "out is not, bit for bit" in gate.problem({"rows": 32, "warps": 1})
    gate.expected["out"][0] += 1e6
    assert "differs from the reference" in gate.problem_of_rule(gate.results())
    gate.expected["out"][0] = float("nan")
    assert "NaN" in gate.problem_of_rule(gate.results())


@pytest.mark.parametrize(
    ("rule", "other"),
    [(0, 0x80000000), (0x7FC00000, 0x7FC00001), (0x7FC00000, 0xFFC00000)],
    ids=["zeros of two signs", "payloads of NaN", "signs of NaN"],
)
def test_the_gate_compares_bytes_not_values(problem, rule, other, monkeypatch):
    """-0 equals 0 as a value, and NaN nothing: as bytes the first differ, and a NaN equals itself."""
    call = workloads.build(OP, KEYS)
    run, bits = type(call).run, rule

    def planted(self):
        run(self)
        self.arguments["state"].view(torch.int32 if self.arguments["state"].dtype == torch.float32 else torch.int16)[
            0, 0, 0, 0
        ] = word(self.arguments["state"])

    def word(state):
        value = bits if state.dtype == torch.float32 else bits >> 16 | bits & 1
        size = 32 if state.dtype == torch.float32 else 16
        return value - (1 << size) if value >> size - 1 else value

    monkeypatch.setattr(type(call), "run", planted)
    gate = Gate(call, problem.rule())
    assert gate.problem(problem.rule()) == "", "the same bytes are the same, NaN or not"
    bits = other
    assert "state is not, bit for bit" in gate.problem(problem.rule())


def test_the_model_is_an_objective():
    pytest.importorskip("gpumodel")
    case = problems.Case(OP, tuple(sorted(KEYS.items())), "sm_90a")
    rule = {"rows": 16, "warps": 1}
    found = objectives.create("model").measure(case, rule, rule, 1)
    assert found.us == found.reference_us > 0, found.error


def test_the_command_fills_a_table(tmp_path, capsys):
    out = tmp_path / "table.json"
    options = ["tune", OP, "--shapes", *SHAPES, "--objective", "counters", "--out", str(out)]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"better configs go into {out}; operators read them there if CUTE_SSM_TUNING_DIR=")
    assert re.search(r"table\.json: [01] configs better than the rule's by 5%, [01] calls for which", printed)
    assert "batch=4" in printed
    (row,) = json.loads(out.read_text())
    assert tables._is_row(row)
    assert (row["op"], row["arch"], row["heads"]) == (OP, "sm_90a", 8)
    assert row["evidence"]["objective"] == "counters"
    assert (tmp_path / "table.journal.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["no_op"], "op: expected one of"),
        ([OP, "--shapes", "nheads"], "--shapes: expected KEY=VALUE"),
        ([OP, "--shapes", "heads=3"], "--shapes: expected parameters among"),
        ([OP, "--gpus", "0"], "--gpus: expected a positive number"),
        ([OP, "--objective", "guess"], "--objective: expected auto, gpu, model or counters"),
        ([OP, "--engine", "cloud"], "--engine: expected auto, inline"),
        ([OP, "--arch", "sm_80"], "arch: expected one of"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message, tmp_path, capsys):
    extra = [] if "--objective" in options else ["--objective", "counters"]
    assert main(["tune", *options, *extra, "--out", str(tmp_path / "t.json")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("where", ["variable", "home"])
def test_without_out_the_path_of_the_table_is_printed_first(where, tmp_path, settings, monkeypatch, capsys):
    """With no option but the operator's: the first line names the file, before anything is searched."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "config" / "cute_ssm" / "tuning"
    if where == "variable":
        folder = tmp_path / "mine"
        settings(TUNING_DIR=folder)

    def stop(*_):
        raise ValueError("searched")

    monkeypatch.setattr(cli, "problems_of", stop)
    assert main(["tune", OP]) == 2
    printed, error = capsys.readouterr()
    assert "searched" in error
    reader = "" if where == "variable" else f" if CUTE_SSM_TUNING_DIR={folder} is set"
    assert printed == f"better configs go into {folder / f'{OP}.json'}; operators read them there{reader}\n"
    assert not folder.exists(), "nothing is made before there is something to write"


def test_an_unknown_operator_is_refused_before_a_path_of_its_table_is_printed(capsys):
    assert main(["tune", "convolution"]) == 2
    printed, error = capsys.readouterr()
    assert not printed and "op: expected one of selective_state_update, " in error


def test_a_table_that_cannot_be_written_is_refused_before_the_search(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["tune", OP, "--objective", "counters", "--out", str(tmp_path / "file" / "t.json")]) == 2
    assert "--out: expected a file in a folder that can be written" in capsys.readouterr().err
    assert main(["tune", OP, "--objective", "counters", "--out", str(tmp_path)]) == 2
    assert "--out: expected a file that can be written" in capsys.readouterr().err


def test_only_rows_that_differ_from_the_rule_are_counted_as_better(problem):
    better, kept = solve(problem, Fake()), solve(problem, Fake(), margin=0.25)
    assert cli.summary([better, kept, kept], 0.05) == (
        "1 configs better than the rule's by 5%, 2 calls for which the rule's is kept"
    )


def test_the_default_margin_is_the_documented_one(problem):
    assert tune.MARGIN == 0.05

    class Close(Fake):
        def measure(self, case, fields, rule, rounds):
            found = super().measure(case, fields, rule, rounds)
            return Measurement(9.6 if fields["warps"] == 2 else found.us, found.reference_us)

    assert solve(problem, Close()).row["config"] == {}, "4 % are no gain"


def test_modelled_configs_of_the_own_table_gain_more_than_the_models_error():
    """Where this fails, `tables.withdraw` gives their calls back to the rule."""
    validated = pytest.importorskip("gpumodel.validated")
    own = [row for row in tables.read(tables.BUNDLED) if row["config"] and row["evidence"]["how"] == "modelled"]
    assert own and min(map(tables.gain, own)) > max(tune.MARGIN, validated.error())


def test_the_margin_is_at_least_the_error_of_the_machine_model(problem):
    validated = pytest.importorskip("gpumodel.validated")
    model = objectives.create("model")
    assert model.error == validated.error()
    for asked, used in ((0.0, model.error), (0.05, max(0.05, model.error)), (0.9, 0.9)):
        assert tune.Tuner(engines.Inline(model), model, Journal(None, ""), asked).margin == used


def test_a_gain_within_the_error_of_the_costs_is_a_row_of_the_rule(problem):
    class Wrong(Fake):
        error = 0.25

    assert solve(problem, Fake()).row["config"] and solve(problem, Wrong()).row["config"] == {}


def test_no_gpu_is_said_clearly(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["tune", OP, "--objective", "gpu", "--out", str(tmp_path / "t.json")]) == 2
    assert "there is no GPU here" in capsys.readouterr().err


CASE = problems.Case(OP, tuple(sorted(KEYS.items())), "sm_90a")
CONFIGS = [(("rows", 16), ("warps", warps)) for warps in (1, 2)]
JOBS = [engines.Job(CASE, config, CONFIGS[0]) for config in CONFIGS]


def measured(engine):
    try:
        return dict(engine.map(JOBS))
    finally:
        engine.close()


def test_processes_measure_what_this_process_measures():
    here = measured(engines.create("inline", "counters", 1))
    assert all(found.us for found in here.values()), here
    assert measured(engines.create("processes", "counters", 2)) == here


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra 'tune'")
def test_ray_measures_what_this_process_measures():
    here = measured(engines.create("inline", "counters", 1))
    assert measured(engines.create("ray", "counters", 2)) == here


def test_without_ray_the_way_out_is_named(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(engines, "import_module", absent)
    with pytest.raises(ValueError, match=r"pip install 'cute-ssm\[tune\]'"):
        engines.create("ray", "counters", 2)


def dies(job):
    os._exit(3)


def sleeps(job):
    time.sleep(60)


def test_a_config_that_breaks_its_process_fails_alone(monkeypatch):
    engine = engines.Processes("counters", 1)
    real = engines._serve
    try:
        for serve, seconds, word in ((dies, 120.0, "the process ended"), (sleeps, 1.0, "no result after")):
            monkeypatch.setattr(engines, "_serve", serve)
            monkeypatch.setattr(engine, "timeout_s", seconds)
            ((_, found),) = engine.map(JOBS[:1])
            assert found.us is None
            assert word in found.error
        monkeypatch.setattr(engines, "_serve", real)
        monkeypatch.setattr(engine, "timeout_s", 120.0)
        ((_, found),) = engine.map(JOBS[:1])
        assert found.us, "the process was replaced"
    finally:
        engine.close()
