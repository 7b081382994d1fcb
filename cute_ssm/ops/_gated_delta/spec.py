"""What specs of the gated delta rule have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.spec import FLOATS, Spec, check_alignment

TOKEN_BUCKETS = (1, 2, 4, 8, 16)
WINDOW_BUCKETS = (8, 16, 32, 64)
DELTA_SIZES = range(16, 257, 16)  # of keys; and of values, which may also have 512 elements


def token_bucket(tokens: int) -> int:
    """Return the number of tokens that the kernel for `tokens` (1 to 16) of them is made for."""
    return _bucket("tokens", tokens, TOKEN_BUCKETS)


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

    @property
    def steps(self) -> GatedDeltaSpec:
        """The spec of steps over the states: this one."""
        return self

    @property
    def pending_tokens(self) -> int:
        """Largest number of tokens that a state lags behind."""
        return 0

    @property
    def sequential_tokens(self) -> int:
        """Largest number of tokens that a kernel can take one after the other, without products; 0: it cannot."""
        return 0

    @property
    def zero_row(self) -> bool:
        """Whether shared memory has a row of zeros behind the keys."""
        return False

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
