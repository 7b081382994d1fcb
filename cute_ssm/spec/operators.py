"""Specs of the operators."""

from __future__ import annotations

from dataclasses import dataclass, field

from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.spec.base import FLOATS, QUANTISED, Spec, check_alignment


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
        replace those that were read.
    update_state : bool
        Write new states to ``state``.
    zero_padding : bool
        Rows of ``out`` whose sequence is padding become zero instead of staying as they are.
    vector_inputs : bool
        Rows of B, C and (unless tied) A are aligned for vector loads.
    tokens : {"one", "batched", "packed"}
        One token per sequence; the same number of tokens for all, (batch, T, ...); or (total, ...) with ``cu_seqlens``.
    accepted_dtype, cu_dtype : str or None
        Types of ``num_accepted_tokens`` and ``cu_seqlens``.
    src_columns, dst_columns : bool
        Index matrices: a column chosen by ``num_accepted_tokens``; a destination for every token.
    intermediates : bool
        The state after every token goes to ``intermediate_states_buffer``.
    intermediate_dtype : str or None
        Type of ``intermediate_state_indices``; None: the rows are those of the slots that are read.
    philox_rounds : int
        0: states are rounded to nearest even; else stochastically.
    seed_per_slot : bool
        ``rand_seed`` holds one seed per slot.
    saturate : bool
        New float16 states beyond +-65504 become that instead of infinite.
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
        if not 16 <= self.dstate <= 256:
            raise UnsupportedSpecError(describe("dstate", "16 to 256", self.dstate))
        if self.dstate % 8 and (self.scaled or self.philox_rounds):
            what = "a multiple of 8 for quantised states and stochastic rounding"
            raise UnsupportedSpecError(describe("dstate", what, self.dstate))
        if self.philox_rounds and self.state_dtype == "float32":
            raise UnsupportedSpecError(
                describe("rand_seed", "None with a float32 state, which is not rounded", "a seed")
            )


