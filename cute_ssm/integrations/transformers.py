"""Run decode steps and Mamba-1 prefill of Hugging Face ``transformers`` with this package's operators."""

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

# Functions of models with other recurrences -> what such a model is, and what to do.
OTHERS = {
    "torch_recurrent_gated_delta_rule": (
        "a gated delta net, whose layers patch() does not replace: use the model unpatched, or call "
        "cute_ssm.gated_delta_rule_mtp in your own layer"
    ),
    "recurrent_kimi_delta_attention": (
        "Kimi delta attention, whose decay per channel this package does not support: use the model unpatched"
    ),
}
# Arguments that change a result and that the operators lack; transformers' own functions ignore all others.
MEANT = ("cu_seqlens", "seq_idx", "state_batch_indices")

_originals: dict[tuple[ModuleType, str], Callable[..., Any]] = {}


def patch(*models: str) -> Patch:
    """Make models use `cute_ssm.selective_state_update` for decode steps and `cute_ssm.selective_scan` for prefill.

    Prefill is replaced in Mamba-1 models only; Mamba-2 prefill and training do not change.  ``patch()`` is in effect
    until `unpatch`, ``with patch(): ...`` until the end of the block.  It applies to existing and to new models,
    because transformers looks the functions up at every call; graphs that ``torch.compile`` has already traced do not
    change.

    A call that an operator does not support (for example dstate below 16 in a decode step), or that needs gradients,
    runs transformers' own function; the first such call is logged.  Arguments that transformers' functions ignore, such
    as those that hybrid models pass to all layers, are ignored.

    Parameters
    ----------
    *models : str
        Folders of ``transformers.models`` that define ``mamba_selective_state_update`` and ``mamba_selective_scan``, or
        ``mamba2_selective_state_update``.  Default: all of `MODELS` that the installed transformers has.

    Returns
    -------
    Patch
        Lists what is patched and what is not.  As a context manager, its exit undoes this call.

    Raises
    ------
    ImportError
        transformers, or a named model, is missing.
    CuteSsmError
        A named model has no such layers, or the installed transformers defines them elsewhere.

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
            functions = _find(model)
        except (ImportError, CuteSsmError) as error:
            if models:
                raise
            skipped[model] = str(error)
            continue
        found += functions
        if callable(getattr(functions[0][0], CHUNKS, None)):
            skipped[f"{model}.{CHUNKS}"] = "this package has no kernel for Mamba-2 prefill"
    names = tuple(f"{module.__name__.split('.')[-2]}.{name}" for module, name in dict.fromkeys(found))
    added = [function for function in dict.fromkeys(found) if function not in _originals]
    for module, name in added:
        original = _originals[module, name] = getattr(module, name)
        setattr(module, name, (_scan if name == SCAN else _update)(original))
    return Patch(names, skipped, added)


def import_transformers() -> ModuleType:
    """Import and return transformers.

    Raises
    ------
    ImportError
        If it is not installed; the message names the extra.
    """
    try:
        return import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        fix = "run: pip install 'cute-ssm[hf]' (Python 3.11 or later)"
        raise ImportError(describe("transformers", "version 5.23 or later", "none installed", fix)) from None


def unpatch() -> None:
    """Undo every `patch`."""
    _restore(list(_originals))


def patched() -> bool:
    """Return whether any model is patched."""
    return bool(_originals)


class Patch:
    """The result of `patch`; a context manager whose exit undoes the call.

    Attributes
    ----------
    patched : tuple of str
        ``model.function`` of each replaced function, by this or an earlier call.
    skipped : dict
        ``model`` or ``model.function`` that is not replaced -> the reason.
    """

    def __init__(
        self, patched: tuple[str, ...], skipped: dict[str, str], functions: list[tuple[ModuleType, str]]
    ) -> None:
        self.patched, self.skipped = patched, skipped
        self._functions = functions

    def __repr__(self) -> str:
        return f"Patch(patched={self.patched}, skipped={self.skipped})"

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        _restore(self._functions)


def _restore(functions: list[tuple[ModuleType, str]]) -> None:
    for function in functions:
        original = _originals.pop(function, None)
        if original is not None:
            setattr(*function, original)


def _find(model: str) -> list[tuple[ModuleType, str]]:
    """Return the functions of a model to replace: its decode step and, for Mamba-1, its scan."""
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
    known = f"known models are {', '.join(MODELS)}, in transformers 5.23 and 5.24"
    raise CuteSsmError(describe("models", expected, f"{model!r} of transformers {version}", known))


class _Fallback:
    """Runs a call by an operator if possible, else by the replaced function; logs the first such call."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original, self.logged = original, False

    def __call__(
        self, operator: Callable[[], Any], original: Callable[[], Any], operands: Any, others: dict[str, Any]
    ) -> Any:
        """Run one call; `others` are arguments that the operator lacks, of which those in `MEANT` change a result."""
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
            env.logger().warning("%s runs without cute_ssm: %s", self.original.__qualname__, reason)
        return original()


def _update(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the replacement of a decode step."""
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
    """Return the replacement of the scan of a prefill, which starts from zero states."""
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
        fallbacks = {"use_mambapy": use_mambapy, "use_associative_scan": use_associative_scan}  # read by transformers
        return run(
            lambda: selective_scan_fn(*tensors, delta_softplus, return_last_state),
            lambda: original(*tensors, delta_softplus, return_last_state, **fallbacks, **kwargs),
            tensors,
            kwargs,
        )

    return scan
