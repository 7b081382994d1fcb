"""Plans of calls on a GPU: bounded under varying sizes; a kernel that refuses leads to the checks.

The GPU is pretended: tensors that say they are on one, and kernels that note their calls.
"""

from __future__ import annotations

import logging
import operator
import sys
from types import SimpleNamespace

import checkpointing_cases
import cursor_cases as cursors
import gdn_cases
import materialize_cases as states
import materialize_gated_cases as gated
import materialize_layers_cases as layers
import pytest
import replay_cases
import replay_decode_cases
import scan_cases
import step_cases
import token_cases
import torch

import cute_ssm
from cute_ssm import arch, ops, runtime, serving, tuning
from cute_ssm.compat import vllm
from cute_ssm.ops import _plans
from cute_ssm.ops.build_work_items import operator as work_items_operator
from cute_ssm.ops.checkpointing_ssu import operator as checkpointing_ssu
from cute_ssm.ops.commit import operator as commit_operator
from cute_ssm.ops.gated_delta_rule_mtp import operator as gated_delta_rule
from cute_ssm.ops.gated_delta_rule_replay import operator as gated_delta_rule_replay
from cute_ssm.ops.materialize import operator as serving_states
from cute_ssm.ops.materialize_gated_delta import operator as gated_states
from cute_ssm.ops.materialize_layers import operator as layered_states
from cute_ssm.ops.replay_decode import operator as replay_decode
from cute_ssm.ops.selective_scan import operator as selective_scan
from cute_ssm.ops.selective_state_update import operator as step

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


def layered(batch):
    layered.memory = layers.made(layers.Case(heads=4 * batch))  # the call holds addresses alone
    return layered.memory.call


