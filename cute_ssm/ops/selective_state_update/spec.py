"""The spec of `cute_ssm.selective_state_update`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.spec import FLOATS, QUANTISED, Spec


@dataclass(frozen=True)
class SelectiveStateUpdateSpec(Spec):
    """A call of `cute_ssm.selective_state_update`.

    Attributes
    ----------
    state_dtype, input_dtype, A_dtype, dt_dtype : str
        Types of ``state``; of ``x, B, C, z, out``; of ``A``; of ``dt``.
    D_dtype, dt_bias_dtype : str or None
        None: the argument is absent.
    dim, dstate : int
        Rows and columns of one head's state.
    A_tied, dt_tied, D_tied : bool
        ``A`` holds one value per head; ``dt`` and ``dt_bias`` do; ``D`` does (Mamba-2).  Otherwise ``A`` varies over
        dim and dstate, the others over dim (Mamba-1).
    has_z, dt_softplus : bool
        Gate by silu(z); apply softplus to dt.
    src_dtype, dst_dtype : str or None
        Types of ``state_batch_indices`` and ``dst_state_batch_indices``.  None: sequence b reads slot b; new states
        replace the states that were read.
    update_state : bool
        Write new states to ``state``.
    zero_padding : bool
        Write zeros to rows of ``out`` whose sequence is padding, instead of leaving them unchanged.
    vector_inputs : bool
        Rows of B, C and (unless tied) A are aligned, so that they can be read by vector loads.
    tokens : {"one", "batched", "packed"}
        One token per sequence; the same number of tokens for all, (batch, T, ...); or (total, ...) with ``cu_seqlens``.
    accepted_dtype, cu_dtype : str or None
        Types of ``num_accepted_tokens`` and ``cu_seqlens``.
    src_columns, dst_columns : bool
        Index matrices: a column chosen by ``num_accepted_tokens``; a destination for every token.
    intermediates : bool
        Write the state after every token to ``intermediate_states_buffer``.
    intermediate_dtype : str or None
        Type of ``intermediate_state_indices``; None: the rows are the slots that are read.
    philox_rounds : int
        0: round states to nearest even; otherwise the rounds of Philox for stochastic rounding.
    seed_per_slot : bool
        ``rand_seed`` holds one seed per slot.
    saturate : bool
        Clamp new float16 states to +-65504 instead of letting them overflow to infinity.
    """

    state_dtype: str
    input_dtype: str
    A_dtype: str
    dt_dtype: str
    D_dtype: str | None
    dt_bias_dtype: str | None
    dim: int
    dstate: int
    A_tied: bool
    dt_tied: bool
    D_tied: bool
    has_z: bool
    dt_softplus: bool
    src_dtype: str | None
    dst_dtype: str | None
    update_state: bool
    zero_padding: bool
    vector_inputs: bool
    tokens: str = "one"
    accepted_dtype: str | None = None
    cu_dtype: str | None = None
    src_columns: bool = False
    dst_columns: bool = False
    intermediates: bool = False
    intermediate_dtype: str | None = None
    philox_rounds: int = 0
    seed_per_slot: bool = False
    saturate: bool = field(default=False, kw_only=True)

    @property
    def op(self) -> str:
        return "selective_state_update"

    @property
    def scaled(self) -> bool:
        """Whether states are quantised, with a scale per row."""
        return self.state_dtype in QUANTISED

    @property
    def decay_tied(self) -> bool:
        """Whether one decay per head and token holds."""
        return self.A_tied and self.dt_tied

    @property
    def writes_last_state(self) -> bool:
        """Whether the state after the last token of a sequence is written, and to one slot."""
        return self.update_state and not self.dst_columns

    @property
    def writes_every_state(self) -> bool:
        """Whether the state after every token is written."""
        return self.intermediates or (self.update_state and self.dst_columns)

    def text(self) -> str:
        layout = "tied" if self.A_tied else "dense"
        tokens = "" if self.tokens == "one" else f"-{self.tokens}"
        return f"{self.op}-{self.state_dtype}-{self.input_dtype}-{self.dim}x{self.dstate}-{layout}{tokens}"

    def check(self) -> None:
        if self.state_dtype not in (*FLOATS, *QUANTISED):
            raise UnsupportedSpecError(describe("state_dtype", " or ".join((*FLOATS, *QUANTISED)), self.state_dtype))
        for name in ("input_dtype", "A_dtype", "dt_dtype", "D_dtype", "dt_bias_dtype"):
            value = getattr(self, name)
            if value not in FLOATS and not (value is None and name in ("D_dtype", "dt_bias_dtype")):
                raise UnsupportedSpecError(describe(name, " or ".join(FLOATS), value))
        if self.dim < 8 or self.dim % 8:
            raise UnsupportedSpecError(describe("dim", "a positive multiple of 8", self.dim))
        if not 8 <= self.dstate <= 256:
            raise UnsupportedSpecError(describe("dstate", "8 to 256", self.dstate))
        if self.dstate % 8 and (self.scaled or self.philox_rounds):
            what = "a multiple of 8 for quantised states and stochastic rounding"
            raise UnsupportedSpecError(describe("dstate", what, self.dstate))
        if self.philox_rounds and self.state_dtype == "float32":
            expected = "None with a float32 state, which is not rounded"
            raise UnsupportedSpecError(describe("rand_seed", expected, "a seed"))
