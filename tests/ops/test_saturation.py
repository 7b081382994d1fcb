"""The option of all operators that write float16 states: +-65504 instead of infinities, in reference and kernel."""

from __future__ import annotations

import contextlib
import dataclasses

import checkpointing_cases
import pytest
import replay_decode_cases as decode_cases
import torch
from memory import copy

import cute_ssm
import ptxsim
from cute_ssm import serving
from cute_ssm import spec as specs
from cute_ssm.compat import vllm
from cute_ssm.ops.replay_decode.spec import ReplayDecodeSpec
from cute_ssm.reference import rounding

NAN, INF = float("nan"), float("inf")
# what is added to states of 65504, -65504 and 0; up to 16 it makes nothing infinite when rounded to nearest
ADDED = (0, 8, 15, 16, 24, 32, 2.0**17, 2.0**100, NAN, INF)
VALUES = (0.0, 1.0, 65504.0, 65519.0, 65520.0, 65536.0, 1e30, INF, NAN)
ROUNDINGS = {"nearest": {}, "stochastic": {"rand_seed": torch.tensor([1234567]), "philox_rounds": 10}}


def added(columns, dtype, infinite=True):
    """Columns of B.  Of infinite ones, tensor cores make NaN where the reference has infinities: they are left out."""
    values = [value for value in ADDED if infinite or value != INF]
    values = torch.tensor([*values, *(-value for value in values)]).to(dtype)
    return values.repeat(-(-columns // len(values)))[:columns]


def extremes(*shape):
    """States, (..., rows, columns), of which rows are 65504, -65504 or 0."""
    rows = torch.tensor([65504.0, -65504.0, 0.0]).repeat(shape[-2])[: shape[-2], None]
    return rows.expand(shape).to(torch.float16).contiguous()


def step(tokens, state=torch.float16, **options):
    """`selective_state_update` without decay: the first token adds B to every row."""
    lead, dtype = ((1,) if tokens == 1 else (1, tokens)), torch.float32 if tokens == 1 else torch.bfloat16
    x, B = torch.zeros(*lead, 1, 16, dtype=dtype), torch.zeros(*lead, 1, 64, dtype=dtype)
    x.view(-1, 16)[0], B.view(-1, 64)[0] = 1, added(64, dtype)
    call = {
        "state": extremes(1, 1, 16, 64).to(state), "x": x, "dt": torch.ones(*lead, 1, 1).expand(*lead, 1, 16),
        "A": torch.zeros(1, 1, 1).expand(1, 16, 64), "B": B, "C": torch.zeros_like(B),
    }  # fmt: skip
    if tokens > 1:
        call["intermediate_states_buffer"] = torch.zeros(1, tokens, 1, 16, 64, dtype=state)
    return cute_ssm.selective_state_update, call | options, ("state", "intermediate_states_buffer")


def history(kind, state="f16"):
    """A `checkpointing_ssu` whose only pending token adds B, and whose step writes."""
    case = checkpointing_cases.Case(
        batch=1, tokens=2, window=2, accepted=(1,), nheads=1, dim=16, state=state, history=kind, softplus=False,
        indices=None, pads=(), has_z=False, dt_bias=None, D=None, fill="nan",
    )  # fmt: skip
    call = checkpointing_cases.arguments(case)
    call["A"] = torch.zeros(1, 1, 1).expand_as(call["A"])
    (slot, _, cursor), *_ = checkpointing_cases.slots_of(case, call)
    x, B, dt = checkpointing_cases.place(case, slot, cursor, 0)
    names = case.names
    call[names[0]][x], call[names[1]][B], call[names[2]][dt] = 1, added(64, torch.bfloat16, False), 1
    if state == "f16":
        call["state"][slot] = extremes(1, 16, 64)
    return case, call


def checkpointed(kind, state="f16", **options):
    case, call = history(kind, state)
    function = cute_ssm.checkpointing_ssu_ring if case.ring else cute_ssm.checkpointing_ssu
    return function, call | options, ("state",)


def scan(state=torch.float16, **options):
    u, B = torch.zeros(1, 16, 3, dtype=torch.float16), torch.zeros(1, 16, 3, dtype=torch.float16)
    u[..., 0], B[..., 0] = 1, added(20, torch.float16)[4:20].clamp(-60000, 60000)
    call = {
        "u": u, "ssm_states": extremes(1, 16, 16).to(state), "delta": torch.ones_like(u), "A": torch.zeros(16, 16),
        "B": B, "C": torch.zeros_like(B), "has_initial_state": torch.tensor([True]),
        "cache_indices": torch.tensor([0], dtype=torch.int32), "null_block_id": -1,
    }  # fmt: skip
    return cute_ssm.selective_scan, call | options, ("ssm_states",)


def gated_tokens(dtype=torch.bfloat16):
    """k and v of two tokens: the first replaces column 0 of an empty state by its values, the second does nothing."""
    k, v = torch.zeros(1, 2, 1, 64, dtype=dtype), torch.zeros(1, 2, 1, 64, dtype=dtype)
    k[0, 0, 0, 0] = 1
    v[0, 0, 0] = torch.tensor([0.0, 65280, 65536, 1e30, -65280, -65536, -1e30, 1]).repeat(8)
    return k, v


def gated(buffer=False, state=torch.float16, **options):
    k, v = gated_tokens()
    call = {
        "q": k.clone(), "k": k, "v": v, "initial_state": torch.zeros(1, 1, 64, 64, dtype=state),
        "initial_state_indices": torch.tensor([0]), "A_log": torch.full((1,), -100.0), "a": torch.zeros(1, 2, 1),
        "dt_bias": torch.zeros(1), "b": torch.full((1, 2, 1), 200.0), "use_qk_l2norm": False,
        "disable_state_update": False,
    }  # fmt: skip
    if buffer:
        call["intermediate_states_buffer"] = torch.zeros(1, 2, 1, 64, 64, dtype=state)
    return cute_ssm.gated_delta_rule_mtp, call | options, ("initial_state", "intermediate_states_buffer")


def rings(state=torch.float16):
    """The tokens of `gated_tokens` pending in rings of three rows."""
    k, v = gated_tokens()
    k_cache, v_cache = (torch.cat([x, x[:, :1]], 1).transpose(1, 2).contiguous() for x in (k, v))
    return {
        "initial_state": torch.zeros(1, 1, 64, 64, dtype=state), "k_cache": k_cache, "v_cache": v_cache,
        "g_cache": torch.zeros(1, 1, 3), "beta_cache": torch.ones(1, 1, 3),
        "ring_start": torch.zeros(1, dtype=torch.int32),
        "prev_num_accepted_tokens": torch.tensor([2], dtype=torch.int32),
    }  # fmt: skip


def replay(state=torch.float16, **options):
    call = gated(state=state)[1]
    call = {n: t[:, :1] if n in ("q", "k", "v", "a", "b") else t for n, t in call.items() if n[0] != "d" or n[1] == "t"}
    return cute_ssm.gated_delta_rule_replay, call | rings(state) | {"window": 2} | options, ("initial_state",)


def between_pools(**options):
    """`materialize` of no token, from a float32 pool to one of float16."""
    values = torch.tensor([*VALUES, *(-value for value in VALUES)]).repeat(64)[: 16 * 64].view(1, 1, 16, 64)
    _, call = history("double")
    call = {
        "state": values.expand(len(call["state"]), -1, -1, -1).contiguous(),
        "x_history": call["old_x"], "B_history": call["old_B"], "dt_history": call["old_dt"], "A": call["A"],
        "prev_num_accepted_tokens": torch.zeros_like(call["prev_num_accepted_tokens"]),
        "cache_buf_idx": torch.zeros_like(call["cache_buf_idx"]), "out": torch.zeros(1, 1, 16, 64, dtype=torch.float16),
        "state_batch_indices": torch.tensor([0]), "dst_state_batch_indices": torch.tensor([0]),
    }  # fmt: skip
    return serving.materialize, call | options, ("out",)


def folded(**options):
    """`materialize` of one token in place."""
    case, call = history("ring")
    (slot, *_), *_ = checkpointing_cases.slots_of(case, call)
    names = {"x_history": "x_cache", "B_history": "B_cache", "dt_history": "dt_cache"}
    call = {
        **{n: call[n] for n in ("state", "A", "prev_num_accepted_tokens", "ring_start")},
        **{n: call[m] for n, m in names.items()},
        "state_batch_indices": torch.tensor([slot]), "dst_state_batch_indices": torch.tensor([slot]),
    }  # fmt: skip
    return serving.materialize, call | options, ("state",)


def gated_between_pools(**options):
    rows = {name: torch.tensor([0]) for name in ("state_batch_indices", "dst_state_batch_indices")}
    call = rings(torch.float32) | rows | {"use_qk_l2norm": False, "window": 2}
    call["out"] = torch.zeros(1, 1, 64, 64, dtype=torch.float16)
    return serving.materialize_gated_delta, call | options, ("out",)


def decode(state="f16", **options):
    """vLLM's one-token replay without decay or history: a flush of a token that adds B."""
    case = decode_cases.Case(state=state, groups=1, heads=1, dim=16, dstate=64, softplus=False, bias=False)
    call = decode_cases.arguments(case, positions=[0, 0])
    flushed = int(call["state_batch_indices"][0])
    call |= {"A": torch.zeros(1, 1, 1).expand_as(call["A"]), "dt": torch.ones(2, 1, 1).expand_as(call["dt"])}
    call["is_flush"].fill_(True)
    call["x"].fill_(1), call["B"].copy_(added(64, torch.bfloat16))
    if state == "f16":
        call["state"][flushed] = extremes(1, 16, 64)
    if "rand_seed" in options:
        options |= {"enable_stochastic_rounding": True, "cache_philox_rounds": options.pop("philox_rounds")}
    return vllm.selective_state_update_replayssm_output_only, call | options, ("state",)


CALLS = {
    "step": lambda **o: step(1, **o),
    "tokens": lambda **o: step(3, **o),
    "checkpointing": lambda **o: checkpointed("double", **o),
    "ring": lambda **o: checkpointed("ring", **o),
    "scan": scan,
    "gated": gated,
    "gated-buffer": lambda **o: gated(True, **o),
    "replay": replay,
    "decode": decode,
    "materialize": folded,
    "materialize-pools": between_pools,
    "materialize-gated": gated_between_pools,
}
SEEDED = ("step", "tokens", "checkpointing", "ring", "decode", "materialize", "materialize-pools")
CASES = [(name, way) for name in CALLS for way in ROUNDINGS if way == "nearest" or name in SEEDED]
ALWAYS = [("step", "nearest"), ("checkpointing", "stochastic"), ("scan", "nearest"), ("gated", "nearest")]


def run(name, way, arch=None, **options):
    """Written states, flat, by the reference or in the emulator; and the instructions that were issued."""
    function, call, written = CALLS[name](**ROUNDINGS[way], **options)
    with ptxsim.emulate(arch=arch, counters=True) if arch else contextlib.nullcontext() as session:
        function(**call)
    states = torch.cat([call[n].flatten() for n in written if call.get(n) is not None])
    slots = sum(launch.counters.as_dict()["instructions"]["total"] for launch in session.launches) if arch else 0
    return states, slots


def same(one, other):
    return torch.equal(one.nan_to_num(0.5, INF, -INF), other.nan_to_num(0.5, INF, -INF))


@pytest.mark.parametrize(("name", "way"), CASES)
def test_the_reference_saturates_what_is_infinite_and_nothing_else(name, way):
    plain, _ = run(name, way)
    finite, _ = run(name, way, saturate=True)
    assert plain.isinf().any()
    assert same(finite, torch.where(plain.isinf(), plain.float().clamp(-65504, 65504).half(), plain))


@pytest.mark.thin(4)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(
    ("name", "way"), [case if case in ALWAYS else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_kernels_do_as_the_reference_at_no_cost(name, way, arch):
    if arch == "sm_100a" and way == "nearest" and name != "step":
        pytest.skip("the same instructions")
    expected = {saturate: run(name, way, saturate=saturate)[0] for saturate in (False, True)}
    plain, plain_slots = run(name, way, arch)
    finite, slots = run(name, way, arch, saturate=True)
    assert same(plain, expected[False])
    assert same(finite, expected[True])
    assert slots == plain_slots


@pytest.mark.parametrize("stochastic", [False, True])
def test_rounding_saturates_at_the_edge(stochastic):
    values = torch.tensor([*VALUES, *(-value for value in VALUES)])
    bits = torch.full(values.shape, 0xFFFF) if stochastic else None
    got, _ = rounding.store(values, torch.float16, bits=bits, saturate=True)
    most = torch.finfo(torch.float16).max
    assert got[:9].tolist()[:-1] == [0.0, 1.0] + [most] * 6 and got[8].isnan()
    assert got[9:].tolist()[:-1] == [0.0, -1.0] + [-most] * 6


@pytest.mark.parametrize(("name", "pool"), [
    ("step", {"state": torch.bfloat16}), ("checkpointing", {"state": "bf16"}), ("ring", {"state": "f32"}),
    ("scan", {"state": torch.float32}), ("gated", {"state": torch.float32}), ("replay", {"state": torch.bfloat16}),
    ("decode", {"state": "bf16"}), ("materialize-pools", {"out": torch.zeros(1, 1, 16, 64)}),
    ("materialize-gated", {"out": torch.zeros(1, 1, 64, 64)}),
])  # fmt: skip
def test_states_of_other_types_are_refused(name, pool):
    function, call, written = CALLS[name](saturate=True, **pool)
    before = copy(call)
    with pytest.raises(ValueError, match=r"saturate: expected False with .* it is for float16 states only"):
        function(**call)
    assert all(torch.equal(call[n].isnan(), before[n].isnan()) for n in written if n in call)
    call["saturate"] = 1
    with pytest.raises(TypeError, match="saturate: expected a bool, got int"):
        function(**call)


@pytest.mark.parametrize("saturate", [False, True])
def test_a_pool_saturates_what_it_writes_to_another(saturate):
    sizes = {"nheads": 1, "dim": 16, "dstate": 64, "window": 2, "tokens": 2}
    wide, narrow = (
        serving.StatePool.mamba2(2, 2, **sizes, state_dtype=dtype) for dtype in (torch.float32, torch.float16)
    )  # fmt: skip
    source, target = wide.allocate(), narrow.allocate()
    wide.state[:, source] = 1e30
    A = [torch.zeros(1, 1, 1).expand(1, 16, 64)] * 2
    wide.materialize(A, source, target, destination_pool=narrow, saturate=saturate)
    assert (narrow.state[:, target] == (65504 if saturate else INF)).all()


def test_the_option_is_part_of_the_key():
    for cls in (specs.SelectiveStateUpdateSpec, specs.SelectiveScanSpec, specs.GatedDeltaRuleSpec,
                specs.GatedDeltaRuleReplaySpec, ReplayDecodeSpec, specs.CheckpointingSSUSpec, specs.MaterializeSpec,
                specs.MaterializeGatedDeltaSpec):  # fmt: skip
        (field,) = (field for field in dataclasses.fields(cls) if field.name == "saturate")
        assert field.default is False and field.kw_only
