"""Run decode steps, and prefill where there is a kernel, of Hugging Face ``transformers`` with this package."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

from cute_ssm.errors import CuteSsmError, describe
from cute_ssm.integrations import _transformers_calls as calls

# The folders of transformers.models with layers of a kind of `RECURRENCES` or `OTHERS`, as of transformers 5.24.
MODELS = (
    "mamba", "falcon_mamba", "jamba", "zamba",
    "mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2",
    "qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "olmo_hybrid", "lara_mini",
    "kimi_linear", "bailing_hybrid", "glm5_next",
)  # fmt: skip
UNCHANGED = "unchanged"

Replace = Callable[[Callable[..., Any]], Callable[..., Any]]


class Recurrence(NamedTuple):
    """A kind of layers: their functions in a model's file, and what replaces these.

    Attributes
    ----------
    layers : str
        What the layers are called.
    step, prefill : str
        Functions that run a decode step and a prompt.
    replace_step, replace_prefill : callable, optional
        Return the replacement of such a function.  None: it is not replaced.
    step_runs, prefill_runs : str
        The operator that a replacement runs, with the launches of a call.
    reason : str
        Why the prefill is not replaced.
    """

    layers: str
    step: str
    prefill: str
    replace_step: Replace
    replace_prefill: Replace | None
    step_runs: str
    prefill_runs: str = UNCHANGED
    reason: str = ""


RECURRENCES = (
    Recurrence(
        "Mamba-1", "mamba_selective_state_update", "mamba_selective_scan", calls.update, calls.scan,
        "selective_state_update, 1", "selective_scan, 1 or 2",
    ),
    Recurrence(
        "Mamba-2", "mamba2_selective_state_update", "mamba2_chunk_scan", calls.update, None,
        "selective_state_update, 1", reason="this package has no kernel for Mamba-2 prefill",
    ),
    Recurrence(
        "gated delta", "torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule",
        calls.delta_step, calls.delta_prefill,
        "gated_delta_rule_mtp, 1", "gated_delta_rule_mtp, 1 for 64 tokens",
    ),
)  # fmt: skip
FLA = "the kernels of fla, which is installed, take fewer launches"

# Functions of other recurrences -> what the layers are called, and why they are not changed.
OTHERS = {
    "recurrent_kimi_delta_attention": (
        "Kimi delta",
        "this package has no kernel for Kimi delta attention, whose decay is per channel; use the model unpatched",
    ),
}


class Row(NamedTuple):
    """What runs where in a model: operators with their launches for a layer, or "unchanged" and the reason."""

    model: str
    layers: str
    decode: str
    prefill: str
    reason: str = ""


class _Function(NamedTuple):
    """A function of a model's file."""

    module: ModuleType
    name: str


class _Found(NamedTuple):
    """What a model has: its row of the report, and the functions to replace."""

    row: Row
    functions: dict[_Function, Replace]
    skipped: str = ""  # the function that is not replaced, for the reason in the row


_originals: dict[_Function, Callable[..., Any]] = {}


