"""tools/peer_suites: suites of other packages run unchanged, and no case is counted as what it is not."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from paths import ROOT

pytest_plugins = ["pytester"]

run = pytest.importorskip("peer_suites.run", reason="tools/ is not on the path")
ptxsim = pytest.importorskip("ptxsim", reason="tools/ is not on the path")
from peer_suites import plugin, sources, stand_ins, suites  # noqa: E402

from cute_ssm import arch as archs  # noqa: E402

SUITE = """
import pytest, torch
from their_package.ops import step

@pytest.mark.parametrize("n", range(5))
def test_many(n):
    x = torch.ones(n + 1, device="cuda")
    assert step(x).device.type == "cpu" and torch.cuda.is_available()

def test_wrong(): assert step(torch.zeros(1)) == 7
def test_of_their_kernel(): assert False
def test_refused(): step(None)
def test_no_longer_refused(): pass
def test_skipped(): pytest.skip("needs a Rubin")
def test_endless():
    while True: pass
"""


def prepared(folder, arch):
    def step(x):
        if x is None:
            raise ValueError("x: expected a tensor")
        session = ptxsim.current()
        if session is not None and len(x) > 1:
            session.launches.append("a launch")
        return x

    stand_ins.module("their_package.ops", step=step)


@pytest.fixture
def outcomes(pytester, monkeypatch):
    """Run the suite above, and return what became of its cases."""
    rules = (
        suites.Rule("of_their_kernel", "their kernel's own"),
        suites.Rule("_refused", "no such argument", error="^ValueError: x: expected"),
    )
    suite = suites.Suite("theirs", "them", "test_theirs.py", prepared, rules, every={"reference": 2})
    monkeypatch.setitem(suites.SUITES, "theirs", suite)
    monkeypatch.setattr(sources, "FOLDER", pytester.path)
    pytester.makepyfile(test_theirs=SUITE)
    monkeypatch.setattr(plugin.importlib.util, "find_spec", lambda name: None)

    def of(backend, *more):
        report = pytester.path / "report.json"
        pytester.runpytest_inprocess(
            "-p", "peer_suites.plugin", "-c", "/dev/null", "--noconftest", "--suite", "theirs", "--backend", backend,
            "--arch", "sm_90a", "--seconds", "1", "--report", str(report), "test_theirs.py", *more,
        )  # fmt: skip
        for name in ("their_package.ops", "their_package"):
            sys.modules.pop(name, None)
        return {name: case["outcome"] for name, case in json.loads(report.read_text()).items()}

    return of


def test_every_case_is_counted_as_what_it_is(outcomes):
    assert outcomes("reference") == {
        **{f"test_many[{n}]": "left out" if n % 2 else "passed" for n in range(5)},
        "test_wrong": "failed",
        "test_of_their_kernel": "not applicable",
        "test_refused": "not applicable",
        "test_no_longer_refused": "rule is stale",
        "test_skipped": "skipped by the suite",
        "test_endless": "over the time",
    }


def test_what_launches_nothing_is_not_counted_as_a_kernel(outcomes):
    found = outcomes("kernel", "-k", "test_many")
    assert [found[f"test_many[{n}]"] for n in range(5)] == ["passed without a kernel"] + ["passed"] * 4


def test_of_a_test_with_lighter_cases_these_alone_are_sampled(outcomes, monkeypatch):
    monkeypatch.setitem(suites.SUITES, "theirs", replace(suites.SUITES["theirs"], light=r"\[[134]\]"))
    found = outcomes("reference", "-k", "test_many or test_wrong")
    assert [n for n in range(5) if found[f"test_many[{n}]"] == "passed"] == [1, 4]
    assert found["test_wrong"] == "failed"


@pytest.mark.parametrize(("value", "outcome"), [(8, "not applicable"), (7, "failed")])
def test_a_case_that_fails_with_the_functions_of_its_project_too_is_not_applicable(
    outcomes, monkeypatch, value, outcome
):
    def own():
        return {"step": lambda x: torch.full((1,), value)}

    monkeypatch.setitem(suites.SUITES, "theirs", replace(suites.SUITES["theirs"], own=own))
    assert outcomes("reference", "-k", "test_wrong") == {"test_wrong": outcome}


def test_tensors_for_a_gpu_are_on_the_cpu(tmp_path):
    arch = archs.by_name("sm_100a")
    with stand_ins.pretended_gpu(arch, tmp_path):
        assert torch.cuda.get_device_capability() == (10, 0)
        assert torch.cuda.get_device_properties(0).multi_processor_count == 148
        of_a_suite = compile("torch.zeros(1).is_cuda", str(tmp_path / "test_theirs.py"), "eval")
        assert eval(of_a_suite) is True and torch.zeros(1).is_cuda is False
        made = [
            torch.zeros(2, device="cuda"), torch.zeros(2, device=torch.device("cuda")), torch.zeros(2).cuda(),
            torch.zeros(2).to("cuda"), torch.randn(2, device="cuda", generator=torch.Generator("cuda")),
            torch.zeros(2).to(torch.device("cuda", 0), torch.float16), torch.arange(2).to(device="cuda"),
        ]  # fmt: skip
    assert all(tensor.device.type == "cpu" for tensor in made)
    assert torch.cuda.is_available() is False and torch.Generator is torch._C.Generator


def test_the_page_shows_the_committed_results():
    results = json.loads(run.RESULTS.read_text())
    assert run.page(results) in run.PAGE.read_text(encoding="utf-8")
    rows = {(row["suite"], row["backend"]): row for row in results["rows"]}
    assert set(rows) <= {(name, backend) for name in suites.SUITES for backend in suites.BACKENDS}
    assert not any(row["failures"] for row in rows.values())


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "FOLDER", tmp_path)
    assert "--fetch" in run.missing(suites.SUITES["fla-gated-delta-rule"])
    assert "/.peers/" in (ROOT / ".gitignore").read_text().split()
