"""The spec of `cute_ssm.selective_scan`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.spec import FLOATS, Spec


@dataclass(frozen=True)
class SelectiveScanSpec(Spec):
    """A scan of `cute_ssm.selective_scan` over many tokens per sequence.

    Attributes
    ----------
    input_dtype : str
        Type of ``u, delta, B, C, z`` and of the outputs.  ``A``, ``D`` and ``delta_bias`` are float32.
    state_dtype : str or None
        Type of ``ssm_states``.  None: scans start from zero, and final states are not stored.
    dstate : int
        States of a channel.
    has_D, has_z, has_bias, delta_softplus : bool
        Whether there is a skip term, a gate by silu(z), a bias of delta, and softplus is applied to delta.
    query_dtype : str or None
        Type of ``query_start_loc``.  None: all sequences have the same length.
    cache_dtype : str or None
        Type of ``cache_indices`` and of the tensors that describe blocks.  None: sequence b uses slot b.
    has_initial : bool
        ``has_initial_state`` is given.  Otherwise all sequences start from zero.
    blocks, chunks : bool
        Prefix caching: states are saved at the ends of blocks or, with ``chunks``, of the chunks in
        ``cu_chunk_seqlen``.
    ungated : bool
        The output before the gate is stored as well.
    aligned, aligned_states : bool
        Rows of tokens are aligned to 16 bytes; rows of states and of A are aligned to quads of states.
    saturate : bool
        New float16 states beyond +-65504 are stored as +-65504 instead of infinities.
    """

    input_dtype: str
    state_dtype: str | None
    dstate: int
    has_D: bool
    has_z: bool
    has_bias: bool
    delta_softplus: bool
    query_dtype: str | None
    cache_dtype: str | None
    has_initial: bool
    blocks: bool
    chunks: bool
    ungated: bool
    aligned: bool
    aligned_states: bool
    saturate: bool = field(default=False, kw_only=True)

    @property
    def op(self) -> str:
        return "selective_scan"

    def text(self) -> str:
        layout = "dense" if self.query_dtype is None else "varlen"
        return f"selective_scan-{self.input_dtype}-{self.state_dtype}-{self.dstate}-{layout}"

    def check(self) -> None:
        if self.input_dtype not in FLOATS:
            raise UnsupportedSpecError(describe("input_dtype", " or ".join(FLOATS), self.input_dtype))
        if self.state_dtype not in (None, "float32", self.input_dtype):
            raise UnsupportedSpecError(describe("state_dtype", f"float32 or {self.input_dtype}", self.state_dtype))
        if not 1 <= self.dstate <= 256:
            raise UnsupportedSpecError(describe("dstate", "1 to 256", self.dstate))