@dataclass(frozen=True)
class SelectiveScanSpec(Spec):
    """A scan of `cute_ssm.selective_scan` over many tokens per sequence.

    Attributes
    ----------
    input_dtype : str
        Type of ``u, delta, B, C, z`` and of the outputs.  ``A``, ``D`` and ``delta_bias`` are float32.
    state_dtype : str or None
        Type of ``ssm_states``.  None: scans start from zero, and final states are not kept.
    dstate : int
        States of a channel.
    has_D, has_z, has_bias, delta_softplus : bool
        Skip term; gate by silu(z); bias of delta; softplus of delta.
    query_dtype : str or None
        Type of ``query_start_loc``.  None: all sequences have the same length.
    cache_dtype : str or None
        Type of ``cache_indices`` and of all that describes blocks.  None: sequence b uses slot b, and none is null.
    has_initial : bool
        ``has_initial_state`` says which sequences start from their slot.  Otherwise all start from zero.
    blocks, chunks : bool
        Prefix caching: states are saved at the ends of blocks, or, with ``chunks``, of the engine's chunks.
    ungated : bool
        The output before the gate is stored as well.
    aligned, aligned_states : bool
        Rows of tokens, and rows of states and of A, allow accesses of 16 bytes.
    saturate : bool
        New float16 states beyond +-65504 become that instead of infinite.
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


TOKEN_BUCKETS = (1, 2, 4, 8, 16)


def token_bucket(tokens: int) -> int:
    """Return the number of tokens that the kernel for `tokens` (1 to 16) of them is made for."""
    return _bucket("tokens", tokens, TOKEN_BUCKETS)


WINDOW_BUCKETS = (8, 16, 32, 64)
DELTA_SIZES = range(16, 257, 16)  # of keys; and of values, which may also have 512 elements


def window_bucket(window: int) -> int:
    """Return the number of pending tokens that the kernel for a window of 1 to 64 is made for."""
    return _bucket("window", window, WINDOW_BUCKETS)


def _bucket(name: str, number: int, buckets: tuple[int, ...]) -> int:
    if not 1 <= number <= buckets[-1]:
        raise UnsupportedSpecError(describe(name, f"1 to {buckets[-1]}", number))
    return next(bucket for bucket in buckets if number <= bucket)


@dataclass(frozen=True)
class GatedDeltaSpec(Spec):
    """What calls of the gated delta rule have in common.

    Attributes
    ----------
    state_dtype, input_dtype, output_dtype, gate_dtype, dt_bias_dtype : str
        Types of the states; of ``q, k, v``; of ``output``; of ``a, b``; of ``dt_bias``.  ``A_log`` is float32.
    K, V : int
        Sizes of a key and of a value.
    tokens : int
        Largest number of tokens per request, one of `TOKEN_BUCKETS`; the number itself is dynamic.
    l2norm : bool
        Normalise q and k.
    src_dtype : str
        Type of ``initial_state_indices``.
    zero_padding : bool
        Rows of ``output`` whose request is padding become zero instead of staying as they are.
    vector_output : bool
        Rows of a 16-bit ``output`` are aligned for stores of 16 bytes.
    input_bytes : {16, 8, 4, 2}
        Widest access to ``q, k, v``.  16: rows of q and k are aligned to 8 bytes, those of v to 16.
    saturate : bool
        New float16 states beyond +-65504 become that instead of infinite.
    """

    state_dtype: str
    input_dtype: str
    output_dtype: str
    gate_dtype: str
    dt_bias_dtype: str
    K: int
    V: int
    tokens: int
    l2norm: bool
    src_dtype: str
    zero_padding: bool
    vector_output: bool
    input_bytes: int = field(default=16, kw_only=True)
    saturate: bool = field(default=False, kw_only=True)

    def text(self) -> str:
        rows = "" if self.input_bytes == 16 else f"-by{self.input_bytes}"
        return f"{self.op}-{self.state_dtype}-{self.input_dtype}-{self.V}x{self.K}-{self.tokens}{rows}"

    def check(self) -> None:
        if self.K not in DELTA_SIZES:
            raise UnsupportedSpecError(describe("K", "a multiple of 16 up to 256", self.K))
        if self.V not in DELTA_SIZES and self.V != 512:
            raise UnsupportedSpecError(describe("V", "a multiple of 16 up to 256, or 512", self.V))
        for name in ("state_dtype", "output_dtype", "gate_dtype", "dt_bias_dtype"):
            if getattr(self, name) not in FLOATS:
                raise UnsupportedSpecError(describe(name, " or ".join(FLOATS), getattr(self, name)))
        if self.input_dtype not in FLOATS[1:]:
            raise UnsupportedSpecError(describe("input_dtype", " or ".join(FLOATS[1:]), self.input_dtype))
        if self.tokens not in TOKEN_BUCKETS:
            raise UnsupportedSpecError(describe("tokens", f"one of {TOKEN_BUCKETS}", self.tokens))
        check_alignment(self.input_bytes)


@dataclass(frozen=True)
class GatedDeltaRuleSpec(GatedDeltaSpec):
    """Up to 16 tokens per request of `cute_ssm.gated_delta_rule_mtp`.

    Attributes
    ----------
    dst_dtype, scatter_dtype, accepted_dtype : str or None
        Types of ``output_state_indices``, ``ssm_state_indices`` and ``accepted_steps``.  None: the argument is absent.
    write_final, write_buffer : bool
        Write the final state to the pool; write the states after all tokens to the buffer.
    gate_logits : bool
        ``a`` and ``b`` are logits; else they are g, the logarithm of the decay, and beta.
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
    def writes(self) -> bool:
        """Whether any state is written."""
        return self.write_final or self.write_buffer or self.scatter_dtype is not None


@dataclass(frozen=True)
class GatedDeltaRuleReplaySpec(GatedDeltaSpec):
    """Up to 16 tokens per request of `cute_ssm.gated_delta_rule_replay`, after up to 64 pending ones.

    Attributes
    ----------
    window : int
        Largest number of pending tokens, one of `WINDOW_BUCKETS`; the window itself is dynamic.
    """

    window: int

    @property
    def op(self) -> str:
        return "gated_delta_rule_replay"

    def text(self) -> str:
        return f"{super().text()}-{self.window}"

    def check(self) -> None:
        super().check()
        if self.window not in WINDOW_BUCKETS:
            raise UnsupportedSpecError(describe("window", f"one of {WINDOW_BUCKETS}", self.window))


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
        Largest number of tokens that are accepted but not yet in the state, W.
    history : {"double", "double_x", "ring"}
        Two buffers per slot of B, dt' and their sums, and one of x; two of x also; or one ring of rows of all.
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
        Launch without waiting for the end of the kernel before (programmatic dependent launch): not at all, with all
        memory used after the wait for it, or with states, slots and cursors read before.
    input_bytes : {16, 8, 4, 2}
        What the addresses and strides of rows of ``x, B, C, z, out`` are multiples of.  16: they are copied in bulk;
        less: by accesses of so many bytes.
    saturate : bool
        New float16 states beyond +-65504 become that instead of infinite.
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
