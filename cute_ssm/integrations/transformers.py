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

# The folders of transformers.models that define the functions, as of transformers 5.24.
MODELS = (
    "mamba", "mamba2", "falcon_mamba", "jamba", "zamba", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h",
    "zamba2",
)  # fmt: skip
FUNCTIONS = ("mamba_selective_state_update", "mamba2_selective_state_update")
SCAN = "mamba_selective_scan"
CHUNKS = "mamba2_chunk_scan"

# Functions of models that have other recurrences, and what to do about them.
OTHERS = {
    "torch_recurrent_gated_delta_rule": (
        "a gated delta net, whose layers patch() does not replace: leave the model as it is, or call "
        "cute_ssm.gated_delta_rule_mtp in a layer of your own"
    ),
    "recurrent_kimi_delta_attention": (
        "Kimi delta attention, whose decay differs by channel, which no kernel here computes: leave the model as it is"
    ),
}
# Arguments beyond those of the operators that change a result; transformers' own functions ignore all others.
MEANT = ("cu_seqlens", "seq_idx", "state_batch_indices")

_originals: dict[tuple[ModuleType, str], Callable[..., Any]] = {}


def patch(*models: str) -> Patch:
    """Let models run through `cute_ssm.selective_state_update` and `cute_ssm.selective_scan`, or in a context.

    Decode steps run through the first, the prefill of Mamba-1 models through the second; that of Mamba-2 models and
    training are untouched.  ``patch()`` holds until `unpatch`; ``with patch(): ...`` until the end of the block.  It
    concerns models that exist already as well as later ones, since their modules look the functions up at every call;
    what ``torch.compile`` has traced before keeps what it saw.  A call that an operator does not support (dstate below
    16 in a decode step, say), or that needs gradients, runs as without the patch; the first such is logged.  Arguments
    that transformers' own functions ignore, such as those that hybrid models pass on to all layers, are ignored.

    Parameters
    ----------
    *models : str
        Folders of ``transformers.models`` that define ``mamba_selective_state_update``, and then
        ``mamba_selective_scan`` too, or ``mamba2_selective_state_update``; by default all of `MODELS` that this
        version of transformers has.

    Returns
    -------
    Patch
        Says what is patched and what is not; as a context manager, its exit undoes what this call has patched.

    Raises
    ------
    ImportError
        transformers, or a model that was named, is missing.
    CuteSsmError
        A named model has no such layers, or this version of transformers computes them in another place.

    Examples
    --------
    >>> from cute_ssm.integrations.transformers import patch  # doctest: +SKIP
    >>> with patch("bamba") as done:
    ...     print(done.patched)
    ...     model.generate(ids, max_new_tokens=20)
    ('bamba.mamba2_selective_state_update',)
    """
    import_transformers()
    found: list[tuple[ModuleType, str]] = []
    skipped: dict[str, str] = {}
    for model in models or MODELS:
        try:
            places = _find(model)
        except (ImportError, CuteSsmError) as error:
            if models:
                raise
            skipped[model] = str(error)
            continue
        found += places
        if callable(getattr(places[0][0], CHUNKS, None)):
            skipped[f"{model}.{CHUNKS}"] = "the prefill of Mamba-2 has no kernel here"
    names = tuple(f"{module.__name__.split('.')[-2]}.{name}" for module, name in dict.fromkeys(found))
    added = [place for place in dict.fromkeys(found) if place not in _originals]
    for module, name in added:
        original = _originals[module, name] = getattr(module, name)
        setattr(module, name, (_scan if name == SCAN else _update)(original))
    return Patch(names, skipped, added)


def import_transformers() -> ModuleType:
    """Return the module transformers.

    Raises
    ------
    ImportError
        It is not installed; the message names the extra.
    """
    try:
        return import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        fix = "run: pip install 'cute-ssm[hf]'"
        raise ImportError(describe("transformers", "version 5.23 or later", "none installed", fix)) from None


def unpatch() -> None:
    """Undo every `patch`."""
    _restore(list(_originals))


def patched() -> bool:
    """Whether any model is patched."""
    return bool(_originals)


class Patch:
    """What a call of `patch` did; a context manager whose exit undoes it.

    Attributes
    ----------
    patched : tuple of str
        ``model.function`` of each function that runs through this package, whether this call patched it or an earlier.
    skipped : dict
        What of these models runs as before, and why: ``model``, or ``model.function``.
    """

    def __init__(self, patched: tuple[str, ...], skipped: dict[str, str], places: list[tuple[ModuleType, str]]) -> None:
        self.patched, self.skipped = patched, skipped
        self._places = places

    def __repr__(self) -> str:
        return f"Patch(patched={self.patched}, skipped={self.skipped})"

    def __enter__(self) -> Patch:
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
    version = import_transformers().__version__
    expected = f"a model of transformers that defines {FUNCTIONS[0]} and {SCAN}, or {FUNCTIONS[1]}"
    other = next((words for name, words in OTHERS.items() if callable(getattr(module, name, None))), None)
    if other is not None:
        raise CuteSsmError(describe("models", expected, repr(model), f"it is {other}"))
    known = f"those known are {', '.join(MODELS)}, in transformers 5.23 and 5.24"
    raise CuteSsmError(describe("models", expected, f"{model!r} of transformers {version}", known))


class _Fallback:
    """Runs a call by an operator if it can, else by the function that it replaced; the first such call is logged."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original, self.logged = original, False

    def __call__(
        self, operator: Callable[[], Any], original: Callable[[], Any], operands: Any, others: dict[str, Any]
    ) -> Any:
        """`others` are arguments that the operator does not have, of which those in `MEANT` change a result."""
        reason: object = "gradients are not supported; generate under torch.no_grad()"
        meant = [name for name in MEANT if others.get(name) is not None]
        if meant:
            reason = f"the operator has no {' or '.join(meant)}"
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
