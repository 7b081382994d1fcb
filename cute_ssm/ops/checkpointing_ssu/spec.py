"""The spec of `cute_ssm.checkpointing_ssu` and `cute_ssm.checkpointing_ssu_ring`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.spec import FLOATS, QUANTISED, Spec, check_alignment

CHECKPOINT_TOKENS = 64  # largest number of tokens of a call, and of rows of a window
CHECKPOINT_DSTATES = (64, 96, 128, 256)
WAIT_FIRST, EARLY_READS = "wait_first", "early_reads"  # kinds of programmatic dependent launch


@dataclass(frozen=True)
class CheckpointingSSUSpec(Spec):
    """A step of `cute_ssm.checkpointing_ssu` or `cute_ssm.checkpointing_ssu_ring`.

    Attributes
    ----------
    state_dtype, input_dtype, A_dtype, dt_dtype : str
        Types of ``state``; of ``x, B, C, z, out`` and of the x and B of the history; of ``A``; of ``dt``.
    D_dtype, dt_bias_dtype : str or None
        None: the argument is absent.
    heads, groups : int
        Heads, and groups of them that share B and C.
    dim, dstate : int
        Rows and columns of one head's state.
    tokens : int
        Largest number of new tokens per sequence, T.
    window : int
        Largest number of pending tokens, W: accepted tokens that are not in the state yet.
    history : {"double", "double_x", "ring"}
        Two buffers per slot of B, dt' and sums, with one buffer of x, or with two; or one ring of rows of x, B and dt'.
    has_z, dt_softplus : bool
        Gate by silu(z); apply softplus to dt.
    src_dtype : str or None
        Type of ``state_batch_indices``.  None: sequence b uses slot b.
    cu_dtype : str or None
        Type of ``cu_seqlens``.  None: all sequences have T tokens.
    work_items : bool
        Slots and cursors come from a list of work items.
    philox_rounds : int
        0: states are rounded to nearest even; else stochastically.
    seed_per_slot : bool
        ``rand_seed`` holds one seed per slot.
    pdl : {None, "wait_first", "early_reads"}
        Programmatic dependent launch: none; all reads and writes after the wait for the previous kernel; or reads of
        states, slots and cursors before it.
    input_bytes : {16, 8, 4, 2}
        Bytes that the addresses and strides of rows of ``x, B, C, z, out`` are multiples of.  16: rows are copied in
        bulk; less: by accesses of that many bytes.
    saturate : bool
        Store +-65504 in place of infinities in new float16 states.
    """

    state_dtype: str
    input_dtype: str
    A_dtype: str
    dt_dtype: str
    D_dtype: str | None
    dt_bias_dtype: str | None
    heads: int
    groups: int
    dim: int
    dstate: int
    tokens: int
    window: int
    history: str = "double"
    has_z: bool = False
    dt_softplus: bool = False
    src_dtype: str | None = None
    cu_dtype: str | None = None
    work_items: bool = False
    philox_rounds: int = 0
    seed_per_slot: bool = False
    pdl: str | None = None
    input_bytes: int = 16
    saturate: bool = field(default=False, kw_only=True)

    @property
    def op(self) -> str:
        return "checkpointing_ssu"

    @property
    def aligned(self) -> bool:
        """Whether rows of new tokens, and of outputs, can be copied in bulk."""
        return self.input_bytes == 16

    @property
    def heads_per_group(self) -> int:
        """Heads that share B and C."""
        return self.heads // self.groups

    @property
    def scaled(self) -> bool:
        """Whether states are quantised, with a scale per row."""
        return self.state_dtype in QUANTISED

    def text(self) -> str:
        sizes = f"{self.dim}x{self.dstate}-{self.tokens}of{self.window}"
        rows = "" if self.aligned else f"-by{self.input_bytes}"
        return f"{self.op}-{self.state_dtype}-{self.input_dtype}-{sizes}-{self.history}{rows}"

    def check(self) -> None:
        if self.state_dtype not in (*FLOATS, *QUANTISED):
            raise UnsupportedSpecError(describe("state_dtype", " or ".join((*FLOATS, *QUANTISED)), self.state_dtype))
        if self.input_dtype not in FLOATS[1:]:
            raise UnsupportedSpecError(describe("input_dtype", " or ".join(FLOATS[1:]), self.input_dtype))
        for name in ("A_dtype", "dt_dtype", "D_dtype", "dt_bias_dtype"):
            value = getattr(self, name)
            if value not in FLOATS and not (value is None and name in ("D_dtype", "dt_bias_dtype")):
                raise UnsupportedSpecError(describe(name, " or ".join(FLOATS), value))
        if self.groups < 1 or self.heads < 1 or self.heads % self.groups:
            raise UnsupportedSpecError(describe("heads", f"a multiple of groups = {self.groups}", self.heads))
        if self.dim % 16 or not 16 <= self.dim <= 128:
            raise UnsupportedSpecError(describe("dim", "a multiple of 16 up to 128", self.dim))
        if self.dstate not in CHECKPOINT_DSTATES:
            raise UnsupportedSpecError(describe("dstate", " or ".join(map(str, CHECKPOINT_DSTATES)), self.dstate))
        for name in ("tokens", "window"):
            if not 1 <= getattr(self, name) <= CHECKPOINT_TOKENS:
                raise UnsupportedSpecError(describe(name, f"1 to {CHECKPOINT_TOKENS}", getattr(self, name)))
        if self.history not in ("double", "double_x", "ring"):
            raise UnsupportedSpecError(describe("history", "double or double_x or ring", self.history))
        check_alignment(self.input_bytes)
        if self.pdl not in (None, WAIT_FIRST, EARLY_READS):
            raise UnsupportedSpecError(describe("pdl", f"None or {WAIT_FIRST} or {EARLY_READS}", self.pdl))
        if self.philox_rounds and self.state_dtype == "float32":
            raise UnsupportedSpecError(
                describe("rand_seed", "None with a float32 state, which is not rounded", "a seed")
            )
