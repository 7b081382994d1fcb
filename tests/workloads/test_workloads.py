"""Declared calls: they run, they are planned without computing, and their kernels can be listed, read and prepared."""

from __future__ import annotations

import io
import json

import pytest
import torch
from bits import equal
from tiny_spec import TinyConfig, TinySpec

from cute_ssm import arch, runtime, tuning, workloads
from cute_ssm.__main__ import main
from cute_ssm.errors import CuteSsmError
from cute_ssm.ops.selective_state_update import config as selective_step
from cute_ssm.runtime import pool, registry, toolchain
from cute_ssm.workloads import plan
from cute_ssm.workloads.maker import moved
from cute_ssm.workloads.progress import Progress

SMALL = {
    "selective_state_update": {"batch": 2, "nheads": 2, "dstate": 32},
    "selective_scan": {"dim": 8, "length": 12},
    "gated_delta_rule_mtp": {"B": 2, "H": 1, "HV": 2, "K": 64, "V": 64},
    "gated_delta_rule_replay": {"B": 3, "H": 1, "HV": 2, "K": 64, "V": 64},
    "checkpointing_ssu": {"batch": 3, "nheads": 2, "dstate": 64},
    "replay_decode": {"batch": 3, "nheads": 2, "dstate": 64, "W": 4},
}


@pytest.mark.parametrize("op", workloads.OPERATORS)
def test_a_call_runs_and_writes_what_it_says(op):
    call = workloads.build(op, SMALL.get(op, {}))
    before = {name: value.clone() for name, value in call.arguments.items() if isinstance(value, torch.Tensor)}
    call.run()
    changed = {name for name, value in before.items() if not _same(value, call.arguments[name])}
    assert changed <= set(call.written)
    assert call.units > 0
    assert call.floor_bytes > sum(v.nbytes for v in call.results().values()) * 0.3
    again = workloads.build(op, SMALL.get(op, {}))
    inputs = set(before) - set(call.written)
    assert all(_same(before[name], again.arguments[name]) for name in inputs), "seeded"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("op", workloads.OPERATORS)
def test_every_operator_declares_calls_that_its_builder_takes(op):
    declared = workloads.of_operator(op)
    assert declared
    for workload in declared:
        assert {key for key, _ in workload.keys} <= set(workloads.parameters(op))
        assert workloads.batch_key(op) not in dict(workload.keys)
        assert all(batch >= 1 for batch in workload.batches)
        assert op in workload.text()
    assert workloads.description(op)


def test_every_kernel_can_be_reached_by_a_declared_call():
    """A spec that has a kernel but no calls would be left out of warm-up, bundles, tuning and the checks on a GPU."""
    own = {kind.__name__ for kind, path in registry.KERNELS.items() if path.startswith("cute_ssm.")}
    kernels = plan.read("all", [arch.SM_90A], [2])
    assert own <= {type(spec).__name__ for spec, _, _ in kernels}


def test_planning_touches_nothing_and_agrees_with_the_operator():
    target = arch.SM_90A
    with runtime.planned(target, 99) as opened:
        call = workloads.build("selective_state_update", {"batch": 3})
        before = call.arguments["state"].clone()
        call.run()
        equal(call.arguments["state"], before)
        assert runtime.emulator() is opened
    assert runtime.emulator() is None
    ((spec, config, chosen),) = opened.kernels
    assert chosen is target
    assert config == selective_step.choose(spec, target, 3 * 16, 99)
    assert plan.of_call("selective_state_update", {"batch": 3}, target, 99) == opened.kernels


def test_plans_follow_overrides():
    with tuning.override(warps=3):
        ((_, config, _),) = plan.of_call("selective_state_update", {"batch": 3}, arch.SM_90A)
    assert config.warps == 3


@pytest.mark.parametrize("model", workloads.models())
def test_kernels_of_models_are_distinct_and_run_on_their_target(model):
    kernels = plan.read(model, [arch.SM_90A, arch.SM_100A])
    assert len(set(kernels)) == len(kernels) > 1
    for spec, config, target in kernels:
        config.check(spec, target)


