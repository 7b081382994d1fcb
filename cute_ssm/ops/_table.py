"""Argument tables: what an operator asks of its arguments, declared once.

The arguments of an operator are a NamedTuple whose tensors are annotated with `Arg`::

    class Arguments(NamedTuple):
        state: Annotated[Tensor, Arg("slots nheads dim dstate", STATES, contiguous=2, align=16, written=True)]
        x: Annotated[Tensor, Arg("*tokens nheads dim", FLOATS, contiguous=1)]
        z: Annotated[Tensor | None, Arg("*tokens nheads dim", like="x", contiguous=1)]
        dt_softplus: bool

    TABLE = Table(Arguments)

A string in an annotation is the name in the schema, where that differs: ``Annotated[int, "places"]``.

From it come the schema that PyTorch sees, the checks that need no knowledge of the operator, with their messages, and
the tensors as the compiler sees them (`cute_ssm.device.fakes.of_table`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments

Axes = Mapping[str, int]  # names of axes and their sizes, in order
Sizes = Mapping[str, "int | Axes"]
FLOAT32 = ("float32",)
INT32 = ("int32",)
INDICES = ("int32", "int64")
SCALARS = {bool: "bool", int: "int", float: "float", str: "str"}


@dataclass(frozen=True)
class Arg:
    """What an operator asks of one tensor.

    Attributes
    ----------
    shape : str
        Axes, separated by spaces: names, numbers, ``name+1``, or ``*name`` for axes that the call decides.
    dtypes : tuple of str
        Allowed types; an error suggests the first.
    like : str
        Instead of `dtypes`: the argument whose type it has.
    contiguous : int
        Trailing dimensions that are contiguous, so that the last has stride 1.
    align, align_elements : int
        Bytes, or elements, that the address and the outer strides are multiples of.
    written : bool
        The operator writes it.  Errors then never suggest a copy, which would take the results.
    why : str
        What an error about its type adds.
    """

    shape: str = ""
    dtypes: tuple[str, ...] = ()
    like: str = ""
    contiguous: int = 0
    align: int = 0
    align_elements: int = 0
    written: bool = False
    why: str = ""

    @functools.cached_property
    def axes(self) -> list[str]:
        """The axes, as `shape` spells them."""
        return self.shape.split()

    @functools.cached_property
    def allowed(self) -> tuple[torch.dtype, ...]:
        """The types of `dtypes`."""
        return tuple(getattr(torch, dtype) for dtype in self.dtypes)

    def alignment(self, tensor: Tensor) -> int:
        """Return the bytes that the address and the outer strides of a tensor have to be multiples of."""
        return max(self.align, self.align_elements * tensor.element_size())


class Table:
    """The arguments of an operator.

    Parameters
    ----------
    call : type
        NamedTuple of all arguments in the order of the schema: tensors annotated with `Arg`, then or between them
        flags and numbers.
    written : tuple of str
        Tensors that the operator writes although their `Arg` does not say so.
    without : tuple of str
        Arguments that the operator does not have.  With `written`, a second operator shares `call`.

    Attributes
    ----------
    tensors : dict of str to Arg
        The tensors, in order.
    optional, written : tuple of str
        Names of those that may be None; of those that the operator writes.
    """

    def __init__(self, call: type[Any], written: tuple[str, ...] = (), without: tuple[str, ...] = ()):
        self.call = call
        self.tensors: dict[str, Arg] = {}
        self._schema: list[str] = []
        optional: list[str] = []
        defaults = call._field_defaults
        for name, hint in get_type_hints(call, include_extras=True).items():
            if name in without:
                continue
            arg, spelling = None, name
            if get_origin(hint) is Annotated:
                hint, *notes = get_args(hint)
                arg = next((note for note in notes if isinstance(note, Arg)), None)
                spelling = next((note for note in notes if isinstance(note, str)), name)
            absent = type(None) in get_args(hint)
            if absent:
                (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
            default = f"={defaults[name]}" if name in defaults else ""
            if arg is None:
                self._schema.append(f"{SCALARS[hint]}{'?' * absent} {spelling}{default}")
                continue
            arg = replace(arg, written=True) if name in written else arg
            self.tensors[name] = arg
            if absent:
                optional.append(name)
            mark = f"({chr(ord('a') + sum(t.written for t in self.tensors.values()) - 1)}!)" if arg.written else ""
            self._schema.append(f"Tensor{mark}{'?' * absent} {spelling}")
        self.optional = tuple(optional)
        self.written = tuple(name for name, arg in self.tensors.items() if arg.written)

    def getter(self, *names: str) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
        """Return a function that takes tensors, two at least, out of a tuple that has all in the order of the table."""
        order = list(self.tensors)
        return itemgetter(*map(order.index, names))

    def schema(self, name: str) -> str:
        """Return the schema of the operator `name` for PyTorch."""
        return f"{name}({', '.join(self._schema)}) -> ()"

    def given(self, call: Any, names: Mapping[str, str] | None = None) -> Given:
        """Return the tensors of a call that are not None; raise unless all are tensors of one device.

        Parameters
        ----------
        call : NamedTuple
            With all tensors of the table, in whatever order.
        names : mapping, optional
            What the caller of the operator calls arguments that it knows by another name.
        """
        found = Given(self, names or {}, {name: getattr(call, name) for name in self.tensors})
        public = {found.public(name): value for name, value in found.items()}
        arguments.check_tensors(public, map(found.public, self.optional), frozenset(map(found.public, self.written)))
        for name in [name for name, value in found.items() if value is None]:
            del found[name]
        return found


class Given(dict[str, Tensor]):
    """The tensors of a call by name, and the checks that a table makes of them; each error names the argument."""

    def __init__(self, table: Table, names: Mapping[str, str], tensors: Mapping[str, Tensor]):
        super().__init__(tensors)
        self.table, self.names = table, names

    def public(self, name: str) -> str:
        """Return what the caller calls an argument."""
        return self.names.get(name, name)

    def check_ranks(self, sizes: Sizes, only: Iterable[str]) -> None:
        """Raise unless tensors have as many dimensions as their shape says.

        Parameters
        ----------
        sizes : mapping
            The axes that ``*name`` stands for; their sizes are not used.
        only : iterable of str
            The tensors: those whose sizes are read before all shapes can be compared.
        """
        for name in only:
            if name in self:
                letters = _letters(self.table.tensors[name], sizes)
                if self[name].dim() != len(letters):
                    raise ValueError(describe(self.public(name), f"shape {spelled(letters)}", tuple(self[name].shape)))

    def check_shapes(self, sizes: Sizes) -> None:
        """Raise unless all shapes are those of the table; an axis without a size may have any."""
        for name, tensor in self.items():
            arg = self.table.tensors[name]
            known = list(_numbers(arg, sizes))
            given = tensor.shape if tensor.dim() == len(known) else [0] * len(known)
            shape = tuple(own if size is None else size for size, own in zip(known, given))
            if tensor.shape != shape:
                letters = spelled(_letters(arg, sizes))
                arguments.check_shape(self.public(name), tensor, shape, letters, arg.written)

    def check_dtypes(self) -> None:
        """Raise unless all types are those of the table, those that others are compared with first."""
        for name in sorted(self, key=lambda name: bool(self.table.tensors[name].like)):
            tensor, arg = self[name], self.table.tensors[name]
            allowed, why = arg.allowed, arg.why
            if arg.like:
                allowed = (self[arg.like].dtype,)
                why = why or f"the type of {self.public(arg.like)}"
            arguments.check_dtype(self.public(name), tensor, allowed, why, bool(arg.like), arg.written)

    def check_strides(self) -> None:
        """Raise unless trailing dimensions are contiguous, and addresses and strides aligned, as the table says."""
        for name, tensor in self.items():
            arg = self.table.tensors[name]
            if arg.contiguous:
                arguments.check_contiguous(self.public(name), tensor, arg.contiguous, arg.axes, arg.written)
        for name, tensor in self.items():
            arg = self.table.tensors[name]
            if arg.alignment(tensor):
                arguments.check_aligned(
                    self.public(name), tensor, arg.alignment(tensor), max(arg.contiguous, 1), arg.axes[0], arg.written
                )

    def check_written(self) -> None:
        """Raise if elements of a tensor that is written share memory."""
        for name in self.table.written:
            if name in self:
                arguments.check_writable(self.public(name), self[name])


def _letters(arg: Arg, sizes: Sizes) -> list[str]:
    found: list[str] = []
    for axis in arg.axes:
        found += sizes[axis[1:]] if axis.startswith("*") else [axis.replace("+", " + ")]  # type: ignore[arg-type]
    return found


def _numbers(arg: Arg, sizes: Sizes) -> Iterator[int | None]:
    for axis in arg.axes:
        if axis.startswith("*"):
            yield from sizes[axis[1:]].values()  # type: ignore[union-attr]
        elif axis.isdigit():
            yield int(axis)
        else:
            name, _, more = axis.partition("+")
            size: Any = sizes.get(name)
            yield None if size is None else size + int(more or 0)


def spelled(letters: list[str]) -> str:
    """Return axes as a shape: ``(batch, T)``, ``(slots,)``."""
    return f"({', '.join(letters)}{',' * (len(letters) == 1)})"
