"""Calls that are made: arguments by operator and sizes, and the calls of models that people serve.

These calls drive warm-up, bundles, the tuner, compile tests and the checks on a GPU.  An operator takes part by a
``workload.py`` in its folder, with

- ``build(make, ...) -> Call``: random arguments, where `make` is a `Maker`; the other parameters are sizes, types and
  flags, integers and strings with defaults;
- ``BATCH``: the parameter that grows with the number of requests, and ``BATCHES``: its usual values;
- ``MODELS``: calls by name of model, each a dict of parameters other than `BATCH`;
- ``COUNTED``: calls that `tools/bench/counters.py` counts, with ``config.FIELD`` where a config is not the chosen one;
- ``SMALL``, ``CHECKED``, optional: parameters of a small call, other than `BATCH`; and of more calls, each beside
  ``SMALL``, that are compared on a GPU;
- ``TINY``, ``MODES``: all parameters of the least call; and one call for every mode and type, each beside ``TINY``, for
  checks that make many calls;
- ``pool(...) -> StatePool``, where an engine keeps one for it: with one slot, from the parameters of ``build``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cute_ssm.errors import describe
from cute_ssm.ops import operators

if TYPE_CHECKING:
    import torch

    from cute_ssm.serving import StatePool

OPERATORS = tuple(operator.name for operator in operators() if operator.workload)

Keys = Mapping[str, "int | str"]


@dataclass
class Call:
    """A call of an operator on arguments that exist.

    Attributes
    ----------
    op : str
        Name of the operator.
    arguments : dict
        What it is called with.
    written : tuple of str
        Arguments that it changes.
    units : float
        Of work: what ``build`` says.
    floor_bytes : int
        Bytes that it must read once or write once.
    """

    op: str
    arguments: dict[str, Any]
    written: tuple[str, ...]
    units: float
    floor_bytes: int

    def run(self) -> Any:
        """Make the call."""
        return function(self.op)(**self.arguments)

    def results(self) -> dict[str, Any]:
        """What it has written so far."""
        return {name: self.arguments[name] for name in self.written if self.arguments.get(name) is not None}


@dataclass(frozen=True)
class Workload:
    """Calls of one operator that differ in their number of requests only."""

    op: str
    keys: tuple[tuple[str, int | str], ...]
    batches: tuple[int, ...]

    def calls(self) -> list[dict[str, int | str]]:
        """The parameters of each call."""
        return [{**dict(self.keys), batch_key(self.op): batch} for batch in self.batches]

    def text(self) -> str:
        """The operator and its parameters, as on the command line."""
        return " ".join([self.op, *(f"{key}={value}" for key, value in self.keys)])


def build(op: str, keys: Keys, device: torch.device | str = "cpu", fill: bool = True, seed: int = 0) -> Call:
    """Return a call of an operator on random arguments.

    Parameters
    ----------
    op, keys
        Name, and parameters of ``build`` of the operator's module; values may be strings.
    device : torch.device or str
        Where the arguments lie.
    fill : bool
        False: only indices and other small integers have values.  Memory that is never touched costs nothing then.
    seed : int
        Of the values.

    Raises
    ------
    ValueError
        No such operator or parameter.
    """
    from cute_ssm.workloads.maker import Maker

    known = parameters(op)
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise ValueError(describe(unknown[0], f"one of {', '.join(known)}", f"the unknown key {unknown[0]!r}"))
    values = {}
    for key, value in keys.items():
        try:
            values[key] = type(known[key])(value)
        except ValueError:
            raise ValueError(describe(key, type(known[key]).__name__, repr(value))) from None
    call: Call = _module(op).build(Maker(device, fill, seed), **values)
    return call


def pool(op: str, keys: Keys) -> StatePool | None:
    """Return the pool that an engine would keep for these calls, with a single slot; None if it keeps none."""
    make = getattr(_module(op), "pool", None)
    return make(**{**parameters(op), **keys}) if make is not None else None


def small(op: str) -> dict[str, int | str]:
    """Return the parameters of a small call of an operator, for two requests."""
    return {batch_key(op): 2, **getattr(_module(op), "SMALL", {})}


def tiny(op: str) -> dict[str, int | str]:
    """Return the parameters of the least call of an operator that shows what it does."""
    return dict(_module(op).TINY)


def modes(op: str) -> list[dict[str, int | str]]:
    """Return the parameters of one such call for every mode and type of an operator, the usual one first."""
    return [{**tiny(op), **mode} for mode in _module(op).MODES]


def checked(op: str) -> list[dict[str, int | str]]:
    """Return the parameters of small calls that are compared on a GPU."""
    return [small(op), *({**small(op), **keys} for keys in getattr(_module(op), "CHECKED", ()))]


def counted(op: str) -> list[dict[str, int | str]]:
    """Return the parameters of the calls that the table of counters has."""
    found: list[dict[str, int | str]] = _module(op).COUNTED
    return found


def parameters(op: str) -> dict[str, int | str]:
    """Return the parameters of an operator's calls, with their defaults."""
    signature = inspect.signature(_module(op).build)
    return {name: parameter.default for name, parameter in list(signature.parameters.items())[1:]}


def description(op: str) -> str:
    """Return what the parameters mean."""
    return inspect.getdoc(_module(op).build) or ""


def batch_key(op: str) -> str:
    """Return the parameter that grows with the number of requests."""
    key: str = _module(op).BATCH
    return key


def models() -> list[str]:
    """Return the names of all models with declared calls."""
    return sorted({name for op in OPERATORS for name in _module(op).MODELS})


def of_model(name: str, batches: Sequence[int] | None = None) -> list[Workload]:
    """Return the declared calls of a model.

    Raises
    ------
    ValueError
        If there are none.
    """
    found = [workload(op, keys, batches) for op in OPERATORS for keys in _module(op).MODELS.get(name, ())]
    if not found:
        raise ValueError(describe("model", f"one of {', '.join(models())}", repr(name), "or give a file of specs"))
    return found


def of_operator(op: str, batches: Sequence[int] | None = None) -> list[Workload]:
    """Return the declared calls of an operator, of all models, each once."""
    found = [workload(op, keys, batches) for calls in _module(op).MODELS.values() for keys in calls]
    return list(dict.fromkeys(found))


def workload(op: str, keys: Keys, batches: Sequence[int] | None = None) -> Workload:
    """Return the `Workload` of these parameters; one that says the number of requests has that alone."""
    batch, known = batch_key(op), parameters(op)
    if batch in keys:
        batches = (int(keys[batch]),)
    elif batches is None:
        batches = _module(op).BATCHES
    kept = tuple((key, value) for key, value in sorted(keys.items()) if key != batch and known.get(key) != value)
    return Workload(op, kept, tuple(batches))


def function(op: str) -> Callable[..., Any]:
    """Return the public function that an operator's calls are of."""
    home, _, name = public_name(op).rpartition(".")
    found: Callable[..., Any] = getattr(import_module(home), name)
    return found


def public_name(op: str) -> str:
    """Return the full name of the public function that an operator's calls are of."""
    return next(operator.public_name for operator in operators() if operator.name == op)


def registered(op: str) -> Callable[..., Call]:
    """Return the function that builds an operator's calls."""
    function: Callable[..., Call] = _module(op).build
    return function


def _module(op: str) -> Any:
    if op not in OPERATORS:
        raise ValueError(describe("op", f"one of {', '.join(OPERATORS)}", repr(op)))
    return import_module(f"cute_ssm.ops.{op}.workload")