def patch(*models: str) -> Patch:
    """Make models use this package's operators for decode steps and, where there is a kernel, for prefill.

    Mamba-1 and Mamba-2 layers decode by `cute_ssm.selective_state_update`, and gated delta nets by
    `cute_ssm.gated_delta_rule_mtp`.  The prefill of Mamba-1 layers runs by `cute_ssm.selective_scan`, that of Mamba-2
    layers does not change, and that of gated delta nets runs by `cute_ssm.gated_delta_rule_mtp`, 64 tokens at a time,
    unless ``fla`` is installed, whose kernels of chunks take fewer launches.  Training does not change.

    ``patch()`` is in effect until `unpatch`, ``with patch(): ...`` until the end of the block.  It applies to existing
    and to new models, because transformers looks the functions up at every call; graphs that ``torch.compile`` has
    already traced do not change.

    A call that an operator does not support (for example gated delta nets in float32), or that needs gradients, runs
    transformers' own function; the first such call is logged.  Arguments that transformers' functions ignore, such as
    those that hybrid models pass to all layers, are ignored.

    Parameters
    ----------
    *models : str
        Folders of ``transformers.models`` whose layers are of a kind of `RECURRENCES`.  Default: all of `MODELS` that
        the installed transformers has.

    Returns
    -------
    Patch
        Lists what is patched and what is not; printed, it is a table.  As a context manager, its exit undoes this call.

    Raises
    ------
    ImportError
        transformers, or a named model, is missing.
    CuteSsmError
        A named model has no such layers, or the installed transformers defines them elsewhere.

    Notes
    -----
    States of a gated delta net that a cache holds are updated in place.  Their shape is that of transformers, (batch,
    value_heads, K, V), with K last in memory.

    Examples
    --------
    >>> from cute_ssm.integrations.transformers import patch  # doctest: +SKIP
    >>> with patch("bamba") as done:
    ...     print(done.patched)
    ...     model.generate(ids, max_new_tokens=20)
    ('bamba.mamba2_selective_state_update',)
    """
    import_transformers()
    rows: list[Row] = []
    functions: dict[_Function, Replace] = {}
    names: list[str] = []
    skipped: dict[str, str] = {}
    for model in models or MODELS:
        try:
            found = _find(model)
        except (ImportError, CuteSsmError) as error:
            if models:
                raise
            skipped[model] = str(error)
            continue
        if models and not found.functions:
            raise CuteSsmError(describe("models", _expected(), repr(model), found.row.reason))
        rows.append(found.row)
        functions |= found.functions
        names += [f"{model}.{function.name}" for function in found.functions if function.name != found.skipped]
        if found.row.reason:
            skipped[f"{model}.{found.skipped}" if found.skipped else model] = found.row.reason
    added = [function for function in functions if function not in _originals]
    for function in added:
        original = _originals[function] = getattr(*function)
        setattr(*function, functions[function](original))
    return Patch(tuple(names), skipped, tuple(rows), added)


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
    rows : tuple of Row
        What runs where in each model: ``model, layers, decode, prefill, reason``.  ``print`` shows them as a table.
    """

    def __init__(
        self, patched: tuple[str, ...], skipped: dict[str, str], rows: tuple[Row, ...], functions: list[_Function]
    ) -> None:
        self.patched, self.skipped, self.rows = patched, skipped, rows
        self._functions = functions

    def __repr__(self) -> str:
        return f"Patch(patched={self.patched}, skipped={self.skipped})"

    def __str__(self) -> str:
        head = ("model", "layers", "decode step, launches", "prefill, launches")
        lines = [head, tuple("---" for _ in head), *(row[: len(head)] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        _restore(self._functions)


def _restore(functions: list[_Function]) -> None:
    for function in functions:
        original = _originals.pop(function, None)
        if original is not None:
            setattr(*function, original)


def _find(model: str) -> _Found:
    """Return what `patch` can do for a model, which may be nothing; raise if its layers are of no known kind."""
    module = import_module(f"transformers.models.{model}.modeling_{model}")

    def has(name: str) -> bool:
        return callable(getattr(module, name, None))

    for kind in RECURRENCES:
        replacements = {kind.step: kind.replace_step}
        row = Row(model, kind.layers, kind.step_runs, kind.prefill_runs, kind.reason)
        skipped = "" if kind.replace_prefill else kind.prefill
        if kind.replace_prefill:
            replacements[kind.prefill] = kind.replace_prefill
            if kind.replace_prefill is calls.delta_prefill and find_spec("fla") is not None:
                row, skipped = row._replace(prefill=UNCHANGED, reason=FLA), kind.prefill
                replacements[kind.prefill] = calls.delta_layout
        if all(map(has, replacements)):
            return _Found(row, {_Function(module, name): new for name, new in replacements.items()}, skipped)
    for name, (layers, reason) in OTHERS.items():
        if has(name):
            return _Found(Row(model, layers, UNCHANGED, UNCHANGED, reason), {})
    version = import_transformers().__version__
    known = f"known models are {', '.join(MODELS)}, in transformers 5.23 and 5.24"
    raise CuteSsmError(describe("models", _expected(), f"{model!r} of transformers {version}", known))


def _expected() -> str:
    kinds = [kind.step + (f" and {kind.prefill}" if kind.replace_prefill else "") for kind in RECURRENCES]
    return f"a model of transformers that defines {', or '.join(kinds)}"
