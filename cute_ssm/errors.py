"""Typed errors, and the one shape of their messages: argument, what was expected, what came, the way out."""

from __future__ import annotations


class CuteSsmError(Exception):
    """Base class of the errors that are about this package's own machinery rather than about an argument."""


class UnsupportedArchError(CuteSsmError, RuntimeError):
    """The device, or the requested target, is not one the kernels are compiled for."""


class UnsupportedSpecError(CuteSsmError, ValueError):
    """A legal call that no kernel of this version implements."""


class GradientError(CuteSsmError, ValueError, RuntimeError):
    """Grad mode is on, and an argument of an operator, none of which has gradients, requires grad.

    A `ValueError` like every refused argument, and a `RuntimeError` like what PyTorch's autograd raises.
    """


class CompileError(CuteSsmError, RuntimeError):
    """The compiler refused a kernel; the message carries the spec, the config and the compiler's words."""


def describe(argument: str, expected: str, got: object, fix: str = "") -> str:
    """Return ``argument: expected ..., got ...; fix``, the wording of every argument error."""
    text = f"{argument}: expected {expected}, got {got}"
    return f"{text}; {fix}" if fix else text
