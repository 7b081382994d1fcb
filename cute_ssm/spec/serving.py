"""Specs of what engines need around the operators, `cute_ssm.serving`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.spec.base import FLOATS, Spec
from cute_ssm.spec.operators import GatedDeltaRuleReplaySpec


@dataclass(frozen=True)
class CursorSpec(Spec):
    """What kernels over the cursors of a batch have in common (`cute_ssm.serving`).

    Attributes
    ----------
    ring : bool
        The cursor beside the number of pending tokens is the start of a ring; else the index of the active buffer.
    src_dtype : str or None
        Type of ``state_batch_indices``.  None: sequence b uses slot b.
    cu_dtype : str or None
        Type of ``cu_seqlens``.  None: all sequences have the same number of tokens.
    """

    ring: bool
    src_dtype: str | None
    cu_dtype: str | None

    def text(self) -> str:
        layout = "ring" if self.ring else "double"
        return f"{self.op}-{layout}-{self.src_dtype}-{self.cu_dtype}"


@dataclass(frozen=True)
class CommitSpec(CursorSpec):
    """A call of `cute_ssm.serving.commit`.

    Attributes
    ----------
    accepted_dtype : str
        Type of ``num_accepted_tokens``.
    seeds : bool
        Seeds of the slots advance too.
    unallocated : bool
        A mask says which slots no sequence has.
    """

    accepted_dtype: str
    seeds: bool
    unallocated: bool = False

    @property
    def op(self) -> str:
        return "serving_commit"


@dataclass(frozen=True)
class WorkItemsSpec(CursorSpec):
    """A call of `cute_ssm.serving.build_work_items`."""

    @property
    def op(self) -> str:
        return "serving_build_work_items"


@dataclass(frozen=True)
class MaterializeSpec(Spec):
    """A call of `cute_ssm.serving.materialize`.

    Attributes
    ----------
    state_dtype, out_dtype : str
        Types of the pools that are read and written.
    input_dtype, A_dtype : str
        Types of the history of x and B; of ``A``.
    dim, dstate : int
        Rows and columns of one head's state.
    history : {"double", "double_x", "ring"}
        As of `CheckpointingSSUSpec`.
    src_dtype, dst_dtype : str
        Types of ``state_batch_indices`` and ``dst_state_batch_indices``.
    count_dtype : str or None
        Type of ``num_tokens``.  None: all pending tokens.
    philox_rounds : int
        0: states are rounded to nearest even; else stochastically.
    seed_per_slot : bool
        ``rand_seed`` holds one seed per slot.
    saturate : bool
        New float16 states beyond +-65504 become that instead of infinite.
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
