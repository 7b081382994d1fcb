"""Decode steps of Hugging Face ``transformers``' Mamba models, run by this package's operator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cute_ssm import env
from cute_ssm.compat.mamba_ssm import selective_state_update
from cute_ssm.errors import CuteSsmError, UnsupportedArchError, UnsupportedSpecError, describe

DEFAULT_MODELS = ("mamba", "mamba2")
FUNCTIONS = ("mamba_selective_state_update", "mamba2_selective_state_update")

_originals: dict[tuple[ModuleType, str], Callable[..., Tensor]] = {}


def patch(*models: str) -> _Patch:
    """Let decode steps of models run through `cute_ssm.selective_state_update`, from now on or in a context.

    ``patch()`` holds until `unpatch`; ``with patch(): ...`` until the end of the block.  It concerns models that exist
    already as well as later ones, since their modules look the function up at every call; what ``torch.compile`` has
    traced before keeps what it saw.  Prefill and training are untouched.  A call that the operator does not support
    (dstate below 16, say), or that needs gradients, runs as without the patch; the first such is logged.

    Parameters
    ----------
    *models : str
        Folders of ``transformers.models`` that define ``mamba_selective_state_update`` or
        ``mamba2_selective_state_update``; by default ``"mamba"`` and ``"mamba2"``, which `MambaForCausalLM` and
        `Mamba2ForCausalLM` are from.

    Returns
    -------
    context manager
        Its exit undoes what this call has patched.

    Raises
    ------
    ImportError
        transformers, or a model in it, is missing.
    CuteSsmError
        This version of transformers updates the states of a model in another place.

    Examples
    --------
    >>> from cute_ssm.integrations.transformers import patch  # doctest: +SKIP
    >>> with patch():
    ...     model.generate(ids, max_new_tokens=20)
    """
    found = [(module, name) for model in models or DEFAULT_MODELS for module, name in [_find(model)]]
    added = [place for place in found if place not in _originals]
    for module, name in added:
        original = _originals[module, name] = getattr(module, name)
        setattr(module, name, _replacement(original))
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


def _find(model: str) -> tuple[ModuleType, str]:
    module = import_module(f"transformers.models.{model}.modeling_{model}")
    for name in FUNCTIONS:
        if callable(getattr(module, name, None)):
            return module, name
    version = import_module("transformers").__version__
    expected = f"a model of transformers that defines {' or '.join(FUNCTIONS)}"
    raise CuteSsmError(describe("models", expected, f"{model!r} of transformers {version}", "use transformers 5.23"))


def _replacement(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    logged = False

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
        nonlocal logged
        reason: object = "gradients are not supported; generate under torch.no_grad()"
        operands = (state, hidden_states, dt, A, B, C, D, dt_bias, z)
        if kwargs:
            reason = f"the arguments {', '.join(kwargs)}"
        elif not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in operands):
            try:
                return selective_state_update(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)
            except (UnsupportedArchError, UnsupportedSpecError) as error:
                reason = error
        if not logged:
            logged = True
            env.logger().warning("%s runs as without cute_ssm: %s", original.__qualname__, reason)
        return original(state, hidden_states, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, z=z, **kwargs)

    return update