def test_a_file_of_specs(tmp_path):
    kernels = plan.read("nemotron-nano", [arch.SM_90A], [4])
    path = tmp_path / "specs.json"
    entries = [plan.as_entry(*kernel) for kernel in kernels]
    path.write_text(json.dumps(entries))
    assert plan.read(str(path), [arch.SM_100A]) == kernels, "an entry's own target holds"
    path.write_text(json.dumps([{"op": "selective_scan", "keys": {"dim": 64}, "batches": [1, 2]}]))
    assert len(plan.read(str(path), [arch.SM_90A])) >= 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting"),
        ("{}", "expected a list"),
        ('[{"op": "no"}]', "entry 0: .*op: expected one of"),
        ('[{"op": "selective_scan", "keys": {"dime": 3}}]', "entry 0: .*dime: expected one of batch, dim"),
        ('[{"op": "selective_scan", "keys": {"dim": "x"}}]', "entry 0: .*dim: expected int"),
        ('[{"spec": {"type": "NoSpec"}, "config": {}}]', "entry 0: .*type: expected one of"),
        ("[3]", "entry 0"),
    ],
)
def test_a_file_that_means_nothing_is_refused(tmp_path, content, message):
    path = tmp_path / "specs.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        plan.read(str(path), [arch.SM_90A])
    with pytest.raises(ValueError, match="all, or one of codestral-mamba"):
        plan.read("no-model", [arch.SM_90A])


@pytest.fixture
def cache(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "sources_changed", lambda: False)
    settings(CACHE_DIR=tmp_path / "cache")
    return tmp_path / "cache"


def test_preparing_compiles_once(cache, settings):
    key = (TinySpec(), TinyConfig(), arch.SM_90A)
    assert runtime.prepare(*key) is True
    assert runtime.prepare(*key) is False
    assert len(list(cache.rglob("*.o"))) == 1
    settings(CACHE="0")
    with pytest.raises(CuteSsmError, match="CUTE_SSM_CACHE: expected 1"):
        runtime.prepare(*key)


def test_warmup_from_the_listing_of_a_cache(cache, tmp_path, capsys):
    runtime.prepare(TinySpec(), TinyConfig(), arch.SM_90A)
    assert main(["cache", "ls", "--json"]) == 0
    listing = tmp_path / "specs.json"
    listing.write_text(capsys.readouterr().out)
    assert main(["cache", "clear"]) == 0
    options = ["warmup", "--specs", str(listing), "--arch", "sm_90a", "--jobs", "1"]
    assert main(options) == 0
    assert "1 kernels, 1 compiled, 0 there before, 0 failed" in capsys.readouterr().out
    assert main(options) == 0
    assert "1 kernels, 0 compiled, 1 there before, 0 failed" in capsys.readouterr().out


def test_warmup_reports_what_does_not_compile(cache, capsys):
    bad = (TinySpec("float64"), TinyConfig(), arch.SM_90A)
    good = (TinySpec(), TinyConfig(), arch.SM_90A)
    outcomes = list(pool.compile_all([bad, good], jobs=1))
    assert [bool(outcome.error) for outcome in outcomes] == [True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--specs", "nothing"], "specs: expected a file"),
        (["--batches", "0"], "--batches: expected positive numbers"),
        (["--jobs", "0"], "--jobs: expected a positive number"),
    ],
)
def test_warmup_refuses_what_means_nothing(cache, options, message, capsys):
    assert main(["warmup", "--arch", "sm_90a", *options]) == 2
    assert message in capsys.readouterr().err


def test_warmup_needs_a_target(cache, capsys):
    if torch.cuda.is_available():
        pytest.skip("the GPU is the target")
    assert main(["warmup"]) == 2
    assert "--arch: expected one of sm_90a" in capsys.readouterr().err


def test_progress_shows_on_terminals_alone():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        progress = Progress(4, stream)
        progress.step("one")
        progress.step("two", 3)
        progress.close()
    assert "4/4" in terminal.getvalue()
    assert file.getvalue() == ""


@pytest.mark.wide
@pytest.mark.parametrize("op", workloads.OPERATORS)
def test_one_kernel_of_every_operator_compiles_without_spills(op):
    first = workloads.of_operator(op, [16])[0]
    for kernel in plan.of_workloads([first], [arch.SM_90A]):
        compiled = runtime.emulated(*kernel)
        assert all(k.spill_bytes == 0 for k in compiled.kernels), kernel


@pytest.mark.slow
@pytest.mark.parametrize("target", arch.ARCHS)
@pytest.mark.parametrize("model", workloads.models())
def test_kernels_of_models_compile_without_spills(model, target):
    for kernel in plan.read(model, [arch.by_name(target)]):
        compiled = runtime.emulated(*kernel)
        assert all(k.spill_bytes == 0 for k in compiled.kernels), kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_moved_tensor_keeps_strides_and_the_alignment_of_its_address(dtype):
    rows = torch.randn(4, 21).to(dtype)
    for tensor in (rows[:, 3:11], rows[1:, ::2], rows[:, :1].expand(4, 6), rows.t(), rows[:0, 1:], torch.tensor(3.0)):
        copy = moved(tensor, "cpu")
        assert copy.shape == tensor.shape and copy.stride() == tensor.stride()
        assert copy.data_ptr() % 16 == tensor.data_ptr() % 16 or not tensor.numel()
        assert torch.equal(copy, tensor) and (copy.data_ptr() != tensor.data_ptr() or not tensor.numel())
