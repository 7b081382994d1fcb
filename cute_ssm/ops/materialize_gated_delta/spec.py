"""The spec of `cute_ssm.serving.materialize_gated_delta`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.ops.gated_delta_rule_replay.spec import GatedDeltaRuleReplaySpec
from cute_ssm.spec import FLOATS, Spec


@dataclass(frozen=True)
class MaterializeGatedDeltaSpec(Spec):
    """A call of `cute_ssm.serving.materialize_gated_delta`.

    Attributes
    ----------
    state_dtype, out_dtype : str
        Types of the pools that are read and written.
    input_dtype : str
        Type of the rings of k and v.
    K, V : int
        Sizes of a key and of a value.
    window : int
        Largest number of pending tokens, one of `WINDOW_BUCKETS`; the window itself is dynamic.
    l2norm : bool
        Normalise k.
    src_dtype, dst_dtype : str
        Types of ``state_batch_indices`` and ``dst_state_batch_indices``.
    count_dtype : str or None
        Type of ``num_tokens``.  None: all pending tokens.
    saturate : bool
        New float16 states beyond +-65504 become that instead of infinite.
    """

    state_dtype: str
    out_dtype: str
    input_dtype: str
    K: int
    V: int
    window: int
    l2norm: bool
    src_dtype: str
    dst_dtype: str
    count_dtype: str | None = None
    saturate: bool = field(default=False, kw_only=True)

    @property
    def op(self) -> str:
        return "serving_materialize_gated_delta"

    def text(self) -> str:
        return f"{self.op}-{self.state_dtype}-{self.out_dtype}-{self.V}x{self.K}-{self.window}"

    @property
    def steps(self) -> GatedDeltaRuleReplaySpec:
        return self.replay()

    def replay(self) -> GatedDeltaRuleReplaySpec:
        """Return the spec of steps over the same states and rings, with as few tokens as a kernel is made for."""
        return GatedDeltaRuleReplaySpec(
            state_dtype=self.state_dtype, input_dtype=self.input_dtype, output_dtype=self.input_dtype,
            gate_dtype="float32", dt_bias_dtype="float32", K=self.K, V=self.V, tokens=4, l2norm=self.l2norm,
            src_dtype=self.src_dtype, zero_padding=False, vector_output=True, window=self.window,
        )  # fmt: skip

    def check(self) -> None:
        if self.out_dtype not in FLOATS:
            raise UnsupportedSpecError(describe("out_dtype", " or ".join(FLOATS), self.out_dtype))
        self.replay().check()
