"""tools/gpu_check.py without a GPU: its steps, what they get of the time, and what is kept when it runs out."""

from __future__ import annotations

import importlib.util
import json
import sys
import time

import pytest
import torch
from paths import ROOT

from cute_ssm import workloads
from cute_ssm.tuner import cli

SCRIPT = ROOT / "tools" / "gpu_check.py"
sys.modules["gpu_check"] = check = importlib.util.module_from_spec(
    found := importlib.util.spec_from_file_location("gpu_check", SCRIPT)
)
found.loader.exec_module(check)


class Clock:
    """A clock that runs as the runner says."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def runner(self, takes, code=0, text="line\n7 passed in 3 s\n"):
        """A runner whose commands take `takes` seconds, or until their limit."""

        def run(command, log, limit_s, environment):
            log.write_text(text)
            self.now += min(takes, limit_s)
            return code if takes <= limit_s else None

        return run


def steps(*names, share=1.0, **more):
    return [check.Step(name, ["command", name], share, **more) for name in names]


def test_every_step_is_summarised_with_the_line_that_tells(tmp_path):
    clock = Clock()
    done = check.carry_out(steps("a", "b", last="passed"), tmp_path, 8, clock.runner(3.0), clock)
    assert [one.status for one in done] == ["passed", "passed"]
    text = (tmp_path / "summary.txt").read_text()
    assert text.count("7 passed in 3 s") == 2
    assert "2 passed; everything is in" in text
    assert [row["name"] for row in json.loads((tmp_path / "summary.json").read_text())] == ["a", "b"]
    assert (tmp_path / "a.log").exists()


def test_failures_do_not_stop_what_follows(tmp_path):
    clock = Clock()
    done = check.carry_out(steps("a", "b"), tmp_path, 8, clock.runner(3.0, code=1), clock)
    assert [one.status for one in done] == ["failed", "failed"]
    assert [one.returncode for one in done] == [1, 1]


def test_time_is_shared_and_never_exceeded(tmp_path):
    clock = Clock()
    done = check.carry_out(steps("a", "b", "c", "d"), tmp_path, 2, clock.runner(1e9), clock)
    assert clock.now <= 120
    assert done[0].status == "out of time"
    assert done[0].seconds < 60, "the first leaves time for others"
    assert {one.status for one in done} <= {"out of time", "left out"}
    assert len(json.loads((tmp_path / "summary.json").read_text())) == 4


def test_time_that_is_not_used_is_for_those_that_follow(tmp_path):
    limits = []
    clock = Clock()

    def run(command, log, limit_s, environment):
        limits.append(limit_s)
        clock.now += 1
        return 0

    check.carry_out(steps("a", "b", "c"), tmp_path, 10, run, clock)
    assert limits == sorted(limits)
    assert limits[-1] > 500


def test_a_summary_is_there_while_steps_run(tmp_path):
    seen = []

    def run(command, log, limit_s, environment):
        seen.append((tmp_path / "summary.json").exists())
        assert str(SCRIPT.parents[1]) in environment["PYTHONPATH"]
        return 0

    check.carry_out(steps("a", "b"), tmp_path, 8, run)
    assert seen == [False, True]


def test_what_is_not_installed_is_left_out(tmp_path):
    def run(*_):
        raise AssertionError("run although its tool is missing")

    (done,) = check.carry_out(steps("a", needs="no-such-tool-anywhere"), tmp_path, 8, run)
    assert (done.status, done.line) == ("left out", "no-such-tool-anywhere is not installed")


def test_commands_run_are_ended_and_leave_their_log(tmp_path):
    code = "import subprocess, sys, time; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    start = time.monotonic()
    assert check.run([sys.executable, "-c", code], tmp_path / "log", 1.5, {}) is None
    assert time.monotonic() - start < 20
    assert (tmp_path / "log").read_text() == "begun\n"
    assert check.run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", 30, {}) == 3
    (done,) = check.carry_out([check.Step("absent", ["/no/such/program"], 1.0)], tmp_path, 8)
    assert done.status == "failed"


def test_steps_cover_what_a_gpu_can_show(tmp_path):
    found = check.steps(tmp_path, 8, False, 4)
    names = [step.name for step in found]
    assert names[:4] == ["environment", "driver", "compare", "tests"]
    assert {"memcheck", "racecheck", "benchmarks"} < set(names)
    for op in workloads.OPERATORS:
        assert f"tune {op}" in names
        tune = next(step for step in found if step.name == f"tune {op}").command
        shapes = tune[tune.index("--shapes") + 1 : tune.index("--minutes")]
        assert len(cli.shapes(op, shapes)) == 2
        assert all(op in step.command for step in found if step.name in ("memcheck", "racecheck"))
    tests = next(step for step in found if step.name == "tests")
    assert "--gpu" in tests.command
    assert all((SCRIPT.parents[1] / path).exists() for path in tests.command if path.startswith("tests/"))
    assert len(check.steps(tmp_path, 8, True, 4)) < len(found)


def test_agreement_counts_bits_and_distance():
    a = torch.tensor([1.0, 2.0, float("nan"), -0.0])
    assert check.agreement(a, a.clone()) == {"equal": 1.0, "worst": 0.0}
    b = torch.tensor([1.0, 2.5, float("nan"), 0.0])
    assert check.agreement(a, b) == {"equal": 0.5, "worst": 0.25}
    assert check.agreement(a, torch.ones(4))["worst"] == float("inf")
    assert check.agreement(torch.tensor([3], dtype=torch.int8), torch.tensor([3], dtype=torch.int8))["equal"] == 1.0


@pytest.mark.parametrize("op", workloads.OPERATORS)
def test_the_calls_that_are_compared_exist(op):
    for keys in workloads.checked(op):
        workloads.build(op, keys, fill=False)


def test_the_command_line(tmp_path, capsys):
    assert check.main(["--dry-run", "--out", str(tmp_path / "out")]) == 0
    assert "pytest --gpu" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        check.main(["--only", "nothing", "--dry-run"])
    if torch.cuda.is_available():
        return
    assert check.main(["--out", str(tmp_path / "out")]) == 2
    assert "needs a GPU" in capsys.readouterr().err
