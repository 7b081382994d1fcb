"""tools/gpu_check.py without a GPU: its steps, what they get of the time, and what is kept when one fails or dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import gpu_check
import gpu_pass.plan as plans
import pytest
import torch
from bench import roof
from gpu_pass import calls, records, runner
from gpu_pass.plan import SECONDS, Step
from gpu_pass.records import Item, Records, Wrong
from paths import ROOT

from cute_ssm import workloads

PYTHON = sys.executable


class Clock:
    """A clock that runs as the runner says."""

    def __init__(self):
        self.now, self.limits = 0.0, []

    def __call__(self):
        return self.now

    def runner(self, takes, code=0, text="line\n7 passed in 3 s\n"):
        """A runner whose commands take `takes` seconds, or until their limit."""

        def run(command, log, limits, environment, cwd):
            log.write_text(text)
            self.limits.append(limits.seconds)
            self.now += min(takes, limits.seconds)
            return code if takes <= limits.seconds else None

        return run


def steps(*names, weight=1.0, **more):
    return [Step(name, 1, ("command", name), weight, **more) for name in names]


def carried_out(found, folder, minutes, run, clock=time.monotonic, **more):
    made = runner.Pass(folder / "out", folder / "out.tar.gz", {}, ROOT, runner=run, clock=clock, **more)
    return made.carry_out(found, 60 * minutes)


def contents(archive):
    with tarfile.open(archive) as tar:
        return {name: tar.extractfile(name).read() for name in tar.getnames()}


# ------------------------------------------------------------------------------------------------------- time and order
def test_every_step_is_summarised_with_the_line_that_tells(tmp_path):
    clock = Clock()
    done = carried_out(steps("a", "b", last="passed"), tmp_path, 8, clock.runner(3.0), clock)
    assert [one.status for one in done] == ["passed", "passed"]
    text = (tmp_path / "out" / "summary.txt").read_text()
    assert text.count("7 passed in 3 s") == 2
    assert "2 passed; 0 failures" in text
    assert [row["name"] for row in json.loads((tmp_path / "out" / "summary.json").read_text())] == ["a", "b"]


def test_failures_do_not_stop_what_follows(tmp_path):
    clock = Clock()
    done = carried_out(steps("a", "b"), tmp_path, 8, clock.runner(3.0, code=1), clock)
    assert [one.status for one in done] == ["failed", "failed"]
    assert [one.returncode for one in done] == [1, 1]


def test_a_step_that_fails_without_naming_a_failure_is_one(tmp_path):
    """A sanitizer, say, finds errors in calls that passed."""

    def run(command, log, limits, environment, cwd):
        log.write_text("ERROR SUMMARY: 2 errors")
        if command[1] == "tests":
            records.fail(tmp_path / "out", "tests", "test_bad", "AssertionError")
        return 9

    found = [*steps("driver"), *steps("memcheck", items="memcheck"), *steps("tests")]
    done = carried_out(found, tmp_path, 8, run)
    failures = [(one["step"], one["name"], one["error"]) for one in records.read(tmp_path / "out" / records.FAILURES)]
    whole = ("the step as a whole", "the process ended with code 9")
    assert failures == [("driver", *whole), ("memcheck", *whole), ("tests", "test_bad", "AssertionError")]
    assert [one.status for one in done] == ["failed"] * 3
    assert b"ERROR SUMMARY" in contents(tmp_path / "out.tar.gz")["failures.jsonl"]


def test_time_is_shared_and_never_exceeded(tmp_path):
    clock = Clock()
    done = carried_out(steps("a", "b", "c", "d"), tmp_path, 2, clock.runner(1e9), clock)
    assert clock.now <= 120
    assert done[0].status == "out of time"
    assert done[0].seconds < 60, "the first leaves time for others"
    assert {one.status for one in done} <= {"out of time", "left out"}


def test_time_that_is_not_used_is_for_those_that_follow(tmp_path):
    clock = Clock()
    carried_out(steps("a", "b", "c"), tmp_path, 10, clock.runner(1.0), clock)
    assert clock.limits == sorted(clock.limits)
    assert clock.limits[-1] > 500


def test_a_step_is_skipped_with_a_line_where_less_is_left_than_it_is_worth(tmp_path):
    clock = Clock()
    found = [*steps("a"), *steps("b", least_s=300.0), *steps("c")]
    done = carried_out(found, tmp_path, 1, clock.runner(10.0), clock)
    assert [one.status for one in done] == ["passed", "left out", "passed"]
    assert done[1].line == "needs 300 s, 44 s are left"


def test_a_step_gets_at_least_what_makes_it_worth_its_start_and_at_most_its_cap(tmp_path):
    found = [*steps("light", weight=0.01, least_s=20.0), *steps("capped", weight=100.0, most_s=30.0), *steps("rest")]
    assert runner.allotted(found[0], found, 100.0) == 20.0
    assert runner.allotted(found[1], found[1:], 100.0) == 30.0
    assert runner.allotted(found[1], found[1:], 100.0, scale=2.0) == 60.0
    assert runner.allotted(found[2], found[2:], 100.0) == 100.0
    later = [*steps("long", weight=9.0), *steps("last", least_s=40.0)]
    assert runner.allotted(later[0], later, 100.0) == 60.0, "the last one is left what it needs"


def test_a_step_that_cannot_be_prepared_is_a_failure_with_its_traceback(tmp_path, monkeypatch):
    def no_bundle(options):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(gpu_check, "items_of", no_bundle)
    with pytest.raises(RuntimeError):
        gpu_check.main(["step", "smoke", "--out", str(tmp_path)])
    (failure,) = records.read(tmp_path / records.FAILURES)
    assert (failure["name"], failure["error"]) == ("preparation", "RuntimeError: no kernel")
    assert "no_bundle" in failure["traceback"]


def test_what_is_not_installed_is_left_out(tmp_path):
    def run(*_):
        raise AssertionError("run although its tool is missing")

    found = [*steps("a", needs="no-such-tool-anywhere"), *steps("b", file=tmp_path / "absent.npz")]
    done = carried_out(found, tmp_path, 8, run)
    assert [one.status for one in done] == ["left out"] * 2
    assert [one.line for one in done] == ["no-such-tool-anywhere is not installed", "absent.npz is missing"]


def test_a_tool_that_refuses_the_device_is_left_out_and_says_so(tmp_path):
    clock = Clock()
    found = steps("a", needs="sh")
    refused = clock.runner(3.0, code=9, text="== Device not supported\n9 items\n")
    (done,) = carried_out(found, tmp_path, 8, refused, clock)
    assert (done.status, done.line) == ("left out", "== Device not supported")
    (done,) = carried_out(found, tmp_path, 8, clock.runner(3.0, code=9, text="ERROR SUMMARY: 2\n"), clock)
    assert done.status == "failed"


def test_a_command_is_told_its_seconds(tmp_path):
    seen = []

    def run(command, log, limits, environment, cwd):
        seen.append((command, limits.seconds))
        return 0

    carried_out([Step("a", 1, ("command", SECONDS), 1.0)], tmp_path, 1, run)
    ((command, seconds),) = seen
    assert float(command[1]) == pytest.approx(seconds, abs=0.1)
    assert 50 < seconds <= 54


# ------------------------------------------------------------------------------------------------------- what is packed
def test_the_archive_is_there_after_each_step_with_all_but_kernels(tmp_path):
    seen = []

    def run(command, log, limits, environment, cwd):
        seen.append((tmp_path / "out.tar.gz").exists())
        log.write_text("said\n")
        (tmp_path / "out" / "kernels").mkdir(exist_ok=True)
        (tmp_path / "out" / "kernels" / "big.o").write_bytes(b"0" * 1000)
        (tmp_path / "out" / f"{command[1]}.jsonl").write_text("{}\n")
        return 0

    carried_out(steps("a", "b"), tmp_path, 8, run)
    assert seen == [False, True]
    found = contents(tmp_path / "out.tar.gz")
    assert set(found) == {"a.log", "b.log", "a.jsonl", "b.jsonl", "summary.json", "summary.txt"}
    assert b"2 passed" in found["summary.txt"]


def test_what_is_too_large_for_the_archive_is_named_in_it(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "small").write_bytes(b"1" * 10)
    (tmp_path / "out" / "large").write_bytes(b"2" * 1000)
    assert runner.pack(tmp_path / "out", tmp_path / "x.tar.gz", limit=100) == ["large (1000 bytes)"]
    found = contents(tmp_path / "x.tar.gz")
    assert set(found) == {"small", "left_out.txt"}
    assert b"large (1000 bytes)" in found["left_out.txt"]


# ---------------------------------------------------------------------------------------------------- items, as written
def items(*names, run=lambda: {}):
    return [Item(name, run) for name in names]


def lines(folder, step="step"):
    return [(line["item"], line["state"]) for line in records.read(folder / f"items-{step}.jsonl")]


def test_a_failure_is_on_disk_with_traceback_and_error_before_the_next_item(tmp_path):
    def wrong():
        raise Wrong("out is far off", max_error=0.25)

    def next_one():
        (failure,) = records.read(tmp_path / records.FAILURES)
        assert (failure["step"], failure["name"], failure["max_error"]) == ("step", "bad", 0.25)
        assert failure["error"] == "Wrong: out is far off" and "in wrong" in failure["traceback"]
        return {"seen": True}

    code = Records(tmp_path, "step", 60, alive=lambda: True).run([Item("bad", wrong), Item("next", next_one)])
    assert code == records.FAILED
    assert lines(tmp_path) == [("bad", "begun"), ("bad", "failed"), ("next", "begun"), ("next", "passed")]


def test_a_lost_device_ends_the_process_and_the_next_one_goes_on_behind(tmp_path):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    found = [*items("a"), Item("b", lost), *items("c")]
    assert Records(tmp_path, "step", 60, alive=lambda: False).run(found) == records.STICKY
    assert [line for line in lines(tmp_path) if line[0] == "c"] == []
    assert Records(tmp_path, "step", 60, alive=lambda: True).run(found) == records.FAILED
    assert lines(tmp_path)[-2:] == [("c", "begun"), ("c", "passed")]
    assert sum(line[0] == "b" for line in lines(tmp_path)) == 2, "begun and failed, once"


def test_items_beyond_the_time_are_not_begun(tmp_path):
    clock = Clock()

    def slow():
        clock.now += 10
        return {}

    assert Records(tmp_path, "step", 15, clock=clock).run(items("a", "b", "c", run=slow)) == records.LATE
    assert {item for item, _ in lines(tmp_path)} == {"a", "b"}
    assert records.told(records.read(tmp_path / "items-step.jsonl"), 3) == "2 passed, 1 not reached"


def test_a_line_that_was_cut_short_is_no_obstacle(tmp_path):
    path = tmp_path / "items-step.jsonl"
    records.append(path, {"item": "a", "state": "begun"})
    with path.open("a") as file:
        file.write('{"item": "b", "sta')
    assert [line["item"] for line in records.read(path)] == ["a"]


# --------------------------------------------------------------------------------- processes that crash, hang, or go on
CHILD = """
import os, sys, time
from pathlib import Path
from gpu_pass.records import Item, Records
def crash(): os.kill(os.getpid(), 11)
def hang(): time.sleep(60)
def lost(): raise RuntimeError("CUDA error")
items = [Item("a", dict), Item("bad", {bad}), Item("c", dict)]
sys.exit(Records(Path({out!r}), "child", 60, alive=lambda: {bad!r} != "lost").run(items))
"""


@pytest.mark.parametrize(
    ("bad", "error"),
    [("crash", "the process ended with code -11"), ("hang", "no end after 2 s"), ("lost", "RuntimeError: CUDA error")],
)
def test_a_step_goes_on_behind_an_item_that_ended_it(tmp_path, bad, error):
    """It crashes, hangs, or makes CUDA useless to its process; the items around it are done all the same."""
    out = tmp_path / "out"
    code = CHILD.format(bad=bad, out=str(out))
    step = Step("child", 1, (PYTHON, "-c", code), 1.0, items="child")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    made = runner.Pass(out, tmp_path / "x.tar.gz", environment, ROOT, stall_s=2.0)
    (done,) = made.carry_out([step], 60)
    assert (done.status, done.starts) == ("failed", 2)
    assert done.line == "2 passed, 1 failed"
    failures = records.read(out / records.FAILURES)
    assert failures[0]["name"] == "bad" and failures[0]["error"] == error
    assert b'"bad"' in contents(tmp_path / "x.tar.gz")["failures.jsonl"]


def test_items_that_were_not_reached_are_counted_in_the_summary(tmp_path):
    code = "from pathlib import Path; from gpu_pass.records import *; import sys\n"
    code += f"sys.exit(Records(Path({str(tmp_path / 'out')!r}), 'a', 0).run([Item('x', dict), Item('y', dict)]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    made = runner.Pass(tmp_path / "out", tmp_path / "x.tar.gz", environment, ROOT)
    (done,) = made.carry_out([Step("a", 1, (PYTHON, "-c", code), 1.0, items="a")], 60)
    assert (done.status, done.line) == ("out of time", "2 not reached")


def test_a_step_that_dies_without_progress_is_not_started_for_ever(tmp_path):
    starts = []

    def run(command, log, limits, environment, cwd):
        starts.append(command)
        return -6

    (done,) = carried_out(steps("a", items="a"), tmp_path, 8, run)
    assert (done.status, len(starts)) == ("failed", 1)


def test_a_command_gets_sigint_first_and_what_it_started_is_ended(tmp_path):
    code = (
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "print(child.pid, flush=True)\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: print('interrupted', flush=True)\n"
    )
    log = tmp_path / "log"
    start = time.monotonic()
    assert runner.run([PYTHON, "-c", code], log, runner.Limits(1.5), os.environ, ROOT) is None
    assert time.monotonic() - start < 20
    pid, said = log.read_text().split()
    assert said == "interrupted"
    time.sleep(0.2)
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout.strip()
    assert not state or state.startswith("Z"), "the child is gone too"
    assert runner.run([PYTHON, "-c", "raise SystemExit(3)"], log, runner.Limits(30), os.environ, ROOT) == 3


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_pass_that_is_ended_leaves_no_step_behind(tmp_path, how):
    """What asked for it may kill it at a limit of its own; a step that goes on would disturb the next pass."""
    out = tmp_path / "out"
    sleeper = (PYTHON, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    found = [Step("first", 1, (PYTHON, "-c", "print('done')"), 1.0), Step("second", 1, sleeper, 1.0)]
    child = os.fork()
    if child == 0:
        try:
            made = runner.Pass(out, tmp_path / "x.tar.gz", dict(os.environ), ROOT)
            signal.signal(signal.SIGTERM, made.end)
            made.carry_out(found, 60)
        finally:
            os._exit(0)
    step = 0
    for _ in range(200):
        time.sleep(0.05)
        log = out / "second.log"
        if log.exists() and log.read_text().endswith("\n"):
            step = int(log.read_text())
            break
    (out / "more").write_text("of the second step")
    os.kill(child, how)
    os.waitpid(child, 0)
    for _ in range(200):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(step)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            break
        time.sleep(0.05)
    assert step and (not state or state.startswith("Z"))
    packed = contents(tmp_path / "x.tar.gz")
    assert b"done" in packed["first.log"] and b"first" in packed["summary.txt"]
    assert ("more" in packed) == (how == signal.SIGTERM)


def test_a_worker_whose_device_is_lost_ends_and_another_goes_on(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "from gpu_pass import records\n"
        "def test_no_compiler():\n    raise ModuleNotFoundError('No module named cutlass', name='cutlass.cute')\n"
        "def test_bad():\n    records.device_is_alive = lambda: False\n    assert 1 == 2\n"
        "def test_good():\n    pass\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    command = [PYTHON, "-m", "pytest", "-q", "-p", "gpu_pass.pytest_records", "--pass-out", str(out), "-n", "1"]
    command += ["--max-worker-restart=4", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", "/dev/null"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    done = subprocess.run([*command, str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "1 failed, 1 passed, 1 skipped" in done.stdout, done.stdout
    failures = [line["error"] for line in records.read(out / records.FAILURES)]
    assert failures == ["AssertionError: assert 1 == 2", "the device is lost to this process: it ends"]


def test_a_test_run_that_is_cut_short_has_named_its_failures(tmp_path):
    """pytest gets SIGINT alone: the report is written, and failures were on disk when they happened."""
    (tmp_path / "test_some.py").write_text(
        "import time\ndef test_bad():\n    assert 1 == 2\ndef test_slow():\n    time.sleep(600)\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    command = [PYTHON, "-m", "pytest", "-q", "-p", "gpu_pass.pytest_records", "--pass-out", str(out)]
    command += [
        f"--junitxml={out / 'tests.xml'}",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        "-c",
        "/dev/null",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    log = tmp_path / "log"
    limits = runner.Limits(600, out / records.FAILURES, 3.0)  # ended three seconds after the last failure
    assert runner.run([*command, str(tmp_path)], log, limits, environment, tmp_path) == runner.HUNG
    (failure,) = records.read(out / records.FAILURES)
    assert failure["name"].endswith("test_some.py::test_bad") and "assert 1 == 2" in failure["traceback"]
    assert "test_bad" in (out / "tests.xml").read_text()
    assert "KeyboardInterrupt" in log.read_text()


# ------------------------------------------------------------------------------------------------------------- the plan
def test_steps_cover_what_a_gpu_can_show_the_most_valuable_first(tmp_path):
    names = [step.name for step in plans.steps(tmp_path)]
    order = ["smoke", "launching", "memcheck", "emulated", "times", "arithmetic", "tests", "tuning", "times-more"]
    assert [name for name in names if name in order] == order
    assert sum(name.startswith("ncu ") for name in names) == 3
    assert {"racecheck", "initcheck"} < set(names)
    assert [step.part for step in plans.steps(tmp_path)] == sorted(step.part for step in plans.steps(tmp_path))


def test_each_part_fits_the_time_of_a_command(tmp_path):
    """With the least that each step is worth, six minutes reach all of them."""
    for part in plans.PARTS:
        least = sum(step.least_s for step in plans.of_parts(plans.steps(tmp_path), part))
        assert least + runner.RESERVE_S < 360, part


def test_to_rehearse_changes_no_step_but_its_size(tmp_path):
    whole, small = plans.steps(tmp_path), plans.steps(tmp_path, rehearse=True)
    for a, b in zip(whole, small, strict=True):
        assert (a.name, a.weight, a.least_s, a.items) == (b.name, b.weight, b.least_s, b.items)
        if a.name != "tests":
            assert [word for word in b.command if word != "--rehearse"] == list(a.command)


def test_tests_run_on_the_gpu_and_write_what_fails(tmp_path):
    command = next(step for step in plans.steps(tmp_path) if step.name == "tests").command
    assert "--gpu" in command and "gpu_pass.pytest_records" in command
    assert not any(word.startswith("--maxfail") for word in command)
    files = [word for word in command if word.startswith("tests/")]
    assert files[0] == "tests/test_gpu.py" and all((ROOT / path).exists() for path in files)
    assert not any(end in path for path in files for end in ("_arguments", "_compile", "_pdl"))


def test_every_mode_is_called_once_and_the_plain_calls_come_first():
    names = [made.text() for made in calls.every_mode()]
    assert len(set(names)) == len(names) > 45
    assert [made.op for made in calls.every_mode()[: len(workloads.OPERATORS)]] == list(workloads.OPERATORS)
    assert any("enable_pdl=True" in name for name in names)


def test_the_command_line(tmp_path, capsys):
    assert gpu_check.main(["--dry-run", "--part", "2", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "pytest --gpu" in printed and " smoke " not in printed
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "nothing", "--dry-run"])
    if torch.cuda.is_available():
        return
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert gpu_check.main(["--out", str(tmp_path / "out"), "--stall", "0.01"]) == 2
    assert "CUDA does not open the GPU within 0.05 seconds" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Opened:
    """Stands for the process that opens the GPU, and for the steps after it."""

    about: dict = {"driver": {}, "device": "none"}  # noqa: RUF012

    def __init__(self, monkeypatch, takes=0.0, **driver):
        self.seconds, self.steps = None, []
        told = "a line of a library\n" + json.dumps({**self.about, "driver": driver})
        self.now = 0.0
        monkeypatch.setattr(gpu_check.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(gpu_check.subprocess, "run", lambda *_, **__: self.open(takes, told))
        monkeypatch.setattr(runner.Pass, "carry_out", self.carry_out)

    def open(self, takes, told):
        self.now += takes
        return subprocess.CompletedProcess([], 0, told, "")

    def carry_out(self, found, seconds):
        self.steps, self.seconds = found, seconds
        return [runner.Done(found[0].name, "passed", 1.0, "line")]


def test_the_time_that_the_gpu_takes_to_open_is_part_of_the_pass(tmp_path, monkeypatch):
    opened = Opened(monkeypatch, takes=40.0)
    assert gpu_check.main(["--minutes", "6", "--out", str(tmp_path / "out")]) == 0
    assert opened.seconds == 320
    assert json.loads((tmp_path / "out" / "about.json").read_text())["device"] == "none"


@pytest.mark.parametrize(("mode", "jobs"), [({}, "3"), ({"compute_mode": "Default"}, "3"),
                                            ({"compute_mode": "Exclusive_Process"}, "1")])  # fmt: skip
def test_one_process_tests_a_gpu_that_takes_one(tmp_path, monkeypatch, mode, jobs):
    opened = Opened(monkeypatch, **mode)
    gpu_check.main(["--only", "tests", "--jobs", "3", "--out", str(tmp_path / "out")])
    (step,) = opened.steps
    assert step.command[step.command.index("-n") + 1] == jobs


def test_what_a_pass_lacks_is_told_and_ends_nothing(monkeypatch):
    """No nvidia-smi, no profiler, no C compiler for Triton's launchers."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(plans, "WHERE", ())
    assert set(gpu_check.programs().values()) == {"not installed"}
    assert set(gpu_check.programs()) == {"nvidia-smi", "ncu", "compute-sanitizer", "C compiler"}
    assert roof.asked(("driver_version",), 0) == {} == roof.clocks(0)
    assert plans.located("ncu") is None and runner.missing(plans.steps(ROOT)[1]) == "nvidia-smi is not installed"


def test_plugins_of_pytest_that_a_machine_has_do_not_end_the_tests(tmp_path):
    """One that is installed there and breaks would end pytest before the first test."""
    info = tmp_path / "site" / "bad-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pytest11]\nbad = no_such_module\n")
    command = list(next(step for step in plans.steps(tmp_path) if step.name == "tests").command)
    options = command[: command.index("-k")]
    (tmp_path / "test_some.py").write_text("def test_good():\n    pass\n")
    options.remove("--gpu")
    environment = gpu_check.environment(tmp_path)
    environment["PYTHONPATH"] += os.pathsep + str(tmp_path / "site")
    command = [*options, "-n", "0", "-c", "/dev/null", "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert "no_such_module" not in done.stderr
