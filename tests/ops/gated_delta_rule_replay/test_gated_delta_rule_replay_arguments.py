"""Every documented precondition of `gated_delta_rule_replay`, broken once: the message, and that nothing is written."""

from __future__ import annotations

import pytest
import torch
from gdn_cases import odd_rows, transposed
from refusals import refuses
from replay_cases import Case, arguments

import cute_ssm
from cute_ssm.errors import UnsupportedSpecError

ANY_FLOAT = "expected dtype float32 or bfloat16 or float16, got "
GATES = r"expected shape \(slots, value_heads, L\) = \(26, 2, 23\)"
# (argument, how it is broken, error, what the message says beside the argument's name)
BROKEN = [
    ("q", lambda t: None, TypeError, "expected a torch.Tensor, or an array with __dlpack__, got NoneType"),
    ("k_cache", lambda t: None, TypeError, "expected a torch.Tensor, or an array with __dlpack__, got NoneType"),
    ("k", lambda t: None, TypeError, "expected a torch.Tensor, or an array with __dlpack__, got NoneType"),
    ("v_cache", lambda t: 0.5, TypeError, "expected a torch.Tensor, or an array with __dlpack__, got float"),
    ("g_cache", lambda t: None, TypeError, "expected a torch.Tensor, or an array with __dlpack__, got NoneType"),
    ("ring_start", lambda t: 3, TypeError, "expected a torch.Tensor, or an array with __dlpack__, got int"),
    (
        "beta_cache",
        lambda t: t.to("meta"),
        ValueError,
        "expected a tensor on cpu like q, got one on meta; it is written, so allocate it",
    ),
    ("q", lambda t: t[0], ValueError, r"expected shape \(batch, tokens, heads, K\), got \(4, 1, 128\)"),
    ("v", lambda t: t[0], ValueError, r"expected shape \(batch, tokens, value_heads, V\), got \(4, 2, 64\)"),
    ("initial_state", lambda t: t[0], ValueError, r"expected shape \(slots, value_heads, V, K\), got \(2, 64, 128\)"),
    ("k", lambda t: t[:, :2], ValueError, r"expected shape \(batch, tokens, heads, K\) = \(4, 4, 1, 128\), got \(4, 2"),
    ("v", lambda t: t[:2], ValueError, r"expected shape \(batch, tokens, value_heads, V\)"),
    ("initial_state", lambda t: t[..., :64], ValueError, r"expected shape \(slots, value_heads, V, K\) = "),
    ("initial_state_indices", lambda t: t[:2], ValueError, r"expected shape \(batch,\) = \(4,\), got \(2,\)"),
    ("A_log", lambda t: t[:1], ValueError, r"expected shape \(value_heads,\) = \(2,\), got \(1,\)"),
    ("dt_bias", lambda t: t[:1], ValueError, r"expected shape \(value_heads,\) = \(2,\), got \(1,\)"),
    ("a", lambda t: t[..., :1], ValueError, r"expected shape \(batch, tokens, value_heads\) = \(4, 4, 2\)"),
    ("b", lambda t: t[:, :1], ValueError, r"expected shape \(batch, tokens, value_heads\) = \(4, 4, 2\)"),
    ("output", lambda t: t[:, :1], ValueError, r"expected shape \(batch, tokens, value_heads, V\) = \(4, 4, 2, 64\)"),
    ("k_cache", lambda t: t[0], ValueError, r"expected shape \(slots, heads, L, K\) = "),
    ("k_cache", lambda t: t[:3], ValueError, r"expected shape \(slots, heads, L, K\) = \(26, 1, 23, 128\), got \(3, 1"),
    ("k_cache", lambda t: t[..., :64], ValueError, r"expected shape \(slots, heads, L, K\) = \(26, 1, 23, 128\)"),
    ("k_cache", lambda t: t.expand(-1, 2, -1, -1), ValueError, r"expected shape \(slots, heads, L, K\)"),
    ("v_cache", lambda t: t[:, :, :20], ValueError, r"expected shape \(slots, value_heads, L, V\) = \(26, 2, 23, 64\)"),
    ("v_cache", lambda t: t[:, :1], ValueError, r"expected shape \(slots, value_heads, L, V\) = \(26, 2, 23, 64\)"),
    ("g_cache", lambda t: t[..., 1:], ValueError, GATES),
    ("beta_cache", lambda t: t.mT, ValueError, GATES),
    ("ring_start", lambda t: t[:4], ValueError, r"expected shape \(slots,\) = \(26,\), got \(4,\)"),
    ("prev_num_accepted_tokens", lambda t: t[:4], ValueError, r"expected shape \(slots,\) = \(26,\), got \(4,\)"),
    ("q", lambda t: t.float(), TypeError, "expected dtype bfloat16 or float16, got float32"),
    ("k", lambda t: t.half(), TypeError, r"expected dtype bfloat16, got float16; the type of q; cast it with k.to"),
    ("v", lambda t: t.float(), TypeError, "expected dtype bfloat16, got float32"),
    ("initial_state", lambda t: t.double(), TypeError, ANY_FLOAT + "float64"),
    ("a", lambda t: t.double(), TypeError, ANY_FLOAT + "float64"),
    ("b", lambda t: t.float(), TypeError, "expected dtype bfloat16, got float32; the type of a"),
    ("dt_bias", lambda t: t.int(), TypeError, ANY_FLOAT + "int32"),
    ("output", lambda t: t.double(), TypeError, ANY_FLOAT + "float64"),
    ("A_log", lambda t: t.bfloat16(), TypeError, r"expected dtype float32, got bfloat16; cast it once"),
    ("initial_state_indices", lambda t: t.short(), TypeError, "expected dtype int32 or int64, got int16"),
    ("k_cache", lambda t: t.half(), TypeError, "expected dtype bfloat16, got float16; the type of q"),
    ("v_cache", lambda t: t.float(), TypeError, "expected dtype bfloat16, got float32; the type of q"),
    ("g_cache", lambda t: t.bfloat16(), TypeError, "expected dtype float32, got bfloat16"),
    ("beta_cache", lambda t: t.double(), TypeError, "expected dtype float32, got float64"),
    ("ring_start", lambda t: t.long(), TypeError, "expected dtype int32, got int64"),
    ("prev_num_accepted_tokens", lambda t: t.long(), TypeError, "expected dtype int32, got int64"),
    ("q", lambda t: t.repeat(1, 1, 1, 2)[..., ::2], ValueError, r"stride 1 in its last dimension.*q.contiguous"),
    ("v", transposed, ValueError, "stride 1 in its last dimension"),
    ("initial_state", transposed, ValueError, "stride 1 in its last dimension"),
    ("output", transposed, ValueError, "stride 1 in its last dimension"),
    ("k_cache", transposed, ValueError, "stride 1 in its last dimension"),
    ("v_cache", transposed, ValueError, "stride 1 in its last dimension"),
    ("initial_state", odd_rows, ValueError, "multiples of 16 bytes.*pad its rows"),
    ("k_cache", odd_rows, ValueError, "multiples of 8 bytes.*pad its rows"),
    ("v_cache", odd_rows, ValueError, "multiples of 16 bytes.*pad its rows"),
    ("initial_state", lambda t: t[:1].expand_as(t), ValueError, "expected elements that do not share memory"),
    ("g_cache", lambda t: t[:1].expand_as(t), ValueError, "expected elements that do not share memory"),
    ("k_cache", lambda t: t[:, :, :1].expand_as(t), ValueError, "expected elements that do not share memory"),
    ("output", lambda t: t[:1].expand_as(t), ValueError, "expected elements that do not share memory"),
    (
        "initial_state_indices",
        lambda t: t + 100,
        ValueError,
        "expected slots below 26, or negative entries for padding",
    ),
    ("initial_state_indices", lambda t: t[:1].expand(4), ValueError, "expected distinct slots, got .* would race"),
    (
        "ring_start",
        lambda t: t * 0 - 1,
        ValueError,
        r"expected values from 0 to 22, got -1 in slot \d+; serving.commit",
    ),
    ("ring_start", lambda t: t * 0 + 23, ValueError, r"expected values from 0 to 22, got 23 in slot"),
    ("prev_num_accepted_tokens", lambda t: t * 0 + 17, ValueError, "expected values from 0 to 16, got 17 in slot"),
    ("prev_num_accepted_tokens", lambda t: t * 0 - 1, ValueError, "expected values from 0 to 16, got -1 in slot"),
    ("window", lambda w: -1, ValueError, "expected 0 to 64 pending tokens, got -1; pass window"),
    ("window", lambda w: 65, ValueError, "expected 0 to 64 pending tokens, got 65"),
    ("window", lambda w: 8.0, TypeError, "expected an int, got float"),
]


