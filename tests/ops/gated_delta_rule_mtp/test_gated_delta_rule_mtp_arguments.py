"""Every documented precondition of `gated_delta_rule_mtp`, broken once: the message, and that nothing was written."""

from __future__ import annotations

import warnings

import pytest
import torch
from bits import same_memory
from gdn_cases import Case, arguments, odd_rows, transposed
from memory import copy
from refusals import refuses

import cute_ssm
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.ops.gated_delta_rule_mtp import operator as module


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)


SHAPES = r"\(batch, tokens, value_heads, V\) = \(3, 4, 2, 64\)"
ANY_FLOAT = "expected dtype float32 or bfloat16 or float16, got "
# (argument, how it is broken, error, what the message says beside the argument's name)
BROKEN = [
    ("q", lambda t: None, TypeError, "expected a torch.Tensor, or an array with __dlpack__, got NoneType"),
    ("k", lambda t: None, TypeError, "expected a torch.Tensor, or an array with __dlpack__, got NoneType"),
    ("initial_state", lambda t: 0.5, TypeError, "expected a torch.Tensor, or an array with __dlpack__, got float"),
    (
        "initial_state_indices",
        lambda t: None,
        TypeError,
        "expected a torch.Tensor, or an array with __dlpack__, got NoneType",
    ),
    ("b", lambda t: t.to("meta"), ValueError, "expected a tensor on cpu like q, got one on meta; move it with"),
    ("q", lambda t: t[0], ValueError, r"expected shape \(batch, tokens, heads, K\), got \(4, 1, 128\)"),
    ("initial_state", lambda t: t[0], ValueError, r"expected shape \(slots, value_heads, V, K\), got \(2, 64, 128\)"),
    ("k", lambda t: t[:, :2], ValueError, r"expected shape \(batch, tokens, heads, K\) = \(3, 4, 1, 128\), got \(3, 2"),
    ("v", lambda t: t[:2], ValueError, r"expected shape \(batch, tokens, value_heads, V\)"),
    ("initial_state", lambda t: t[..., :64], ValueError, r"expected shape \(slots, value_heads, V, K\) = "),
    ("initial_state_indices", lambda t: t[:2], ValueError, r"expected shape \(batch,\) = \(3,\), got \(2,\)"),
    ("A_log", lambda t: t[:1], ValueError, r"expected shape \(value_heads,\) = \(2,\), got \(1,\)"),
    ("dt_bias", lambda t: t[:1], ValueError, r"expected shape \(value_heads,\) = \(2,\), got \(1,\)"),
    ("a", lambda t: t[..., :1], ValueError, r"expected shape \(batch, tokens, value_heads\) = \(3, 4, 2\)"),
    ("b", lambda t: t[:, :1], ValueError, r"expected shape \(batch, tokens, value_heads\) = \(3, 4, 2\)"),
    ("output", lambda t: t[:, :1], ValueError, f"expected shape {SHAPES}"),
    (
        "intermediate_states_buffer",
        lambda t: t[:2],
        ValueError,
        r"expected shape \(>= batch, >= tokens, .*its first axis",
    ),
    ("intermediate_states_buffer", lambda t: t[:, :3], ValueError, r"expected shape \(>= batch, >= tokens"),
    ("intermediate_states_buffer", lambda t: t[:, 0], ValueError, r"expected shape \(>= batch, >= tokens"),
    ("intermediate_states_buffer", lambda t: t[..., :64], ValueError, r"expected shape \(>= batch, >= tokens"),
    ("output_state_indices", lambda t: t[:1], ValueError, r"expected shape \(batch,\) = \(3,\)"),
    ("accepted_steps", lambda t: t[:1], ValueError, r"expected shape \(batch,\) = \(3,\)"),
    ("q", lambda t: t.float(), TypeError, "expected dtype bfloat16 or float16, got float32"),
    ("k", lambda t: t.half(), TypeError, r"expected dtype bfloat16, got float16; the type of q; cast it with k.to"),
    ("v", lambda t: t.float(), TypeError, "expected dtype bfloat16, got float32"),
    ("initial_state", lambda t: t.double(), TypeError, ANY_FLOAT + "float64"),
    ("a", lambda t: t.double(), TypeError, ANY_FLOAT + "float64"),
    ("b", lambda t: t.float(), TypeError, "expected dtype bfloat16, got float32; the type of a"),
    ("dt_bias", lambda t: t.int(), TypeError, ANY_FLOAT + "int32"),
    ("output", lambda t: t.double(), TypeError, ANY_FLOAT + "float64"),
    ("A_log", lambda t: t.bfloat16(), TypeError, r"expected dtype float32, got bfloat16; cast it once"),
    (
        "intermediate_states_buffer",
        lambda t: t.half(),
        TypeError,
        "expected dtype float32, got float16; the type of init",
    ),
    ("initial_state_indices", lambda t: t.short(), TypeError, "expected dtype int32 or int64, got int16"),
    ("output_state_indices", lambda t: t.float(), TypeError, "expected dtype int32 or int64"),
    ("accepted_steps", lambda t: t.float(), TypeError, "expected dtype int32 or int64"),
    ("q", lambda t: t.repeat(1, 1, 1, 2)[..., ::2], ValueError, r"stride 1 in its last dimension.*q.contiguous"),
    ("v", transposed, ValueError, "stride 1 in its last dimension"),
    ("initial_state", transposed, ValueError, "stride 1 in its last dimension"),
    ("output", transposed, ValueError, "stride 1 in its last dimension"),
    ("intermediate_states_buffer", transposed, ValueError, "stride 1 in its last dimension"),
    ("initial_state", unaligned, ValueError, "multiples of 16 bytes"),
    ("initial_state", odd_rows, ValueError, "multiples of 16 bytes.*pad its rows"),
    ("intermediate_states_buffer", odd_rows, ValueError, "multiples of 16 bytes"),
    (
        "initial_state_indices",
        lambda t: t + 100,
        ValueError,
        "expected slots below 20, or negative entries for padding",
    ),
    ("output_state_indices", lambda t: t * 0 + 20, ValueError, "expected slots below 20, .* got 20"),
    ("output_state_indices", lambda t: t * 0 + 19, ValueError, r"expected distinct slots to write, got \[19, 19, 19\]"),
    ("accepted_steps", lambda t: t * 0 + 5, ValueError, r"expected counts from 0 to 4 = tokens, got \[5, 5, 5\]"),
    ("accepted_steps", lambda t: t * 0 - 1, ValueError, "expected counts from 0 to 4 = tokens"),
]


