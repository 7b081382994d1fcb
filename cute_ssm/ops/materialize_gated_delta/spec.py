"""The spec of `cute_ssm.serving.materialize_gated_delta`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.ops._gated_delta.spec import Sizes, check_input_dtype, check_sizes, check_window
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
        Type of ``num_tokens``.  None: the argument is absent, and all pending tokens are folded.
    saturate : bool
        Clamp new float16 states to +-65504 instead of making them infinite.
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
    def sizes(self) -> Sizes:
        """Sizes of the kernel's work: those of a step over the same states, with four new tokens."""
        return Sizes(self.K, self.V, tokens=4, pending_tokens=self.window)

    def check(self) -> None:
        for name in ("out_dtype", "state_dtype"):
            if getattr(self, name) not in FLOATS:
                raise UnsupportedSpecError(describe(name, " or ".join(FLOATS), getattr(self, name)))
        check_sizes(self.K, self.V)
        check_input_dtype(self.input_dtype)
        check_window(self.window)
