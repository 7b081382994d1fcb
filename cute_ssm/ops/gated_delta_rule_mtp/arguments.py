"""The arguments of `gated_delta_rule_mtp`: their table, further checks, and the spec of a call."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops._gated_delta import arguments as shared
from cute_ssm.ops._gated_delta.spec import TOKEN_BUCKETS
from cute_ssm.ops._table import INDICES, Arg, Given, Table
from cute_ssm.ops.gated_delta_rule_mtp.spec import GatedDeltaRuleSpec


class Arguments(NamedTuple):
    """The arguments of a call in the order of the schema; the tensors are in that of the kernel."""

    q: Annotated[Tensor, shared.Queries]
    k: Annotated[Tensor, shared.Keys]
    v: Annotated[Tensor, shared.Values]
    initial_state: Annotated[Tensor, shared.State]
    initial_state_indices: Annotated[Tensor, shared.Slots]
    A_log: Annotated[Tensor, shared.Rates]
    a: Annotated[Tensor, shared.Logits]
    dt_bias: Annotated[Tensor, shared.Bias]
    b: Annotated[Tensor, shared.StepLogits]
    scale: float
    output: Annotated[Tensor, shared.Output]
    intermediate_states_buffer: Annotated[
        Tensor | None, replace(shared.State, shape="entries steps value_heads V K", dtypes=(), like="initial_state")
    ]
    ssm_state_indices: Annotated[Tensor | None, Arg("batch tokens", INDICES)]
    disable_state_update: bool
    use_qk_l2norm: bool
    output_state_indices: Annotated[Tensor | None, shared.Slots]
    accepted_steps: Annotated[Tensor | None, shared.Slots]
    cu_seqlens: Annotated[Tensor | None, Arg("batch+1", INDICES)]
    zero_padding: bool
    saturate: bool = False
    gate_logits: bool = True
    max_seqlen: int | None = None


TABLE = Table(Arguments)


def check(call: Arguments) -> GatedDeltaRuleSpec:
    """Raise unless the call is as the operator documents it; return its spec."""
    given = TABLE.given(call)
    sizes = shared.step_sizes(given, TOKEN_BUCKETS[-1], call.max_seqlen)
    _check_buffer(given, sizes)
    given.check_shapes(sizes.axes(call.q, call.cu_seqlens is not None))
    shared.check_heads("v", sizes.heads, sizes.value_heads)
    given.check_dtypes()
    arguments.check_saturate(call.saturate, "initial_state", call.initial_state.dtype)
    shared.check_scale(call.scale)
    _check_combinations(call)
    given.check_strides()

    spec = GatedDeltaRuleSpec(
        **shared.spec_fields(given, sizes.tokens, call.use_qk_l2norm, call.zero_padding),
        dst_dtype=arguments.type_of(call.output_state_indices),
        scatter_dtype=arguments.type_of(call.ssm_state_indices),
        accepted_dtype=None if call.disable_state_update else arguments.type_of(call.accepted_steps),
        write_final=not call.disable_state_update and call.ssm_state_indices is None,
        write_buffer=call.intermediate_states_buffer is not None,
        saturate=call.saturate,
        gate_logits=call.gate_logits,
        cu_dtype=arguments.type_of(call.cu_seqlens),
    )
    spec.check()
    return spec


def _check_buffer(given: Given, sizes: shared.StepSizes) -> None:
    """Raise unless a buffer, if there is one, has room for the states of a call."""
    if "intermediate_states_buffer" not in given:
        return
    got = tuple(given["intermediate_states_buffer"].shape)
    shape = (sizes.batch, sizes.tokens, sizes.value_heads, sizes.V, sizes.K)
    if len(got) != 5 or got[0] < shape[0] or got[1] < shape[1] or got[2:] != shape[2:]:
        expected = f"shape (>= batch, >= tokens, value_heads, V, K) with {shape}"
        raise ValueError(describe("intermediate_states_buffer", expected, got, "its first axis is the batch"))


def _check_combinations(call: Arguments) -> None:
    """Raise on arguments that exclude each other."""
    if call.ssm_state_indices is None:
        return
    if call.intermediate_states_buffer is not None:
        fix = "a call stores states by slot or by position, not both"
        raise ValueError(describe("ssm_state_indices", "None with intermediate_states_buffer", "both", fix))
    if call.disable_state_update:
        fix = "slots of the pool are written: pass disable_state_update=False"
        raise ValueError(describe("ssm_state_indices", "None if the state update is disabled", "a tensor", fix))
    if call.accepted_steps is not None:
        fix = "with ssm_state_indices no final state is written"
        raise ValueError(describe("accepted_steps", "None with ssm_state_indices", "both", fix))


def check_contents(call: Arguments) -> None:
    """Raise if an index on the CPU is out of range, or if two requests use one slot against the contract.

    The other indices of requests that are padding are not read.
    """
    slots, src = call.initial_state.shape[0], call.initial_state_indices
    counts = lengths(call)
    candidates = {
        "initial_state_indices": src,
        "output_state_indices": call.output_state_indices,
        "ssm_state_indices": call.ssm_state_indices,
    }
    named = {name: indices for name, indices in candidates.items() if indices is not None}
    active = (src >= 0) & (counts > 0)
    for name, indices in named.items():
        shared.check_slots(name, indices[_used(indices, active, counts)], slots)
    accepted = call.accepted_steps
    if accepted is not None and bool((active & ((accepted < 0) | (accepted > counts))).any()):
        most = f"{int(counts[0])} = tokens" if call.cu_seqlens is None else f"the request's {counts[active].tolist()}"
        raise ValueError(describe("accepted_steps", f"counts from 0 to {most}", accepted[active].tolist()))
    if call.disable_state_update or not src.numel():
        return
    name = next(reversed(named))
    _check_races(name, named[name], src, active, counts)


def lengths(call: Arguments) -> Tensor:
    """Return the numbers of tokens of the requests; raise if ``cu_seqlens`` on the CPU does not fit."""
    src, tokens = call.initial_state_indices, call.q.shape[1]
    if call.cu_seqlens is None:
        return torch.full(src.shape, tokens)
    return shared.check_lengths(call.cu_seqlens, src >= 0, tokens, call.max_seqlen or 0)


def _used(indices: Tensor, active: Tensor, counts: Tensor) -> Tensor:
    """Return which entries of a tensor (batch,) or (batch, tokens) belong to active requests and their tokens."""
    return active if indices.dim() == 1 else active[:, None] & (torch.arange(indices.shape[1]) < counts[:, None])


def _check_races(name: str, written: Tensor, src: Tensor, active: Tensor, counts: Tensor) -> None:
    """Raise if two requests write one slot, or one writes a slot that another reads."""
    per_token = written.dim() == 2
    requests = torch.arange(src.numel())
    request = requests[:, None].expand(written.shape) if per_token else requests
    used = (written >= 0) & _used(written, active, counts)
    targets, writers = written[used].long(), request[used]
    if len(set(targets.tolist())) != targets.numel():
        raise ValueError(describe(name, "distinct slots to write", targets.tolist(), "two requests would race"))
    foreign = (targets[:, None] == src[active].long()[None]) & (writers[:, None] != requests[active][None])
    if bool(foreign.any()):
        raise ValueError(describe(name, "no slot that another request reads", targets.tolist(), "they would race"))
