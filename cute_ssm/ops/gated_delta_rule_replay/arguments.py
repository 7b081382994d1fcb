"""The arguments of `gated_delta_rule_replay`: their table, further checks, and the spec of a call."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops._gated_delta import arguments as shared
from cute_ssm.ops._gated_delta.spec import CHUNK, WINDOW_BUCKETS, window_bucket
from cute_ssm.ops._table import Table
from cute_ssm.ops.gated_delta_rule_replay.spec import GatedDeltaRuleReplaySpec

MAX_WINDOW = WINDOW_BUCKETS[-1]


class Arguments(NamedTuple):
    """The arguments of a call in the order of the schema; the tensors are in that of the kernel."""

    q: Annotated[Tensor, shared.Queries]
    k: Annotated[Tensor, shared.Keys]
    v: Annotated[Tensor, shared.Values]
    initial_state: Annotated[Tensor, shared.State]
    initial_state_indices: Annotated[Tensor, shared.Slots]
    k_cache: Annotated[Tensor, shared.KeyRing]
    v_cache: Annotated[Tensor, shared.ValueRing]
    g_cache: Annotated[Tensor, shared.GateRing]
    beta_cache: Annotated[Tensor, shared.GateRing]
    ring_start: Annotated[Tensor, shared.Cursor]
    prev_num_accepted_tokens: Annotated[Tensor, shared.Cursor]
    A_log: Annotated[Tensor, shared.Rates]
    a: Annotated[Tensor, shared.Logits]
    dt_bias: Annotated[Tensor, shared.Bias]
    b: Annotated[Tensor, shared.StepLogits]
    scale: float
    output: Annotated[Tensor, shared.Output]
    use_qk_l2norm: bool
    window: int
    zero_padding: bool
    saturate: bool = False


TABLE = Table(Arguments)


def check(call: Arguments) -> GatedDeltaRuleReplaySpec:
    """Raise unless the call is as the operator documents it; return its spec."""
    given = TABLE.given(call)
    sizes = shared.step_sizes(given, CHUNK)
    tokens, window = sizes.tokens, call.window
    length = call.k_cache.shape[2] if call.k_cache.dim() == 4 else 0
    given.check_shapes({**sizes.axes(call.q, False), "L": length})
    shared.check_heads("v", sizes.heads, sizes.value_heads)
    arguments.check_integer("window", window)
    if not 0 <= window <= MAX_WINDOW:
        fix = "pass window, or other rings"
        raise ValueError(describe("window", f"0 to {MAX_WINDOW} pending tokens", window, fix))
    if length < window + tokens:
        expected = f"at least window + tokens = {window} + {tokens} rows"
        raise ValueError(describe("k_cache", expected, length, "allocate all rings with that many rows"))
    given.check_dtypes()
    arguments.check_saturate(call.saturate, "initial_state", call.initial_state.dtype)
    shared.check_scale(call.scale)
    given.check_strides()
    given.check_written()
    fields = shared.spec_fields(given, max(tokens, 4), call.use_qk_l2norm, call.zero_padding)
    spec = GatedDeltaRuleReplaySpec(**fields, window=window_bucket(max(window, 1)), saturate=call.saturate)
    spec.check()
    return spec


def check_contents(call: Arguments) -> None:
    """Raise if a slot or cursor on the CPU is out of range, or if two requests use one slot."""
    name, src = "initial_state_indices", call.initial_state_indices
    shared.check_slots(name, src, call.initial_state.shape[0])
    used = src[src >= 0].long()
    if len(set(used.tolist())) != used.numel():
        raise ValueError(describe(name, "distinct slots", used.tolist(), "two requests would race"))
    _check_cursor("ring_start", call.ring_start, used, call.k_cache.shape[2] - 1)
    _check_cursor("prev_num_accepted_tokens", call.prev_num_accepted_tokens, used, call.window)


def _check_cursor(name: str, cursor: Tensor, used: Tensor, most: int) -> None:
    """Raise unless a cursor is in range in the slots that are used."""
    bad = used[(cursor[used] < 0) | (cursor[used] > most)]
    if bad.numel():
        got = f"{int(cursor[bad[0]])} in slot {int(bad[0])}"
        raise ValueError(describe(name, f"values from 0 to {most}", got, "serving.commit keeps it in range"))
