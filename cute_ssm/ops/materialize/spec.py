"""The spec of `cute_ssm.serving.materialize`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.spec import Spec


@dataclass(frozen=True)
class MaterializeSpec(Spec):
    """A call of `cute_ssm.serving.materialize`.

    Attributes
    ----------
    state_dtype, out_dtype : str
        Types of the pools that are read and written.
    input_dtype, A_dtype : str
        Type of ``x_history`` and ``B_history``; type of ``A``.
    dim, dstate : int
        Rows and columns of one head's state.
    history : {"double", "double_x", "ring"}
        Two buffers of B and dt', and one or two (``double_x``) of x; or one ring.
    src_dtype, dst_dtype : str
        Types of ``state_batch_indices`` and ``dst_state_batch_indices``.
    count_dtype : str or None
        Type of ``num_tokens``.  None: all pending tokens are folded.
    philox_rounds : int
        0: states are rounded to nearest even; otherwise stochastically, by this many rounds.
    seed_per_slot : bool
        ``rand_seed`` holds one seed per slot.
    saturate : bool
        New float16 states beyond +-65504 are stored as +-65504 instead of infinities.
    """

    state_dtype: str
    out_dtype: str
    input_dtype: str
    A_dtype: str
    dim: int
    dstate: int
    history: str
    src_dtype: str
    dst_dtype: str
    count_dtype: str | None = None
    philox_rounds: int = 0
    seed_per_slot: bool = False
    saturate: bool = field(default=False, kw_only=True)

    @property
    def op(self) -> str:
        return "serving_materialize"

    def text(self) -> str:
        return f"{self.op}-{self.state_dtype}-{self.out_dtype}-{self.dim}x{self.dstate}-{self.history}"

    def check(self) -> None:
        for name in ("dim", "dstate"):
            if getattr(self, name) % 8 or not 8 <= getattr(self, name) <= 256:
                raise UnsupportedSpecError(describe(name, "a multiple of 8 up to 256", getattr(self, name)))
