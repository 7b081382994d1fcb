"""The one gradient policy of all operators: none of them builds a graph, on any path.

With grad mode on, an operator refuses a tensor that requires grad, before anything is written.  Weights alone are
exempt: a parameter of a module requires grad whether or not anyone wants gradients, so weights are detached, with one
warning for each operator.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cute_ssm.errors import GradientError, describe

WEIGHTS = frozenset(("A", "A_log", "D", "dt_bias", "delta_bias"))
WITH_GRADIENTS = "cute_ssm.compat.mamba_ssm.selective_scan_fn"
_warned: set[str] = set()  # functions whose weights were detached


def requires_grad(values: Iterable[object]) -> bool:
    """Whether any of the values is a tensor that requires grad; what grad mode is in is not looked at."""
    return any(getattr(value, "requires_grad", False) for value in values)


def refuse(function: str, **tensors: object) -> None:
    """Raise `GradientError` if grad mode is on and one of a function's arguments requires grad."""
    if torch.is_grad_enabled() and requires_grad(tensors.values()):
        _refuse(function, next(name for name, value in tensors.items() if requires_grad((value,))))


def refuse_tangents(function: str, names: Sequence[str], values: Sequence[Any]) -> None:
    """Raise `GradientError` if an argument carries a tangent of forward-mode differentiation."""
    if getattr(forward_ad, "_current_level", 0) < 0:  # no level is open; where it has another name, tensors are asked
        return
    for name, value in zip(names, values):
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:  # type: ignore[no-untyped-call]
            fix = f"{function} has no gradients, not even in forward mode: pass {name}.detach()"
            raise GradientError(describe(name, "a tensor without a tangent", "a dual tensor", fix))


def constants(function: str, names: Sequence[str], values: Sequence[Any]) -> tuple[Any, ...]:
    """Return the arguments of a call, some of which require grad while grad mode is on, as constants.

    Parameters
    ----------
    function : str
        For messages.
    names, values : sequence
        Of all arguments.

    Raises
    ------
    GradientError
        If one that is not in `WEIGHTS` requires grad.
    """
    found = [name for name, value in zip(names, values) if requires_grad((value,))]
    for name in found:
        if name not in WEIGHTS:
            _refuse(function, name)
    if function not in _warned:
        _warned.add(function)
        warnings.warn(
            f"{', '.join(found)}: requires grad, but {function} has no gradients and takes weights as constants; call "
            f"it inside torch.no_grad() or torch.inference_mode(), or pass {found[0]}.detach()",
            stacklevel=5,  # the caller of an operator, of those that call one eagerly
        )
    return tuple(value.detach() if requires_grad((value,)) else value for value in values)


def _refuse(function: str, name: str) -> None:
    fix = (
        f"{function} has no gradients: call it inside torch.no_grad() or torch.inference_mode(), or pass "
        f"{name}.detach(); {WITH_GRADIENTS} alone has gradients"
    )
    raise GradientError(describe(name, "a tensor that does not require grad", "one that does", fix))
