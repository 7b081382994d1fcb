"""What `cute_ssm.integrations.transformers` puts in the place of functions of transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cute_ssm import env
from cute_ssm.compat._gated_delta import TOKENS
from cute_ssm.compat.mamba_ssm import selective_scan_fn, selective_state_update
from cute_ssm.errors import UnsupportedArchError, UnsupportedSpecError, describe
from cute_ssm.ops.gated_delta_rule_mtp.operator import gated_delta_rule_mtp

# Arguments that change a result and that the operators lack; transformers' own functions ignore all others.
MEANT = ("cu_seqlens", "seq_idx", "state_batch_indices")


class Fallback:
    """Runs a call by an operator if possible, else by the replaced function; logs the first such call."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original, self.logged = original, False

    def __call__(
        self, operator: Callable[[], Any], original: Callable[[], Any], operands: Any, others: dict[str, Any]
    ) -> Any:
        """Run one call; `others` are arguments that the operator lacks, of which those in `MEANT` change a result."""
        reason: object = "gradients are not supported; generate under torch.no_grad()"
        meant = [name for name in MEANT if others.get(name) is not None]
        if meant:
            reason = f"the operator has no {' or '.join(meant)}"
        elif not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in operands):
            try:
                return operator()
            except (UnsupportedArchError, UnsupportedSpecError) as error:
                reason = error
        if not self.logged:
            self.logged = True
            name = getattr(self.original, "__qualname__", type(self.original).__name__)  # a module, by `kernels`
            env.logger().warning("%s runs without cute_ssm: %s", name, reason)
        return original()


def update(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the replacement of a decode step of Mamba-1 or Mamba-2 layers."""
    run = Fallback(original)

    @functools.wraps(original)
    def step(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        output: Tensor = run(
            lambda: selective_state_update(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus),
            lambda: original(
                state, hidden_states, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, z=z, **kwargs
            ),
            (state, hidden_states, dt, A, B, C, D, dt_bias, z),
            kwargs,
        )
        return output

    return step


def scan(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the replacement of the scan of a Mamba-1 prefill, which starts from zero states."""
    run = Fallback(original)

    @functools.wraps(original)
    def prefill(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        use_mambapy: bool = False,
        use_associative_scan: bool = False,
        **kwargs: Any,
    ) -> Any:
        tensors = (hidden_states, dt, A, B, C, D, z, delta_bias)
        fallbacks = {"use_mambapy": use_mambapy, "use_associative_scan": use_associative_scan}  # read by transformers
        return run(
            lambda: selective_scan_fn(*tensors, delta_softplus, return_last_state),
            lambda: original(*tensors, delta_softplus, return_last_state, **fallbacks, **kwargs),
            tensors,
            kwargs,
        )

    return prefill


def delta_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the replacement of the token by token function of gated delta nets, a decode step."""
    run = Fallback(original)

    @functools.wraps(original)
    def step(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> Any:
        tensors = (query, key, value, g, beta)
        rest = (initial_state, output_final_state, use_qk_l2norm_in_kernel)
        return run(
            lambda: _delta_rule(*tensors, *rest),
            lambda: original(*tensors, *rest, **kwargs),
            (*tensors, initial_state),
            kwargs,
        )

    return step


def delta_prefill(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the replacement of the chunked function of gated delta nets, which may start from states."""
    run = Fallback(original)

    @functools.wraps(original)
    def prefill(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> Any:
        tensors = (query, key, value, g, beta)
        rest = (initial_state, output_final_state, use_qk_l2norm_in_kernel)
        return run(
            lambda: _delta_rule(*tensors, *rest),
            lambda: original(*tensors, chunk_size, *rest, **kwargs),
            (*tensors, initial_state),
            kwargs,
        )

    return prefill


def delta_layout(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs the chunked one, and lays the states out in memory as decode steps update them."""

    @functools.wraps(original)
    def prefill(*args: Any, **kwargs: Any) -> Any:
        out, states = original(*args, **kwargs)
        return out, None if states is None else states.mT.contiguous().mT

    return prefill


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
    use_qk_l2norm: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run any number of tokens, with a launch for every 64.

    States of a cache, (batch, value_heads, K, V), are updated in place if K is last in memory, which is how this
    function returns new ones: a cache keeps the strides of the first states that it is given.
    """
    if query.dtype not in (torch.bfloat16, torch.float16):
        fix = "load the model with dtype=torch.bfloat16"
        raise UnsupportedSpecError(describe("query", "bfloat16 or float16", query.dtype, fix))
    (batch, tokens, heads, V), K = value.shape, key.shape[-1]
    if initial_state is None:
        pool = value.new_zeros(batch, heads, V, K, dtype=torch.float32)
        states = pool.mT
    elif output_final_state and initial_state.dtype == torch.float32 and initial_state.mT.is_contiguous():
        pool, states = initial_state.mT, initial_state
    else:
        pool = value.new_empty(batch, heads, V, K, dtype=torch.float32).copy_(initial_state.mT)
        states = pool.mT
    new_q, new_k, new_v = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    decay, step = g.float(), beta.float()
    unread = decay.new_empty(heads)  # A_log and dt_bias, of gates from logits
    slots = torch.arange(batch, dtype=torch.int32, device=value.device)
    out = torch.empty(batch, tokens, heads, V, dtype=query.dtype, device=value.device)
    for first in range(0, tokens, TOKENS):
        part = slice(first, first + TOKENS)
        gated_delta_rule_mtp(
            new_q[:, part], new_k[:, part], new_v[:, part], pool, slots, unread, decay[:, part], unread, step[:, part],
            None, out[:, part], disable_state_update=first + TOKENS >= tokens and not output_final_state,
            use_qk_l2norm=use_qk_l2norm, gate_logits=False,
        )  # fmt: skip
    return out, states if output_final_state else None
