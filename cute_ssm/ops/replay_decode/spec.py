"""The spec of `cute_ssm.compat.vllm.selective_state_update_replayssm_output_only`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.spec import FLOATS, Spec


@dataclass(frozen=True)
class ReplayDecodeSpec(Spec):
    """A call of `cute_ssm.compat.vllm.selective_state_update_replayssm_output_only`.

    Attributes
    ----------
    state_dtype, input_dtype, A_dtype, dt_dtype : str
        Types of ``state``; of ``x, B, C, z, out`` and the caches of x and B; of ``A``; of ``dt``.
    D_dtype, dt_bias_dtype : str or None
        None: the argument is absent.
    dim, dstate : int
        Rows and columns of one head's state.
    has_z, dt_softplus : bool
        Gate by silu(z); apply softplus to dt.
    src_dtype : str or None
        Type of ``state_batch_indices``.  None: sequence b uses slot b.
    vector_inputs : bool
        Rows of B and C are aligned, so that they can be read by vector loads.
    philox_rounds : int
        0: states are rounded to nearest even; otherwise stochastically, by this many rounds.
    saturate : bool
        New float16 states beyond +-65504 are stored as +-65504 instead of infinities.
    """

    state_dtype: str
    input_dtype: str
    A_dtype: str
    dt_dtype: str
    D_dtype: str | None
    dt_bias_dtype: str | None
    dim: int
    dstate: int
    has_z: bool
    dt_softplus: bool
    src_dtype: str | None
    vector_inputs: bool
    philox_rounds: int = 0
    saturate: bool = field(default=False, kw_only=True)

    @property
    def op(self) -> str:
        return "replay_decode"

    def text(self) -> str:
        return f"{self.op}-{self.state_dtype}-{self.input_dtype}-{self.dim}x{self.dstate}"

    def check(self) -> None:
        for name in ("state_dtype", "input_dtype", "A_dtype", "dt_dtype", "D_dtype", "dt_bias_dtype"):
            value = getattr(self, name)
            if value not in FLOATS and not (value is None and name in ("D_dtype", "dt_bias_dtype")):
                raise UnsupportedSpecError(describe(name, " or ".join(FLOATS), value))
        for name in ("dim", "dstate"):
            if getattr(self, name) % 8 or not 8 <= getattr(self, name) <= 256:
                raise UnsupportedSpecError(describe(name, "a multiple of 8 up to 256", getattr(self, name)))
