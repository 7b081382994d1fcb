"""Plans of calls on a GPU: bounded, whatever sizes come and go; a kernel that refuses leads to the checks.

The GPU is pretended: tensors that say they are on one, and kernels that note their calls.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import checkpointing_cases
import gdn_cases
import pytest
import replay_cases
import scan_cases
import step_cases
import torch
from serving import test_serving_cursors as cursors
from serving import test_serving_materialize as states

import cute_ssm
from cute_ssm import arch, runtime, serving, tuning
from cute_ssm.ops import _plans, checkpointing_ssu, gated_delta_rule, gated_delta_rule_replay, selective_scan
from cute_ssm.ops import selective_state_update as step
from cute_ssm.serving import cursors as serving_cursors
from cute_ssm.serving import states as serving_states

MOST = 3


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = True


def scan(batch):
    return scan_cases.arguments(scan_cases.Case(lengths=(8,) * batch, nulls=(), in_place=False, layout="packed"))


def build(batch):
    call, _ = cursors.arguments(cursors.Case(batch=batch))
    return call


def commit(batch):
    call, counts = cursors.arguments(cursors.Case(batch=batch))
    return {**call, "num_accepted_tokens": counts.int()}


def materialize(batch):
    return states.random(states.Case(heads=batch), 0)["call"]


# operator -> its module, the function, arguments of a batch, and the tensors that it asks where they are
CALLS = {
    "selective_state_update": (
        step,
        cute_ssm.selective_state_update,
        lambda batch: step_cases.arguments(step_cases.Case(batch=batch)),
        ("x",),
    ),
    "checkpointing_ssu": (
        checkpointing_ssu,
        cute_ssm.checkpointing_ssu,
        lambda batch: checkpointing_cases.arguments(checkpointing_cases.Case(batch=batch, pads=())),
        ("x",),
    ),
    "gated_delta_rule_mtp": (
        gated_delta_rule,
        cute_ssm.gated_delta_rule_mtp,
        lambda batch: gdn_cases.arguments(gdn_cases.Case(batch=batch, pads=())),
        ("q",),
    ),
    "gated_delta_rule_replay": (
        gated_delta_rule_replay,
        cute_ssm.gated_delta_rule_replay,
        lambda batch: replay_cases.arguments(replay_cases.Case(batch=batch, pads=())),
        ("q",),
    ),
    "selective_scan": (selective_scan, cute_ssm.selective_scan, scan, ("u",)),
    "serving.materialize": (serving_states, serving.materialize, materialize, ("state",)),
    "serving.commit": (serving_cursors, serving.commit, commit, ("prev_num_accepted_tokens",)),
    "serving.build_work_items": (serving_cursors, serving.build_work_items, build, ("prev_num_accepted_tokens",)),
}


class Kernel:
    """Notes its calls, or refuses as a kernel's entry does."""

    def __init__(self):
        self.calls, self.refuses = 0, 0

    def __call__(self, *arguments):
        if self.refuses:
            self.refuses -= 1
            raise ValueError("Mismatched strides")
        self.calls += 1


@pytest.fixture
def kernel(monkeypatch):
    kernel = Kernel()
    monkeypatch.setattr(_plans, "MOST_PLANS", MOST)
    monkeypatch.setattr(runtime, "get", lambda *_: kernel)
    monkeypatch.setattr(runtime, "target", lambda *_: arch.SM_90A)
    facts = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: facts)
    for module in {module for module, *_ in CALLS.values()}:
        monkeypatch.setattr(module, "_plans", _plans.Plans())
    monkeypatch.setattr(step, "_loose_plans", _plans.Plans())
    return kernel


def run(name, batch):
    module, function, arguments, where = CALLS[name]
    call = arguments(batch)
    function(**{key: value.as_subclass(OnGpu) if key in where else value for key, value in call.items()})
    return module._plans


@pytest.mark.parametrize("name", CALLS)
def test_plans_stay_bounded_under_varying_sizes(name, kernel):
    for batch in range(1, 2 * MOST + 2):
        assert 1 <= len(run(name, batch)) <= MOST
    assert kernel.calls == 2 * MOST + 1, "every call has run"


@pytest.mark.parametrize("name", CALLS)
def test_a_plan_is_used_again_and_a_refusal_leads_to_the_checks(name, kernel, monkeypatch):
    run(name, 2)
    monkeypatch.setattr(runtime, "get", lambda *_: pytest.fail("there is a plan"))
    run(name, 2)
    assert kernel.calls == 2
    kernel.refuses = 1
    monkeypatch.setattr(runtime, "get", lambda *_: kernel)
    run(name, 2)
    assert kernel.calls == 3 and not kernel.refuses


@pytest.mark.parametrize("name", CALLS)
def test_no_plan_of_an_overridden_config_is_kept(name, kernel):
    with tuning.override():
        assert not run(name, 2)
    assert kernel.calls == 1


@pytest.mark.parametrize("name", CALLS)
def test_the_log_says_that_the_reference_runs_a_call(name, settings, caplog):
    _, function, arguments, _ = CALLS[name]
    log = logging.getLogger("cute_ssm")
    level = log.level
    try:
        for wanted, lines in (("off", 0), ("compile", 1), ("calls", 3)):
            caplog.clear()
            settings(LOG=wanted)
            for _ in range(2):
                function(**arguments(2))
            assert len(caplog.records) == lines, caplog.text
            if lines:
                assert caplog.text.count("the reference runs CPU tensors outside ptxsim.emulate()") == 1
    finally:
        log.setLevel(level)


def test_the_plans_of_every_module_are_bounded_ones():
    for module, *_ in CALLS.values():
        assert type(module._plans) is _plans.Plans
    assert type(step._loose_plans) is _plans.Plans
