"""What a kernel computes (spec) and how fast (config): frozen, hashable, free of torch and of the compiler.

Spec, config and target together are the only input of a compile, so they are the cache key by construction.  Batch,
slots and strides are in neither: they are dynamic.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

from cute_ssm.errors import UnsupportedSpecError

FLOATS = ("float32", "bfloat16", "float16")
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "int64": 8}


@dataclass(frozen=True)
class Spec:
    """Base of all specs.  A subclass names its operator and lists what its kernel is specialised on."""

    @property
    def op(self) -> str:
        """Name of the operator, as in ``cute_ssm.<op>``."""
        raise TypeError(f"{type(self).__name__} names no operator")

    def check(self) -> None:
        """Raise `UnsupportedSpecError` if no kernel implements this spec; compiles nothing."""

    def text(self) -> str:
        """Return a short readable name, a part of the names of cached files."""
        raise TypeError(f"{type(self).__name__} has no readable name")


@dataclass(frozen=True)
class Config:
    """Base of all configs: what may change a kernel's speed and nothing else."""


def digest(*parts: object, length: int = 12) -> str:
    """Return a hexadecimal digest of frozen dataclasses, strings and numbers that is stable between processes."""
    text = "|".join(
        f"{type(part).__qualname__}{sorted(dataclasses.asdict(part).items())!r}"  # type: ignore[call-overload]
        if dataclasses.is_dataclass(part)
        else repr(part)
        for part in parts
    )
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@dataclass(frozen=True)
class SelectiveStateUpdateSpec(Spec):
    """One token per sequence of `cute_ssm.selective_state_update`.

    Attributes
    ----------
    state_dtype, input_dtype, A_dtype, dt_dtype : str
        Types of ``state``; of ``x, B, C, z, out``; of ``A``; of ``dt``.
    D_dtype, dt_bias_dtype : str or None
        None: the argument is absent.
    dim, dstate : int
        Rows and columns of one head's state.  ``dim`` only chooses tiles: kernels take any multiple of their tile.
    tied : bool
        ``A``, ``dt`` and ``dt_bias`` hold one value per head (Mamba-2).  Otherwise ``A`` varies over dim and dstate and
        ``dt`` over dim (Mamba-1).
    has_z, dt_softplus : bool
        Gate by silu(z); apply softplus to dt.
    index_dtype : str or None
        Type of ``state_batch_indices``; None: sequence b owns slot b.
    has_dst : bool
        New states go to ``dst_state_batch_indices`` (of the same type).
    update_state : bool
        Write the new state.
    vector_inputs : bool
        Rows of x, B, C, z, A are aligned for vector loads.
    """

    state_dtype: str
    input_dtype: str
    A_dtype: str
    dt_dtype: str
    D_dtype: str | None
    dt_bias_dtype: str | None
    dim: int
    dstate: int
    tied: bool
    has_z: bool
    dt_softplus: bool
    index_dtype: str | None
    has_dst: bool
    update_state: bool
    vector_inputs: bool

    @property
    def op(self) -> str:
        return "selective_state_update"

    def text(self) -> str:
        layout = "tied" if self.tied else "dense"
        return f"ssu-{self.state_dtype}-{self.input_dtype}-{self.dim}x{self.dstate}-{layout}"

    def check(self) -> None:
        for name in ("state_dtype", "input_dtype", "A_dtype", "dt_dtype"):
            if getattr(self, name) not in FLOATS:
                raise UnsupportedSpecError(f"{name}: expected one of {', '.join(FLOATS)}, got {getattr(self, name)}")