# operator -> its module, the function, arguments of a batch, and the tensors that it asks where they are
CALLS = {
    "selective_state_update": (
        step,
        cute_ssm.selective_state_update,
        lambda batch: step_cases.arguments(step_cases.Case(batch=batch)),
        ("state",),
    ),
    "checkpointing_ssu": (
        checkpointing_ssu,
        cute_ssm.checkpointing_ssu,
        lambda batch: checkpointing_cases.arguments(checkpointing_cases.Case(batch=batch, pads=())),
        ("state",),
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
    "replay_decode": (
        replay_decode,
        vllm.selective_state_update_replayssm_output_only,
        lambda batch: replay_decode_cases.arguments(replay_decode_cases.BASE, positions=[1] * batch),
        ("state",),
    ),
    "selective_scan": (selective_scan, cute_ssm.selective_scan, scan, ("u",)),
    "serving.materialize": (serving_states, serving.materialize, materialize, ("state",)),
    "serving.materialize_layers": (
        layered_states,
        serving.materialize_layers,
        layered,
        ("state_ptrs",),
    ),
    "serving.materialize_gated_delta": (
        gated_states,
        serving.materialize_gated_delta,
        lambda batch: gated.arguments(gated.Case(batch=batch, pads=())),
        ("initial_state",),
    ),
    "serving.commit": (commit_operator, serving.commit, commit, ("prev_num_accepted_tokens",)),
    "serving.build_work_items": (work_items_operator, serving.build_work_items, build, ("prev_num_accepted_tokens",)),
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
        monkeypatch.setattr(module._path, "plans", _plans.Plans())
        monkeypatch.setattr(module._path, "loose_plans", _plans.Plans())
    return kernel


def run(name, batch):
    module, function, arguments, where = CALLS[name]
    call = arguments(batch)
    function(**{key: value.as_subclass(OnGpu) if key in where else value for key, value in call.items()})
    return module._path.plans


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
def test_a_list_is_refused_by_name_after_a_call_whose_plan_holds_for_its_layout(name, kernel, monkeypatch):
    module, function, arguments, where = CALLS[name]
    monkeypatch.setattr(module._path, "loose_plans", {"of another call": None})
    for argument, value in arguments(2).items():
        if isinstance(value, torch.Tensor) and argument not in where:
            call = {**arguments(2), argument: value.tolist()}
            with pytest.raises(TypeError, match=rf"{argument}: expected a torch\.Tensor.*, got list"):
                function(**call)


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


def test_the_plans_of_every_operator_are_bounded_ones_and_tested_here():
    tested = {module.__name__ for module, *_ in CALLS.values()}
    for one in ops.operators():
        path = one.module("operator")._path
        assert type(path.plans) is type(path.loose_plans) is _plans.Plans, one.name
        assert f"{one.package}.operator" in tested


# -------------------------------------------------------------------------------------------------------------- factors
class Keys(_plans.Plans):
    """Notes what is looked up, and knows nothing."""

    def get(self, key, default=None):
        self.last = key
        return default


def key_of(name, call, monkeypatch):
    module, function, _, where = CALLS[name]
    keys = Keys()
    monkeypatch.setattr(module._path, "plans", keys)
    function(**{key: value.as_subclass(OnGpu) if key in where else value for key, value in call.items()})
    assert keys.last is not None
    return keys.last


STATES = [
    {"state": "bf16"}, {"state": "i8"}, {"out": "f16"}, {"inputs": "f16"}, {"A": torch.bfloat16}, {"history": "ring"},
    {"history": "double_x"}, {"rows": 12}, {"heads": 4}, {"heads": 2, "groups": 2}, {"dim": 32}, {"dstate": 64},
    {"counts": False}, {"indices": torch.int64},
]  # fmt: skip


@pytest.mark.parametrize("change", STATES, ids=str)
def test_every_factor_is_in_the_key_of_materialize(change, kernel, monkeypatch):
    keys = [
        key_of("serving.materialize", states.random(states.Case(**fields), 0)["call"], monkeypatch)
        for fields in ({}, change)
    ]
    assert keys[0] != keys[1]


def test_seeds_and_rounds_are_in_the_key_of_materialize(kernel, monkeypatch):
    base = {"state": "bf16", "seeds": "one"}
    cases = [base, {"state": "bf16"}, {**base, "rounds": 4}, {**base, "seeds": "slots"}]
    calls = [states.random(states.Case(**fields), 0)["call"] for fields in cases]
    assert len({key_of("serving.materialize", call, monkeypatch) for call in calls}) == len(cases)


GATED = [
    {"state": "bf16"}, {"io": "f16"}, {"to": "bf16"}, {"heads": 2}, {"ratio": 1}, {"K": 128}, {"V": 128},
    {"window": 24}, {"spare": 4}, {"batch": 4}, {"counts": None}, {"indices": torch.int64}, {"l2norm": False},
    {"strided": True},
]  # fmt: skip


@pytest.mark.parametrize("change", GATED, ids=str)
def test_every_factor_is_in_the_key_of_materialize_gated_delta(change, kernel, monkeypatch):
    keys = [
        key_of("serving.materialize_gated_delta", gated.arguments(gated.Case(**fields)), monkeypatch)
        for fields in ({}, change)
    ]
    assert keys[0] != keys[1]


def test_fewer_slots_than_packed_tokens_are_refused_after_a_call_with_enough(kernel):
    """No entry compares ``max_seqlen`` with a tensor, so that the kernel would read slots beyond the row."""
    call = gdn_cases.arguments(gdn_cases.Case(batch=2, tokens=4, lengths=(4, 3), pads=(), mode="scatter"))
    call["q"] = call["q"].as_subclass(OnGpu)
    cute_ssm.gated_delta_rule_mtp(**call)
    call["ssm_state_indices"] = call["ssm_state_indices"][:, :2]
    with pytest.raises(ValueError, match="ssm_state_indices: expected shape"):
        cute_ssm.gated_delta_rule_mtp(**call)
    assert kernel.calls == 1


@pytest.mark.parametrize("name", ["serving.commit", "serving.build_work_items"])
@pytest.mark.parametrize("change", [{"ring": True}, {"varlen": True}, {"indices": torch.int64}, {"indexed": False}])
def test_every_factor_is_in_the_key_of_cursors(name, change, kernel, monkeypatch):
    keys = []
    for fields in ({}, change):
        call, counts = cursors.arguments(cursors.Case(**fields))
        if name == "serving.commit":
            call["num_accepted_tokens"] = counts.int()
        elif not fields.get("indexed", True):
            call["batch"] = len(counts)
        keys.append(key_of(name, call, monkeypatch))
    assert keys[0] != keys[1]


def test_further_factors_of_cursors(kernel, monkeypatch):
    """Counts of another type, seeds, and batches for which the list of work is built by another config."""
    call, counts = cursors.arguments(cursors.Case())
    call["num_accepted_tokens"] = counts.int()
    base = key_of("serving.commit", call, monkeypatch)
    assert base != key_of("serving.commit", {**call, "num_accepted_tokens": counts.long()}, monkeypatch)
    seeds = torch.zeros(2, len(call["prev_num_accepted_tokens"]), dtype=torch.int64)
    assert base != key_of("serving.commit", {**call, "rand_seed": seeds}, monkeypatch)
    few, many = (cursors.arguments(cursors.Case(batch=n))[0] for n in (128, 129))
    few, many = (key_of("serving.build_work_items", call, monkeypatch) for call in (few, many))
    assert few != many


# ------------------------------------------------------------------------------------------------------------------ fit
def signature(tensor):
    """What an entry checks of a tensor: its type, whether dimensions are tied (0), packed (1) or apart, alignment."""
    if tensor is None:
        return None, (), 0
    size = tensor.element_size()
    bits = 16 | tensor.data_ptr()
    for stride in tensor.stride()[:-1]:
        bits |= stride * size
    kinds, packed = [], 1
    for extent, stride in zip(reversed(tensor.shape), reversed(tensor.stride())):
        kinds.append(0 if stride == 0 else 1 if stride == packed else 2)
        packed *= extent
    return tensor.dtype, tuple(kinds), bits & -bits


class Entry:
    """A compiled kernel whose entry refuses other types, freer strides and less alignment than those of its first call.

    One that was compiled for freer strides, or for less alignment, would take what is packed and aligned.
    """

    def __init__(self, made_for, launched):
        self.made_for, self.launched, self.first = made_for, launched, None

    def __call__(self, *arguments):
        got = [signature(a) for a in arguments if a is None or isinstance(a, torch.Tensor)]
        self.first = self.first or got
        for (dtype, kinds, bits), (wanted, freest, least) in zip(got, self.first):
            if dtype != wanted or len(kinds) != len(freest) or bits < least or any(map(operator.gt, kinds, freest)):
                raise ValueError("Mismatched argument")
        self.launched.append(self.made_for)


def changes(call):
    """(name, value) for calls in which one argument is another: its type, its strides, whether it is given, a flag."""
    for name, value in call.items():
        if isinstance(value, bool):
            yield name, not value
        elif isinstance(value, int):
            yield name, value + 1
        if not isinstance(value, torch.Tensor):
            continue
        yield name, None
        family = (
            (torch.float32, torch.bfloat16, torch.float16) if value.is_floating_point() else (torch.int32, torch.int64)
        )
        for dtype in {*family} - {value.dtype}:
            other = torch.empty_strided(value.shape, value.stride(), dtype=dtype).zero_()
            yield name, other
        for more in (1, 8, 16):
            wide = torch.zeros(*value.shape[:-1], value.shape[-1] + more, dtype=value.dtype)
            yield name, wide[..., : value.shape[-1]]
            if more == 1:
                yield name, wide[..., 1:]
        if 0 in value.stride():
            yield name, value.contiguous()


TOKENS = token_cases.Tokens(
    packed=True, lengths=(3, 1), pads=(), destination="matrix", accepted=True, state="i8", rounds=5, cache_steps=3
)
FITTED = {
    "selective_state_update": [
        step_cases.Case(), step_cases.Case(layout="dense", strided=True),
        step_cases.Case(separate=True, state="bf16"), TOKENS,
    ],
    "checkpointing_ssu": [
        checkpointing_cases.Case(pads=()), checkpointing_cases.Case(pads=(), shift=1),
        checkpointing_cases.Case(pads=(), items=True, rounds=5),
    ],
    "gated_delta_rule_mtp": [
        gdn_cases.Case(pads=(), mode=mode, strided=mode == "split")
        for mode in ("update", "buffer", "scatter", "split", "accepted")
    ],
    "gated_delta_rule_replay": [replay_cases.Case(pads=()), replay_cases.Case(pads=(), strided=True)],
    "selective_scan": [
        scan_cases.Case(lengths=(8, 8), nulls=(), in_place=False, layout=layout)
        for layout in ("packed", "odd")
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in FITTED.items() for case in cases], ids=str)
def test_a_call_runs_the_kernel_of_its_own_kind_whatever_plans_there_are(name, case, kernel, monkeypatch):
    """A call beside one that differs in one argument: each runs what it runs alone, in either order."""
    module, function, _, where = CALLS[name]
    monkeypatch.setattr(_plans, "MOST_PLANS", 4096)
    launched = []

    def get(spec, config, target):
        entry = entries.setdefault((spec, config), Entry((spec, config), launched))
        entry.first = None  # takes what it was asked for
        return entry

    def ran(call):
        launched.clear()
        try:
            with torch.no_grad():
                function(**{n: v.as_subclass(OnGpu) if n in where and v is not None else v for n, v in call.items()})
        except (TypeError, ValueError) as error:
            return str(error).partition(":")[0]
        return tuple(launched)

    monkeypatch.setattr(runtime, "get", get)
    base = sys.modules[type(case).__module__].arguments(case)
    legal = 0
    for changed, value in changes(base):
        other = {**base, changed: value}
        alone = []
        for call in (base, other):
            entries = {}
            module._path.plans.clear()
            module._path.loose_plans.clear()
            alone.append(ran(call))
        assert alone[0] and not isinstance(alone[0], str), alone[0]
        legal += not isinstance(alone[1], str)
        for order in ((0, 1, 0), (1, 0, 1)):
            entries = {}
            module._path.plans.clear()
            module._path.loose_plans.clear()
            for which in order:
                assert ran((base, other)[which]) == alone[which], (changed, order)
    assert legal > 10


@pytest.mark.parametrize("name", FITTED)
def test_calls_at_two_alignments_share_a_key_and_both_have_plans(name, kernel, monkeypatch):
    """An aligned call does not even look at layouts; another one is found after the aligned plan has refused."""
    module, function, build, where = CALLS[name]
    launched, entries = [], {}

    def get(spec, config, target):
        return entries.setdefault(spec, Entry(spec, launched))

    def run(call):
        function(**{n: v.as_subclass(OnGpu) if n in where else v for n, v in call.items()})
        return launched[-1]

    monkeypatch.setattr(runtime, "get", get)
    base = build(2)
    changed = {"selective_state_update": "B", "checkpointing_ssu": "x"}.get(name, where[0])
    inner = base[changed].shape[-2 if name == "checkpointing_ssu" else -1 :]
    wide = torch.zeros(*base[changed].shape[: -len(inner)], inner.numel() + 1, dtype=base[changed].dtype)
    other = {**base, changed: wide[..., :-1].unflatten(-1, inner)}
    kinds = [run(base), run(other)]
    assert kinds[0] != kinds[1]
    monkeypatch.setattr(runtime, "get", lambda *_: pytest.fail("there is a plan"))
    assert [run(call) for call in (base, other, base, other)] == kinds * 2
    monkeypatch.setattr(module._path, "layout", lambda *_: pytest.fail("an aligned call has no need"))
    assert run(base) == kinds[0]


@pytest.mark.parametrize("name", CALLS)
def test_only_what_an_entry_raises_is_a_refusal(name, kernel, monkeypatch):
    """A fault in what runs a plan must not become a slow path that nobody sees."""
    run(name, 2)

    faults = [AttributeError("a fault")]

    def broken_once(*_):
        if faults:
            raise faults.pop()

    monkeypatch.setattr(Kernel, "__call__", broken_once)
    with pytest.raises(AttributeError, match="a fault"):
        run(name, 2)


@pytest.mark.parametrize("name", CALLS)
def test_the_log_says_once_that_plans_refuse_what_is_right(name, kernel, settings, caplog):
    log = logging.getLogger("cute_ssm")
    level = log.level
    try:
        settings(LOG="compile")
        for _ in range(3):
            run(name, 2)
            assert not caplog.records
        for _ in range(2):
            kernel.refuses = 1
            run(name, 2)
        assert [record.getMessage().startswith("a plan refused") for record in caplog.records] == [True]
    finally:
        log.setLevel(level)
