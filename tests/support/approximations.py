"""How much of a kernel's error comes from approximate functions of the hardware: explicit terms of the bounds.

Kernels compute 2^x, 1 / x and 1 / sqrt(x) by single instructions, for which float32 PyTorch, which most bounds are made
of, has functions that err by less.  What these instructions may err by beyond a rounding is read from
``ptxsim.arithmetic``, and its effect on a result is derived here, to first order and with all errors of one sign: no
assumption is made of how the hardware's errors are spread.  In the emulator's exact arithmetic, and by the reference,
the terms are zero.

The functions below give errors of those in ``cute_ssm.device.math``.  With e = exp(-|x|), or exp(-x) for `fast_silu`:

    decay, power_of_two  a           absolute  ex2 2^23 ulp(a), half of ex2 a where a is just below 1
    softplus             log(1 + e)  absolute  ex2 e / (1 + e) + rcp e (2 + e) / (2 (1 + e)); without rcp if fast
    silu, also fast      x / (1 + e) relative  ex2 sigmoid(-x) + rcp

`exponential` and `sigmoid` use neither ex2 nor an unrefined rcp; a Newton step squares the error of rcp and of rsqrt.

The derivative of log(1 + e) by e is 1 / (1 + e); it is also 2 artanh(s) with s = e / (2 + e), whose derivative by s is
2 / (1 - s^2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cute_ssm import runtime

ULP = 2.0**-23  # of a number in [1, 2), and at most of the value of any normal number


class Errors(NamedTuple):
    """Largest relative errors of instructions beyond the rounding of their results."""

    ex2: float = 0.0
    rcp: float = 0.0

    def any(self) -> bool:
        """Whether some function errs."""
        return any(self)

    def decay(self, a: Tensor) -> Tensor:
        """Largest absolute error of a power of two `a`."""
        return self.ex2 / ULP * torch.exp2(torch.floor(torch.log2(a.clamp(min=2.0**-126))) - 23)

    def softplus(self, x: Tensor, fast: bool = False) -> Tensor:
        """Largest absolute error of softplus(x)."""
        e = torch.exp(-x.double().abs())
        return self.ex2 * e / (1 + e) + (0.0 if fast else self.rcp) * e * (2 + e) / (2 * (1 + e))

    def silu(self, z: Tensor) -> Tensor:
        """Largest relative error of silu(z)."""
        return self.ex2 * torch.sigmoid(-z.double()) + self.rcp


def in_use() -> Errors:
    """Errors of the arithmetic that kernels run with now: zero if it is exact, and where the reference runs."""
    return of(current_arithmetic())


def current_arithmetic() -> Any:
    """The arithmetic of the emulator that kernels run with now, or that stands for a GPU's."""
    from ptxsim import Session, arithmetic

    session = runtime.emulator()
    if session is None:
        return arithmetic.HARDWARE if torch.cuda.is_available() else arithmetic.EXACT
    # of the emulator, or of a GPU
    return session.options.arithmetic if isinstance(session, Session) else arithmetic.HARDWARE


def of(arithmetic: Any) -> Errors:
    """Errors of an arithmetic of the emulator."""
    return Errors() if arithmetic.exact else Errors(*(_relative(op) for op in Errors._fields))


def _relative(op: str) -> float:
    """Largest relative error of an instruction, of normal results."""
    from ptxsim import arithmetic

    return max(e.size * (ULP if e.kind in ("ulp", "rounded") else 1.0) for e in arithmetic.APPROXIMATE[op, "f32"])
