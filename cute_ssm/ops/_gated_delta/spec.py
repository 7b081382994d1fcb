"""What the specs of the gated delta rule share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.spec import FLOATS, Spec, check_alignment

CHUNK_BUCKETS = (1, 2, 4, 8, 16)  # of tokens that are multiplied at once
CHUNK = CHUNK_BUCKETS[-1]
TOKEN_BUCKETS = (*CHUNK_BUCKETS, 64)
WINDOW_BUCKETS = (8, 16, 32, 64)
KEY_SIZES = range(16, 257, 16)
VALUE_SIZES = (*KEY_SIZES, 512)


class Sizes(NamedTuple):
    """Sizes of a kernel's work, which its config and its use of shared memory depend on.

    Attributes
    ----------
    K, V : int
        Sizes of a key and of a value.
    tokens : int
        Largest number of new tokens of a chunk.
    pending_tokens : int
        Largest number of accepted tokens that are not in the state yet.
    sequential_tokens : int
        Largest number of tokens that the kernel can process one after the other, without products; 0: it cannot.
    zero_row : bool
        Whether a row of zeros follows the keys in shared memory.
    one_tile : bool
        Whether a warp has one tile, which stays in its registers from chunk to chunk.
    """

    K: int
    V: int
    tokens: int
    pending_tokens: int = 0
    sequential_tokens: int = 0
    zero_row: bool = False
    one_tile: bool = False


def token_bucket(tokens: int, buckets: tuple[int, ...] = CHUNK_BUCKETS) -> int:
    """Return the ``tokens`` of the spec for a number of tokens, at least 1: the next entry of `buckets`."""
    return _bucket("tokens", tokens, buckets)


def window_bucket(window: int) -> int:
    """Return the ``window`` of the spec for a window of 1 to 64: the next entry of `WINDOW_BUCKETS`."""
    return _bucket("window", window, WINDOW_BUCKETS)


def _bucket(name: str, number: int, buckets: tuple[int, ...]) -> int:
    if not 1 <= number <= buckets[-1]:
        raise UnsupportedSpecError(describe(name, f"1 to {buckets[-1]}", number))
    return next(bucket for bucket in buckets if number <= bucket)


def check_sizes(K: int, V: int) -> None:
    """Raise unless kernels exist for keys of K and values of V elements."""
    if K not in KEY_SIZES:
        raise UnsupportedSpecError(describe("K", "a multiple of 16 up to 256", K))
    if V not in VALUE_SIZES:
        raise UnsupportedSpecError(describe("V", "a multiple of 16 up to 256, or 512", V))


def check_input_dtype(input_dtype: str) -> None:
    """Raise unless keys and values may have this type."""
    if input_dtype not in FLOATS[1:]:
        raise UnsupportedSpecError(describe("input_dtype", " or ".join(FLOATS[1:]), input_dtype))


def check_window(window: int) -> None:
    """Raise unless the window is one of `WINDOW_BUCKETS`."""
    if window not in WINDOW_BUCKETS:
        raise UnsupportedSpecError(describe("window", f"one of {WINDOW_BUCKETS}", window))


@dataclass(frozen=True)
class GatedDeltaSpec(Spec):
    """Fields that the specs of steps over new tokens share.

    Attributes
    ----------
    state_dtype, input_dtype, output_dtype, gate_dtype, dt_bias_dtype : str
        Types of the states; of ``q, k, v``; of ``output``; of ``a, b``; of ``dt_bias``.  ``A_log`` is float32.
    K, V : int
        Sizes of a key and of a value.
    tokens : int
        Largest number of tokens per request, one of `CHUNK_BUCKETS`; the number itself is dynamic.
    l2norm : bool
        Normalise q and k.
    src_dtype : str
        Type of ``initial_state_indices``.
    zero_padding : bool
        Store zeros in the rows of ``output`` whose request is padding; otherwise they are left unchanged.
    vector_output : bool
        ``output`` has 16-bit elements, in rows that are aligned for stores of 16 bytes.
    input_bytes : {16, 8, 4, 2}
        Widest access to ``q, k, v`` in bytes.  16: rows of q and k are aligned to 8 bytes, those of v to 16.
    saturate : bool
        Clamp new float16 states to +-65504 instead of making them infinite.
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
    def buckets(self) -> tuple[int, ...]:
        """What `tokens` may be."""
        return CHUNK_BUCKETS

    @property
    def sizes(self) -> Sizes:
        """Sizes of the kernel's work."""
        return Sizes(self.K, self.V, self.tokens)

    def text(self) -> str:
        rows = "" if self.input_bytes == 16 else f"-by{self.input_bytes}"
        return f"{self.op}-{self.state_dtype}-{self.input_dtype}-{self.V}x{self.K}-{self.tokens}{rows}"

    def check(self) -> None:
        check_sizes(self.K, self.V)
        for name in ("state_dtype", "output_dtype", "gate_dtype", "dt_bias_dtype"):
            if getattr(self, name) not in FLOATS:
                raise UnsupportedSpecError(describe(name, " or ".join(FLOATS), getattr(self, name)))
        check_input_dtype(self.input_dtype)
        if self.tokens not in self.buckets:
            raise UnsupportedSpecError(describe("tokens", f"one of {self.buckets}", self.tokens))
        check_alignment(self.input_bytes)
