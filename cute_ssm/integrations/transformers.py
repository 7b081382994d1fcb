"""Prefill of Mamba-1 and decode steps of Mamba models of Hugging Face ``transformers``, by this package's operators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cute_ssm import env
from cute_ssm.compat.mamba_ssm import selective_scan_fn, selective_state_update
from cute_ssm.errors import CuteSsmError, UnsupportedArchError, UnsupportedSpecError, describe

DEFAULT_MODELS = ("mamba", "mamba2")
FUNCTIONS = ("mamba_selective_state_update", "mamba2_selective_state_update")
SCAN = "mamba_selective_scan"

_originals: dict[tuple[ModuleType, str], Callable[..., Any]] = {}


def patch(*models: str) -> _Patch:
    """Let models run through `cute_ssm.selective_state_update` and `cute_ssm.selective_scan`, or in a context.

    Decode steps run through the first, the prefill of Mamba-1 models through the second; that of Mamba-2 models and
    training are untouched.  ``patch()`` holds until `unpatch`; ``with patch(): ...`` until the end of the block.  It
    concerns models that exist already as well as later ones, since their modules look the functions up at every call;
    what ``torch.compile`` has traced before keeps what it saw.  A call that an operator does not support (dstate below
    16 in a decode step, say), or that needs gradients, runs as without the patch; the first such is logged.

    Parameters
    ----------
    *models : str
        Folders of ``transformers.models`` that define ``mamba_selective_state_update``, and then
        ``mamba_selective_scan`` too, or ``mamba2_selective_state_update``; by default ``"mamba"`` and ``"mamba2"``,
        which `MambaForCausalLM` and `Mamba2ForCausalLM` are from.

    Returns
    -------
    context manager
        Its exit undoes what this call has patched.

    Raises
    ------
    ImportError
        transformers, or a model in it, is missing.
    CuteSsmError
        This version of transformers scans or updates the states of a model in another place.

    Examples
    --------
    >>> from cute_ssm.integrations.transformers import patch  # doctest: +SKIP
    >>> with patch():
    ...     model.generate(ids, max_new_tokens=20)
    """
    found = [place for model in models or DEFAULT_MODELS for place in _find(model)]
    added = [place for place in dict.fromkeys(found) if place not in _originals]
    for module, name in added:
        original = _originals[module, name] = getattr(module, name)
        setattr(module, name, (_scan if name == SCAN else _update)(original))
    return _Patch(added)


def unpatch() -> None:
    """Undo every `patch`."""
    _restore(list(_originals))


def patched() -> bool:
    """Whether any model is patched."""
    return bool(_originals)


class _Patch:
    def __init__(self, places: list[tuple[ModuleType, str]]) -> None:
        self._places = places

    def __enter__(self) -> _Patch:
        return self

    def __exit__(self, *_: object) -> None:
        _restore(self._places)


def _restore(places: list[tuple[ModuleType, str]]) -> None:
    for place in places:
        original = _originals.pop(place, None)
        if original is not None:
            setattr(*place, original)


def _find(model: str) -> list[tuple[ModuleType, str]]:
    """The functions of a model to replace: its decode step and, of Mamba-1, its scan."""
    module = import_module(f"transformers.models.{model}.modeling_{model}")
    steps = [name for name in FUNCTIONS if callable(getattr(module, name, None))]
    names = [*steps[:1], *([SCAN] if FUNCTIONS[0] in steps else [])]
    if names and all(callable(getattr(module, name, None)) for name in names):
        return [(module, name) for name in names]
    version = import_module("transformers").__version__
    expected = f"a model of transformers that defines {FUNCTIONS[0]} and {SCAN}, or {FUNCTIONS[1]}"
    raise CuteSsmError(describe("models", expected, f"{model!r} of transformers {version}", "use transformers 5.23"))


class _Fallback:
    """Runs a call by an operator if it can, else by the function that it replaced; the first such call is logged."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original, self.logged = original, False

    def __call__(
        self, operator: Callable[[], Any], original: Callable[[], Any], operands: Any, others: dict[str, Any]
    ) -> Any:
        """`others` are arguments that the operator does not have."""
        reason: object = "gradients are not supported; generate under torch.no_grad()"
        if others:
            reason = f"the arguments {', '.join(others)}"
        elif not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in operands):
            try:
                return operator()
            except (UnsupportedArchError, UnsupportedSpecError) as error:
                reason = error
        if not self.logged:
            self.logged = True
            env.logger().warning("%s runs as without cute_ssm: %s", self.original.__qualname__, reason)
        return original()


def _update(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A decode step."""
    run = _Fallback(original)

    @functools.wraps(original)
    def update(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        output: Tensor = run(
            lambda: selective_state_update(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus),
            lambda: original(
                state, hidden_states, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, z=z, **kwargs
            ),
            (state, hidden_states, dt, A, B, C, D, dt_bias, z),
            kwargs,
        )
        return output

    return update


def _scan(original: Callable[..., Any]) -> Callable[..., Any]:
    """The scan of a prefill, from zero states."""
    run = _Fallback(original)

    @functools.wraps(original)
    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        use_mambapy: bool = False,
        use_associative_scan: bool = False,
        **kwargs: Any,
    ) -> Any:
        tensors = (hidden_states, dt, A, B, C, D, z, delta_bias)
        ways = {"use_mambapy": use_mambapy, "use_associative_scan": use_associative_scan}  # without this package
        return run(
            lambda: selective_scan_fn(*tensors, delta_softplus, return_last_state),
            lambda: original(*tensors, delta_softplus, return_last_state, **ways, **kwargs),
            tensors,
            kwargs,
        )

    return scan