def expect(call: dict, name: str, error: type, message: str, emulated: bool = False) -> None:
    refuses(lambda: cute_ssm.gated_delta_rule_replay(**call), call, name, error, message, emulated)


@pytest.mark.parametrize("emulated", [False, True], ids=["reference", "emulate"])
@pytest.mark.parametrize(("name", "change", "error", "message"), BROKEN)
def test_broken_precondition(name, change, error, message, emulated):
    call = arguments(Case(pads=()))
    call[name] = change(call[name])
    expect(call, name, error, message, emulated)


def test_number_of_tokens():
    for tokens in (0, 17):
        call = arguments(Case(tokens=tokens, pads=(), K=64, batch=1))
        expect(call, "q", ValueError, f"expected 1 to 16 tokens, got {tokens}; split the call")


def test_rings_hold_the_window_and_the_new_tokens():
    call = arguments(Case(pads=(), spare=0))
    expect({**call, "window": 17}, "k_cache", ValueError, r"expected at least window \+ tokens = 17 \+ 4 rows, got 20")
    short = {**call, **{n: call[n][:, :, :4] for n in ("k_cache", "v_cache", "g_cache", "beta_cache")}, "window": None}
    expect(short, "k_cache", ValueError, "expected more rows than tokens = ")
    expect({**call, "k_cache": call["k_cache"][0], "window": None}, "k_cache", ValueError, "expected 4 dimensions")


def test_sizes_outside_the_kernel():
    for change, name in (({"K": 100}, "K"), ({"V": 24}, "V"), ({"K": 512}, "K"), ({"V": 272}, "V")):
        call = arguments(Case(pads=(), batch=1, **change))
        expected = f"{name}: expected a multiple of 16 up to 256.*, got {change[name]}"
        with pytest.raises(UnsupportedSpecError, match=expected):
            cute_ssm.gated_delta_rule_replay(**call)


def test_heads_must_divide_value_heads():
    call = arguments(Case(heads=1, ratio=3, pads=()))
    for name, repeat in (("q", (1, 1, 2, 1)), ("k", (1, 1, 2, 1)), ("k_cache", (1, 2, 1, 1))):
        call[name] = call[name].repeat(repeat)
    expect(call, "v", ValueError, "expected value_heads that is a multiple of heads = 2, got value_heads = 3")


def test_contents_of_unused_slots_are_not_read():
    call = arguments(Case())
    unused = torch.ones(26, dtype=torch.bool)
    unused[call["initial_state_indices"][call["initial_state_indices"] >= 0].long()] = False
    assert (call["ring_start"][unused] == -7).all()
    assert cute_ssm.gated_delta_rule_replay(**call)[0][0].isfinite().all()