def base() -> dict:
    call = arguments(Case(mode="accepted_split", pads=()))
    return {**call, "intermediate_states_buffer": torch.zeros(3, 4, 2, 64, 128)}


def expect(call: dict, name: str, error: type, message: str, emulated: bool = False) -> None:
    refuses(lambda: cute_ssm.gated_delta_rule_mtp(**call), call, name, error, message, emulated)


@pytest.mark.parametrize("emulated", [False, True], ids=["reference", "emulate"])
@pytest.mark.parametrize(("name", "change", "error", "message"), BROKEN)
def test_broken_precondition(name, change, error, message, emulated):
    call = base()
    call[name] = change(call[name])
    expect(call, name, error, message, emulated)


def test_number_of_tokens():
    for tokens in (0, 65):
        call = arguments(Case(tokens=tokens, pads=(), K=64, mode="verify", batch=1))
        expect(call, "q", ValueError, f"expected 1 to 64 tokens, got {tokens}; split the call")


def test_sizes_outside_the_kernel():
    for change, name in (({"K": 100}, "K"), ({"V": 24}, "V"), ({"K": 512}, "K"), ({"V": 272}, "V")):
        call = arguments(Case(pads=(), mode="verify", batch=1, **change))
        expected = f"{name}: expected a multiple of 16 up to 256.*, got {change[name]}"
        with pytest.raises(UnsupportedSpecError, match=expected):
            cute_ssm.gated_delta_rule_mtp(**call)


def test_heads_must_divide_value_heads():
    call = arguments(Case(heads=1, ratio=3, pads=()))
    call["q"], call["k"] = (call[n].expand(-1, -1, 2, -1).contiguous() for n in "qk")
    expect(call, "v", ValueError, "expected value_heads that is a multiple of heads = 2, got value_heads = 3")


def test_scatter_excludes_other_ways_to_write():
    name = "ssm_state_indices"
    call = arguments(Case(mode="scatter", pads=()))
    expect({**call, name: call[name][:, :2]}, name, ValueError, r"expected shape \(batch, tokens\) = \(3, 4\)")
    expect({**call, name: call[name].float()}, name, TypeError, "expected dtype int32 or int64")
    expect({**call, name: call[name] * 0 + 99}, name, ValueError, "expected slots below 20")
    expect({**call, name: call[name] * 0 + 3}, name, ValueError, "expected distinct slots to write")
    expect({**call, "disable_state_update": True}, name, ValueError, "None if the state update is disabled")
    buffer = torch.zeros(3, 4, 2, 64, 128)
    expect({**call, "intermediate_states_buffer": buffer}, name, ValueError, "None with intermediate_states_buffer")
    counts = torch.ones(3, dtype=torch.int32)
    expect({**call, "accepted_steps": counts}, "accepted_steps", ValueError, "None with ssm_state_indices, got both")


def test_no_slot_is_read_by_one_request_and_written_by_another():
    call = arguments(Case(mode="split", pads=()))
    call["output_state_indices"][0] = call["initial_state_indices"][1]
    expect(call, "output_state_indices", ValueError, "expected no slot that another request reads")
    call = arguments(Case(pads=()))
    call["initial_state_indices"][0] = call["initial_state_indices"][1]
    expect(call, "initial_state_indices", ValueError, "expected distinct slots to write")
    cute_ssm.gated_delta_rule_mtp(**{**call, "disable_state_update": True})  # reading a slot twice is fine


def test_the_default_of_the_update_warns_once_and_is_off(monkeypatch):
    monkeypatch.setattr(module, "_warned", False)
    call = arguments(Case(pads=()))
    before = copy(call)
    del call["disable_state_update"]
    with pytest.warns(FutureWarning, match="disable_state_update: None leaves the states unchanged") as caught:
        cute_ssm.gated_delta_rule_mtp(**call)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cute_ssm.gated_delta_rule_mtp(**call)
    same_memory(call["initial_state"], before["initial_state"])
    assert not call["output"].isnan().any()
