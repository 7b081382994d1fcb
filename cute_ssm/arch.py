"""The compile targets and their capabilities.  No other module distinguishes GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cute_ssm.errors import UnsupportedArchError

if TYPE_CHECKING:
    import torch

WARP = 32  # lanes of a warp, on every target


@dataclass(frozen=True)
class Arch:
    """One compile target.

    Attributes
    ----------
    name : str
        Name of the target for the compiler, e.g. ``"sm_90a"``.
    capability : tuple of int
        CUDA compute capability that runs it.  Targets with suffix "a" run on this capability only.
    shared_bytes : int
        Shared memory available to one CTA.
    sm_count : int
        Streaming multiprocessors of the reference board (H200, B200, B300); a device's own number takes precedence.
    packed_f32 : bool
        Two float32 operations per instruction (``fma.rn.f32x2``).
    cvt_rs : bool
        Stochastic rounding in hardware (``cvt.rs``).
    """

    name: str
    capability: tuple[int, int]
    shared_bytes: int
    sm_count: int
    packed_f32: bool
    cvt_rs: bool


SM_90A = Arch("sm_90a", (9, 0), 232448, 132, packed_f32=False, cvt_rs=False)
SM_100A = Arch("sm_100a", (10, 0), 232448, 148, packed_f32=True, cvt_rs=True)
SM_103A = Arch("sm_103a", (10, 3), 232448, 148, packed_f32=True, cvt_rs=True)

ARCHS = {arch.name: arch for arch in (SM_90A, SM_100A, SM_103A)}
_BY_CAPABILITY = {arch.capability: arch for arch in ARCHS.values()}


def by_name(name: str) -> Arch:
    """Return the target with this name.

    Raises
    ------
    UnsupportedArchError
        If there is no such target.
    """
    try:
        return ARCHS[name]
    except KeyError:
        raise UnsupportedArchError(
            f"arch: expected one of {', '.join(ARCHS)}, got {name!r}; kernels are compiled for no others"
        ) from None


def of_device(device: torch.device) -> Arch:
    """Return the target of a CUDA device.

    Raises
    ------
    UnsupportedArchError
        If the device's compute capability is not 9.0, 10.0 or 10.3.
    """
    import torch

    capability = torch.cuda.get_device_capability(device)
    if capability not in _BY_CAPABILITY:
        known = ", ".join(f"{a.name} ({a.capability[0]}.{a.capability[1]})" for a in ARCHS.values())
        raise UnsupportedArchError(
            f"device: expected a GPU of {known}, got {torch.cuda.get_device_name(device)} "
            f"({capability[0]}.{capability[1]}); CPU tensors run the PyTorch reference"
        )
    return _BY_CAPABILITY[capability]
