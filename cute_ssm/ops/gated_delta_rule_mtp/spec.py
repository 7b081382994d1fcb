"""The spec of `cute_ssm.gated_delta_rule_mtp`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cute_ssm.ops._gated_delta.spec import GatedDeltaSpec, Sizes

SEQUENTIAL_TOKENS = 2  # more take over three times the instructions of products


@dataclass(frozen=True)
class GatedDeltaRuleSpec(GatedDeltaSpec):
    """A call of `cute_ssm.gated_delta_rule_mtp`: up to 16 tokens per request.

    Attributes
    ----------
    dst_dtype, scatter_dtype, accepted_dtype : str or None
        Types of ``output_state_indices``, ``ssm_state_indices`` and ``accepted_steps``.  None: the argument is absent.
    write_final, write_buffer : bool
        Write the final state to the pool; write the states after all tokens to the buffer.
    gate_logits : bool
        ``a`` and ``b`` are logits; otherwise they are g, the logarithm of the decay, and beta.
    """

    dst_dtype: str | None
    scatter_dtype: str | None
    accepted_dtype: str | None
    write_final: bool
    write_buffer: bool
    gate_logits: bool = field(default=True, kw_only=True)

    @property
    def op(self) -> str:
        return "gated_delta_rule_mtp"

    @property
    def sizes(self) -> Sizes:
        return super().sizes._replace(sequential_tokens=SEQUENTIAL_TOKENS, zero_row=self.writes)

    @property
    def writes(self) -> bool:
        """Whether any state is written."""
        return self.write_final or self.write_buffer or self.scatter_dtype is not None
