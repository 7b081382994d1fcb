"""tools/gpu_calls.py: the calls of a GPU pass, and the kernels that its kit holds."""

from __future__ import annotations

import dataclasses
import subprocess

import gpu_calls
import pytest
from gpu_pass.calls import on_device

from cute_ssm import arch, runtime, workloads
from cute_ssm.ops.checkpointing_ssu.config import DYNAMIC, FUSED, PAIR
from cute_ssm.runtime import registry
from cute_ssm.workloads import plan

TARGET = arch.SM_90A


@pytest.fixture(scope="module")
def kernels():
    return set(gpu_calls.kernels(TARGET))


def test_every_operator_is_called_in_every_way():
    for calls in (gpu_calls.modes(), gpu_calls.checked(), gpu_calls.timed()):
        assert {call.op for call in calls} == set(workloads.OPERATORS)
    assert {problem.case.op for problem in gpu_calls.tuned(TARGET)} == set(workloads.OPERATORS)


def test_every_type_of_states_and_inputs_is_called():
    """Of each type that an operator's specs take, in the calls of its modes."""
    for op in workloads.OPERATORS:
        specs = [spec for spec, _, _ in gpu_calls.of_calls(gpu_calls.modes(op), TARGET)]
        refused = []
        for field in ("state_dtype", "input_dtype"):
            taken = {str(getattr(spec, field)) for spec in specs}
            for dtype in ("bfloat16", "float16", "float32", "int16", "int8", "float8_e4m3fn"):
                try:
                    dataclasses.replace(specs[0], **{field: dtype}).check()
                except ValueError:
                    refused.append(dtype)
                else:
                    assert dtype in taken, f"{op} {field}"
        assert refused, op


def test_batches_are_timed_from_one_request_to_many():
    for op in workloads.OPERATORS:
        batches = {call.keys[workloads.batch_key(op)] for call in gpu_calls.timed(op)}
        assert batches == set(gpu_calls.BATCHES) or batches == {1, 2, 4, 8}


def test_a_call_that_waits_for_the_kernel_ahead_has_a_kernel_of_its_own():
    specs = [spec for spec, _, _ in gpu_calls.of_calls(gpu_calls.dependent(), TARGET)]
    assert {spec.pdl for spec in specs} == {"wait_first", "early_reads"}


def test_calls_that_are_moved_run_the_kernels_of_the_bundle(kernels):
    """A copy with other strides, or at an address of another alignment, could need others."""
    for made in [*gpu_calls.modes(), *gpu_calls.checked()]:
        with runtime.planned(TARGET) as planned:
            on_device(made.build(fill=False), "cpu").run()
        assert set(planned.kernels) <= kernels, made.text()


def test_candidates_are_distinct_valid_configs_and_the_rules_is_the_first():
    for problem in gpu_calls.tuned(TARGET):
        found = gpu_calls.candidates(problem)
        assert found[0] == problem.rule()
        assert all(problem.valid(fields) for fields in found)
        assert len({tuple(fields.items()) for fields in found}) == len(found)
        assert 8 <= len(found) <= gpu_calls.CANDIDATES


def test_kernels_are_those_of_the_calls_and_of_what_an_engine_runs_around_them(kernels):
    for calls in (gpu_calls.modes(), gpu_calls.checked(), gpu_calls.timed(), gpu_calls.dependent()):
        assert set(gpu_calls.of_calls(calls, TARGET)) <= kernels
    own = {kind for kind, path in registry.KERNELS.items() if path.startswith(("cute_ssm.", "gpu_pass."))}
    assert {type(spec) for spec, _, _ in kernels} == own


def test_a_file_of_specs_holds_the_kernels_for_each_number_of_sms(kernels, monkeypatch, tmp_path, capsys):
    """An H100 has 132 or 114, and of some calls the config depends on it."""
    own = (*plan.of_call("selective_state_update", {"dstate": 32}, TARGET),)
    asked = []
    monkeypatch.setattr(gpu_calls, "tested", lambda arch, sms: asked.append((arch, sms)) or list(own))
    out = tmp_path / "kernels.json"
    assert gpu_calls.main([str(out)]) == 0 and not asked
    assert set(plan.read(str(out), [TARGET])) == kernels
    assert f"{len(kernels)} kernels for sm_90a" in capsys.readouterr().out
    assert gpu_calls.main([str(out), "--sms", "132", "114", "--tests"]) == 0
    fewer = set(gpu_calls.kernels(TARGET, 114))
    assert fewer - kernels and not set(own) & kernels
    assert set(plan.read(str(out), [TARGET])) == kernels | fewer | set(own)
    assert asked == [(TARGET, 132), (TARGET, 114)]


def test_kernels_of_tests_are_those_that_they_run_on_such_a_gpu():
    """Of calls by the fixture, and on CUDA tensors, also where the test is a long one."""
    forms = "checkpointing_ssu/test_checkpointing_ssu_gpu.py::test_forms_and_repetitions_have_the_same_bits[f32-37]"
    configs = "commit/test_commit_and_build_work_items.py::test_bits_do_not_depend_on_the_config"
    small = "tests/test_gpu.py::test_a_call_in_steady_state_does_not_synchronise"
    second = "tests/ops/test_serving_gpu.py::test_cursors"  # of each test the second call, behind a comparison
    found = set(gpu_calls.tested(TARGET, 114, [small, second, f"tests/ops/{forms}", f"tests/ops/{configs}"]))
    for op in workloads.OPERATORS:
        made = gpu_calls.Made(op, {**workloads.small(op), workloads.batch_key(op): 3})
        assert set(gpu_calls.of_calls([made], TARGET, 114)) <= found, op
    assert {config.form for spec, config, _ in found if spec.op == "checkpointing_ssu"} >= {FUSED, DYNAMIC, PAIR}
    commits = [(spec, config) for spec, config, _ in found if spec.op == "serving_commit"]
    assert {config.warps for _, config in commits} >= {1, 2, 32}
    assert {(spec.ring, spec.cu_dtype) for spec, _ in commits} == {(False, None), (True, None), (False, "int32")}
    assert all(target == TARGET for _, _, target in found)


def test_tests_that_do_not_run_are_no_empty_list(monkeypatch):
    refused = subprocess.CompletedProcess([], 4, "", "gpushim needs a build of PyTorch without CUDA")
    monkeypatch.setattr(gpu_calls.subprocess, "run", lambda *_, **__: refused)
    with pytest.raises(RuntimeError, match="the tests do not run on a GPU of gpushim:\ngpushim needs a build"):
        gpu_calls.tested(TARGET, 132)


def test_the_tests_of_a_pass_exist():
    assert all((gpu_calls.ROOT / path).exists() for path in gpu_calls.tests())
