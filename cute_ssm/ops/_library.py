"""Registration of operators with PyTorch, by the low-level `torch.library.Library`.

`torch.library.custom_op` would cost tens of microseconds a call; this costs a few, and eager calls bypass even that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from cute_ssm.errors import describe
from cute_ssm.ops._gradients import constants, refuse_tangents, requires_grad

NAMESPACE = "cute_ssm"
_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
transform_level = torch._C._functorch.maybe_current_level  # of ``torch.func``; None outside of its transforms


def refuse_batched(names: Sequence[str], values: Sequence[Any]) -> None:
    """Raise if a tensor is one of ``torch.func.vmap``."""
    for name, value in zip(names, values):
        if isinstance(value, torch.Tensor) and torch._C._functorch.is_batchedtensor(value):
            fix = "operators have no rule for vmap: make its axis a part of the batch"
            raise ValueError(describe(name, "a tensor with memory of its own", "one that vmap has batched", fix))


class Registered(NamedTuple):
    """Ways to call an operator; both keep to the policy of `_gradients`.

    Attributes
    ----------
    overload : callable
        Calls through PyTorch's dispatcher: ``torch.ops.cute_ssm.name.default``.
    route : callable
        Of one of the tensors of a call, what to call: `overload` where something traces the tensor; else the
        implementation, behind checks for gradients in grad mode and inside transforms of ``torch.func``.
    """

    overload: Callable[..., None]
    route: Callable[[object], Callable[..., None]]


def register(
    schema: str,
    implementation: Callable[..., None],
    fake: Callable[..., None] = lambda *_: None,
    *,
    eager: Callable[..., None] | None = None,
    names: Callable[[dict[str, Any]], Mapping[str, str]] | None = None,
) -> Registered:
    """Define an operator that mutates arguments and returns nothing.

    Parameters
    ----------
    schema : str
        ``"name(Tensor(a!) state, ...) -> ()"``.
    implementation : callable
        Runs the operator on CPU and CUDA tensors alike; no tensor that it gets requires grad while grad mode is on.
    fake : callable
        Its shape function; returns None like the operator.
    eager : callable, optional
        Runs calls of plain tensors, with as many arguments; None: `implementation`.
    names : callable, optional
        Of the arguments of a call, what its caller calls those that the schema calls otherwise.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    overload: Any = getattr(getattr(torch.ops, NAMESPACE), name).default
    arguments = tuple(argument.name for argument in overload._schema.arguments)
    tensors = itemgetter(*(i for i, a in enumerate(overload._schema.arguments) if "Tensor" in str(a.type)))
    run = eager or implementation

    def checked(values: tuple[Any, ...]) -> tuple[Any, ...]:
        try:
            found = True in [tensor.requires_grad for tensor in tensors(values) if tensor is not None]
        except AttributeError:  # one is no tensor, which the implementation names
            found = requires_grad(values)
        if not found:
            refuse_tangents(name, arguments, values)
            return values
        other = names(dict(zip(arguments, values))) if names else {}
        return constants(name, [other.get(argument, argument) for argument in arguments], values)

    def run_eagerly(*values: Any) -> None:
        if torch.is_grad_enabled():
            values = checked(values)
        try:
            run(*values)
        except RuntimeError:  # whatever asks a batched tensor for its memory or its contents
            refuse_batched(arguments, values)
            raise

    def run_below_autograd(*values: Any) -> None:
        if torch.is_grad_enabled():
            values = checked(values)
        with torch._C._AutoDispatchBelowAutograd():
            overload(*values)

    _library.impl(name, run_below_autograd, "Autograd")

    def route(tensor: object) -> Callable[..., None]:
        if type(tensor) is not Tensor or is_compiling():
            return overload if isinstance(tensor, Tensor) else run  # `run` names what is no tensor
        return run_eagerly if is_grad_enabled() or transform_level() is not None else run

    return Registered(overload, route)
