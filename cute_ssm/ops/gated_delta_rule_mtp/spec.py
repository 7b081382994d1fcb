"""The spec of `cute_ssm.gated_delta_rule_mtp`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cute_ssm.ops._gated_delta.spec import CHUNK, TOKEN_BUCKETS, GatedDeltaSpec, Sizes

SEQUENTIAL_TOKENS = 2  # more take over three times the instructions of products
CHUNKS = {128: CHUNK, 192: 8, 256: 4}  # tokens of one of several chunks, by columns up to which that does not spill


@dataclass(frozen=True)
class GatedDeltaRuleSpec(GatedDeltaSpec):
    """A call of `cute_ssm.gated_delta_rule_mtp`: up to 64 tokens per request.

    More than 16 tokens are processed in chunks: ``tokens`` is then 64.

    Attributes
    ----------
    dst_dtype, scatter_dtype, accepted_dtype : str or None
        Types of ``output_state_indices``, ``ssm_state_indices`` and ``accepted_steps``.  None: the argument is absent.
    write_final, write_buffer : bool
        Write the final state to the pool; write the states after all tokens to the buffer.
    gate_logits : bool
        ``a`` and ``b`` are logits; otherwise they are g, the logarithm of the decay, and beta.
    cu_dtype : str or None
        Type of ``cu_seqlens``.  None: all requests have the same number of tokens.
    """

    dst_dtype: str | None
    scatter_dtype: str | None
    accepted_dtype: str | None
    write_final: bool
    write_buffer: bool
    gate_logits: bool = field(default=True, kw_only=True)
    cu_dtype: str | None = field(default=None, kw_only=True)

    @property
    def op(self) -> str:
        return "gated_delta_rule_mtp"

    @property
    def buckets(self) -> tuple[int, ...]:
        return TOKEN_BUCKETS

    @property
    def sizes(self) -> Sizes:
        # that path has no fewer tokens than its spec, which packed requests may have
        sequential = SEQUENTIAL_TOKENS if self.cu_dtype is None else 1
        sizes = super().sizes._replace(sequential_tokens=sequential, zero_row=self.writes)
        if self.tokens <= CHUNK:
            return sizes
        chunk = next(tokens for columns, tokens in CHUNKS.items() if self.K <= columns)
        return sizes._replace(tokens=chunk, one_tile=True)

    def text(self) -> str:
        return super().text() + ("" if self.cu_dtype is None else "-packed")

    @property
    def writes(self) -> bool:
        """Whether any state is written."""
        return self.write_final or self.write_buffer or self.scatter_dtype is not None
