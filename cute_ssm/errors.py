"""Typed errors, and the common form of their messages: argument, expected value, actual value, suggested fix."""

from __future__ import annotations


class CuteSsmError(Exception):
    """Base class of errors that are not about an argument: compiler, cache, kernels, targets."""


class UnsupportedArchError(CuteSsmError, RuntimeError):
    """No kernel is compiled for the device or the requested target."""


class UnsupportedSpecError(CuteSsmError, ValueError):
    """A valid call that no kernel of this version implements."""


class GradientError(CuteSsmError, ValueError, RuntimeError):
    """An operator without gradients was called with grad mode on and an argument that requires grad.

    Both a `ValueError`, as for other invalid arguments, and a `RuntimeError`, as PyTorch's autograd raises.
    """


class CompileError(CuteSsmError, RuntimeError):
    """A kernel could not be compiled; the message contains the spec, the config and the compiler's error."""


class NotInBundleError(CompileError):
    """No bundle has the kernel, and no compiler is installed."""


def describe(argument: str, expected: str, got: object, fix: str = "") -> str:
    """Return ``argument: expected ..., got ...; fix``, the wording of every argument error."""
    text = f"{argument}: expected {expected}, got {got}"
    return f"{text}; {fix}" if fix else text
