"""`gated_delta_rule_mtp` with packed requests, and with more tokens than a chunk."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from bits import equal, same_memory
from cases import vary
from gdn_cases import DTYPES, MODES, REGIMES, TOKENS, Case, arguments, dense, lengths, verify
from kernel_backends import both
from memory import copy
from refusals import refuses

import cute_ssm
from cute_ssm import arch as archs
from cute_ssm import runtime
from cute_ssm.ops._gated_delta.config import choose
from cute_ssm.ops.gated_delta_rule_mtp import operator as module
from cute_ssm.ops.gated_delta_rule_mtp.spec import GatedDeltaRuleSpec

PACKED = Case(batch=5, lengths=(3, 0, 4, 1, 2), tokens=4, K=16, V=16)
LONG = Case(batch=2, tokens=33, K=16, V=16, ratio=1, pads=())
BOTH = Case(batch=4, lengths=(30, 2, 17, 0), tokens=40, K=16, V=16, ratio=1)
CASES = [
    PACKED,
    *vary(PACKED, mode=[mode for mode in MODES if mode != "update"]),
    *vary(
        PACKED, state=("bf16", "f16"), io=("f16",), out=(None, "bf16"), gate=("f32",), indices=(torch.int64,),
        pads=((), (0, 1, 2, 3, 4)), strided=(True,), l2norm=(False,), tokens=(5, 8, 16), heads=(2,),
    ),
    Case(batch=3, lengths=(1, 0, 1), tokens=1, K=16, V=16, pads=(2,), mode="accepted_split", out="bf16"),
    Case(batch=3, lengths=(1, 2, 0), tokens=2, K=16, V=16, pads=(), mode="buffer_update"),
    Case(batch=2, lengths=(12, 7), tokens=13, K=128, pads=(), state="f16", io="f16", out=None),
    LONG,
    *vary(LONG, mode=[mode for mode in MODES if mode != "update"]),
    *vary(LONG, regime=REGIMES[1:], state=("bf16", "f16"), io=("f16",), out=(None, "bf16"), strided=(True,)),
    *vary(LONG, tokens=(17, 32, 48, 64), K=(128,)),
    BOTH,
    *vary(BOTH, mode=[mode for mode in MODES if mode != "update"], strided=(True,), indices=(torch.int64,)),
    Case(batch=1, tokens=20, K=256, V=16, ratio=1, pads=(), mode="accepted", out="bf16"),
    Case(batch=1, tokens=21, K=192, V=48, ratio=1, pads=(), mode="scatter", state="bf16"),
    Case(batch=2, lengths=(5, 19), tokens=19, K=96, V=192, ratio=1, pads=(), mode="buffer"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case):
    verify(case)


FEW = (0, 9, 24, len(CASES) - 7)  # in CI; the last is packed and long
KERNEL = [case if i in FEW else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(CASES)]


@pytest.mark.thin(3)
@pytest.mark.parametrize("case", KERNEL, ids=str)
def test_kernel(case, backend):
    with backend():
        verify(case)


@pytest.mark.wide
def test_sm_100a(backend):
    with backend("sm_100a"):
        verify(BOTH)


@pytest.mark.thin(2)
@pytest.mark.parametrize("mode", [{"async_mode": "late", "schedule": 1}, {"schedule": 2}], ids=str)
def test_schedules(mode, backend):
    with backend(**mode):
        verify(LONG)


def test_packed_requests_have_the_bits_of_dense_ones(backend):
    """Whatever lies around them: lengths and order of the requests, and where their tokens are."""
    call = arguments(Case(batch=4, lengths=(3, 4, 4, 3), tokens=4, K=16, V=16, pads=(), out="bf16"))
    alone = copy(call)
    with backend(checks=False):
        out, _ = cute_ssm.gated_delta_rule_mtp(**call)
        for i, (first, last) in enumerate(itertools.pairwise(call["cu_seqlens"].tolist())):
            part = {name: alone[name][:, first:last] for name in TOKENS}
            part["initial_state_indices"] = alone["initial_state_indices"][i : i + 1]
            got, _ = cute_ssm.gated_delta_rule_mtp(**{**alone, **part, "cu_seqlens": None, "max_seqlen": None})
            equal(got, out[:, first:last], f"request {i}")
    same_memory(alone["initial_state"], call["initial_state"])


@pytest.mark.parametrize(
    "K", [16, pytest.param(192, marks=pytest.mark.slow), pytest.param(256, marks=pytest.mark.slow)]
)
def test_a_long_request_has_the_bits_of_its_chunks(K, backend):
    """The state that stays in registers is the one that calls of a chunk each would hand on."""
    size = {16: 16, 192: 8, 256: 4}[K]
    whole = arguments(Case(batch=1, tokens=2 * size + 1 if size > 8 else 17, K=K, V=16, ratio=1, pads=()))
    parts = copy(whole)
    tokens = whole["q"].shape[1]
    with backend(checks=False):
        cute_ssm.gated_delta_rule_mtp(**whole)
        for first in range(0, tokens - 1, size):
            piece = slice(first, first + size)
            cute_ssm.gated_delta_rule_mtp(**{**parts, **{n: parts[n][:, piece] for n in TOKENS}})
    full = slice((tokens - 1) // size * size)
    equal(parts["output"][:, full], whole["output"][:, full])


def test_values_of_later_chunks_and_of_other_requests_reach_nothing(backend):
    """NaN in everything from one token on: what comes before has the same bits, and so has the accepted state."""
    case = Case(batch=3, lengths=(30, 33, 18), tokens=40, K=16, V=16, ratio=1, pads=(), mode="accepted")
    clean = arguments(case)
    firsts = [17, 5, 16]
    clean["accepted_steps"] = torch.tensor([17, 2, 16], dtype=torch.int32)
    dirty = copy(clean)
    starts = clean["cu_seqlens"].tolist()
    for i, first in enumerate(firsts):
        for name in ("q", "k", "v", "a", "b"):
            dirty[name][0, starts[i] + first : starts[i + 1]] = float("nan")
    with backend(checks=False):
        cute_ssm.gated_delta_rule_mtp(**clean)
        cute_ssm.gated_delta_rule_mtp(**dirty)
    for i, first in enumerate(firsts):
        rows = slice(starts[i], starts[i] + first)
        equal(dirty["output"][0, rows], clean["output"][0, rows])
    slots = clean["initial_state_indices"].long()
    assert clean["initial_state"][slots].isfinite().all()
    equal(dirty["initial_state"][slots], clean["initial_state"][slots])


def test_lengths_and_totals_need_no_compile(backend):
    with backend(checks=False) as session:
        for found in ((3, 1), (4, 4, 0, 2), (3,)):
            verify(Case(batch=len(found), lengths=found, tokens=4, K=16, V=16, pads=(), out="bf16"))
    assert len({id(function) for function in session.functions}) == 1


@both
def test_no_requests(backend):
    call = arguments(PACKED)
    call |= {"cu_seqlens": call["cu_seqlens"][:1], "initial_state_indices": call["initial_state_indices"][:0]}
    before = copy(call)
    with backend(checks=False):
        cute_ssm.gated_delta_rule_mtp(**call)
    for name in ("output", "initial_state"):
        same_memory(call[name], before[name])


def test_rows_of_no_request_are_zero_in_an_output_of_the_operator(backend):
    call = arguments(Case(batch=3, lengths=(2, 4, 1), tokens=4, K=16, V=16, pads=(1,), out=None))
    with backend(checks=False):
        out, _ = cute_ssm.gated_delta_rule_mtp(**call)
    start = call["cu_seqlens"].tolist()
    assert not out[0, : start[0]].any() and not out[0, start[1] : start[2]].any() and not out[0, start[3] :].any()
    assert out[0, start[0] : start[1]].any() and out[0, start[2] : start[3]].any()


# --------------------------------------------------------------------------------------------------------- arguments
BROKEN = [
    ({"q": lambda t: t[0]}, "q", ValueError, r"expected shape \(1, total, heads, K\), got"),
    ({"q": lambda t: t.repeat(2, 1, 1, 1)}, "q", ValueError, "with cu_seqlens, got .*pack the requests"),
    ({"k": lambda t: t[:, 1:]}, "k", ValueError, r"expected shape \(1, total, heads, K\) = \(1, 15, 1, 16\)"),
    ({"a": lambda t: t[:, 1:]}, "a", ValueError, r"expected shape \(1, total, value_heads\) = \(1, 15, 2\)"),
    ({"output": lambda t: t[:, 1:]}, "output", ValueError, r"expected shape \(1, total, value_heads, V\)"),
    ({"cu_seqlens": lambda t: t[None]}, "cu_seqlens", ValueError, r"expected shape \(batch \+ 1,\)"),
    ({"cu_seqlens": lambda t: t[:0]}, "cu_seqlens", ValueError, "expected at least one offset, got none"),
    ({"cu_seqlens": lambda t: t.float()}, "cu_seqlens", TypeError, "expected dtype int32 or int64"),
    ({"cu_seqlens": lambda t: t - 3}, "cu_seqlens", ValueError, "expected rising offsets from 0 to 15 tokens"),
    ({"cu_seqlens": lambda t: t + 4}, "cu_seqlens", ValueError, "expected rising offsets from 0 to 15 tokens"),
    ({"cu_seqlens": lambda t: t.flip(0)}, "cu_seqlens", ValueError, "expected rising offsets"),
    ({"cu_seqlens": lambda t: t * 0 + t[[0, 3, 0, 0, 0, 3]]}, "cu_seqlens", ValueError, "expected "),
    ({"max_seqlen": lambda _: 3}, "cu_seqlens", ValueError, "requests of at most 3 tokens, got one of 4; raise max_s"),
    ({"max_seqlen": lambda _: None}, "max_seqlen", ValueError, "expected the largest number of tokens of a request"),
    ({"max_seqlen": lambda _: 0}, "max_seqlen", ValueError, "expected 1 to 64 tokens, got 0; split the call"),
    ({"max_seqlen": lambda _: 65}, "max_seqlen", ValueError, "expected 1 to 64 tokens, got 65; split the call"),
    ({"max_seqlen": lambda _: 4.0}, "max_seqlen", TypeError, "expected an int, got float"),
    ({"cu_seqlens": lambda _: None}, "max_seqlen", ValueError, "expected None without cu_seqlens, got 4"),
    (
        {"accepted_steps": lambda t: t * 0 + 2},
        "accepted_steps",
        ValueError,
        r"expected counts from 0 to the request's \[3, 4, 1, 2\], got \[2, 2, 2, 2\]",
    ),
    (
        {"initial_state_indices": lambda t: t[:4]},
        "initial_state_indices",
        ValueError,
        r"expected shape \(batch,\) = \(5,\), got \(4,\)",
    ),
]


@pytest.mark.parametrize("emulated", [False, True], ids=["reference", "emulate"])
@pytest.mark.parametrize(("changes", "name", "error", "message"), BROKEN)
def test_broken_precondition(changes, name, error, message, emulated):
    call = arguments(Case(batch=5, lengths=(3, 0, 4, 1, 2), tokens=4, K=16, V=16, pads=(), mode="accepted_split"))
    call |= {key: change(call[key]) for key, change in changes.items()}
    refuses(lambda: cute_ssm.gated_delta_rule_mtp(**call), call, name, error, message, emulated)


def test_what_padding_holds_is_not_looked_at():
    """Offsets of a request without a slot may be anything; so may the slot of one without tokens."""
    call = arguments(Case(batch=3, lengths=(2, 0, 3), tokens=3, K=16, V=16, pads=(), mode="verify"))
    want, _ = cute_ssm.gated_delta_rule_mtp(**call)
    call["initial_state_indices"][1] = 10**6
    equal(cute_ssm.gated_delta_rule_mtp(**call)[0].nan_to_num(), want.nan_to_num())
    call["initial_state_indices"][2] = -1
    call["cu_seqlens"][3] = 10**6
    out, _ = cute_ssm.gated_delta_rule_mtp(**{**call, "output": call["output"].fill_(float("nan"))})
    equal(out[:, :4].nan_to_num(), want[:, :4].nan_to_num())
    assert out[:, 4:].isnan().all()


def test_opcheck():
    call = arguments(Case(batch=2, lengths=(3, 1), tokens=3, K=16, V=16, pads=(), mode="update"))
    for name in ("q", "k", "v", "a", "b", "initial_state", "output"):  # opcheck compares with ==
        call[name].nan_to_num_(0.0)
    arguments_ = [call.get(name) for name in ("q", "k", "v", "initial_state", "initial_state_indices", "A_log", "a")]
    arguments_ += [call["dt_bias"], call["b"], 0.1, call["output"], None, None, False, True, None, None]
    arguments_ += [call["cu_seqlens"], False]
    torch.library.opcheck(module._REGISTERED.overload, tuple(arguments_), {"max_seqlen": 3})


def test_compiles_to_one_graph():
    call = arguments(Case(batch=2, lengths=(3, 1), tokens=3, K=16, V=16, pads=(), out=None))
    eager = copy(call)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(tensors):
        return cute_ssm.gated_delta_rule_mtp(**tensors)[0] + 1

    equal(step(call), cute_ssm.gated_delta_rule_mtp(**eager)[0] + 1)
    same_memory(call["initial_state"], eager["initial_state"])


# ----------------------------------------------------------------------------------------------------------- kernels
SPEC = GatedDeltaRuleSpec(
    state_dtype="float32", input_dtype="bfloat16", output_dtype="bfloat16", gate_dtype="bfloat16",
    dt_bias_dtype="float32", K=128, V=128, tokens=64, l2norm=True, src_dtype="int32", zero_padding=False,
    vector_output=True, dst_dtype=None, scatter_dtype=None, accepted_dtype=None, write_final=True, write_buffer=False,
    cu_dtype="int32",
)  # fmt: skip
WRITES = (
    {"write_final": False},
    {},
    {"accepted_dtype": "int32", "dst_dtype": "int64", "write_buffer": True},
    {"write_final": False, "scatter_dtype": "int32"},
)


def of(**fields) -> GatedDeltaRuleSpec:
    return GatedDeltaRuleSpec(**{**SPEC.__dict__, **fields})


def spills(spec: GatedDeltaRuleSpec, arch: str) -> None:
    target = archs.by_name(arch)
    compiled = runtime.emulated(spec, choose(spec, target, 16384, target.sm_count), target)
    assert compiled.kernels, "what the compiler says of spills cannot be read"
    assert not any(kernel.spill_bytes for kernel in compiled.kernels), spec


@pytest.mark.wide
@pytest.mark.parametrize("K", [128, 256])
def test_no_spills_of_long_requests(K):
    """The widest tile of each size of chunk, with every state written."""
    spills(of(K=K, V=K, **WRITES[2]), "sm_100a")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a", "sm_103a"])
@pytest.mark.parametrize(("K", "V"), [(64, 64), (96, 192), (128, 128), (144, 144), (192, 192), (208, 208), (256, 512)])
def test_no_spills_in_any_size(K, V, arch):
    for state, writes in itertools.product(("float32", "bfloat16", "float16"), WRITES):
        spills(of(K=K, V=V, state_dtype=state, saturate=state == "float16", **writes), arch)


def test_configs_of_long_requests_have_a_tile_for_each_warp():
    for arch, K, V, heads in itertools.product(
        archs.ARCHS.values(), (16, 64, 96, 192, 256), (*range(16, 257, 16), 512), (1, 64, 10**5)
    ):
        spec = of(K=K, V=V)
        config = choose(spec, arch, heads, arch.sm_count)
        config.check(spec, arch)
        assert config.tiles() == 1 and not config.sequential


# ------------------------------------------------------------------------------------------------------------ random
def random_case(seed: int) -> Case:
    pick = random.Random(seed)
    tokens = pick.choice((1, 2, 3, 6, 13, 16, 17, 29, 40, 64))
    batch = pick.randint(1, 4)
    packed = tokens <= 16 or pick.random() < 0.6
    found = tuple(pick.randint(0, tokens) for _ in range(batch)) if packed else None
    return Case(
        batch=batch,
        tokens=tokens,
        lengths=found,
        heads=pick.randint(1, 2),
        ratio=pick.choice((1, 2)),
        K=pick.choice((16, 64, 64, 96, 128, 192, 256)),
        V=pick.choice((16, 48, 64, 128)),
        state=pick.choice(tuple(DTYPES)),
        io=pick.choice(("bf16", "f16")),
        out=pick.choice((None, *DTYPES)),
        gate=pick.choice(tuple(DTYPES)),
        mode=pick.choice(MODES),
        indices=pick.choice((torch.int32, torch.int64)),
        pads=pick.choice(((), (0,), (1,))),
        strided=pick.random() < 0.5,
        regime=pick.choice([r for r in REGIMES if r != "collinear"]),
    )


@pytest.mark.thin(8)
@pytest.mark.parametrize("seed", range(48))
def test_random_configurations_of_the_reference(seed):
    verify(random_case(seed), seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_random_configurations(seed, backend):
    with backend(("sm_90a", "sm_100a")[seed % 2]):
        verify(random_case(seed), seed)


def test_the_cases_pack_what_they_say():
    """The helper's own arithmetic: rows of a dense call are the packed ones, and nothing else is finite."""
    call = arguments(PACKED)
    rows, counts = dense(call), lengths(call).tolist()
    assert counts == list(PACKED.lengths)
    assert sum(call["q"][0, :, 0, 0].isfinite().tolist()) == sum(counts[i] for i in range(5) if i != 1)
    assert not rows["q"][0, 3:].any() and rows["q"][0, :3].isfinite().all()
