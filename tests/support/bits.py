"""Exact comparison of tensors.  A failure says where they first differ, what is there and what was wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from memory import storage


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of the elements, as integers: a NaN equals itself, and -0 is not 0."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().contiguous().view(sizes[tensor.dtype.itemsize])


def equal(got: torch.Tensor, want: torch.Tensor, what: object = "") -> None:
    """Assert that two tensors have the same shape and values; as for ``torch.equal``, a NaN equals nothing."""
    __tracebackhide__ = True
    _at_first_difference(got, want, got.detach() != want.detach() if got.shape == want.shape else None, what)


def same_bits(got: torch.Tensor, want: torch.Tensor, what: object = "") -> None:
    """Assert that two tensors have the same type, shape and bits."""
    __tracebackhide__ = True
    alike = got.dtype == want.dtype and got.shape == want.shape
    _at_first_difference(got, want, stored(got) != stored(want) if alike else None, what)


def each_same_bits(got: Mapping[str, torch.Tensor] | Sequence[torch.Tensor], want: object, what: object = "") -> None:
    """Do so for every tensor of `want`, a mapping or a sequence like `got`."""
    __tracebackhide__ = True
    if isinstance(want, Mapping):
        for name, tensor in want.items():
            same_bits(got[name], tensor, f"{what}: {name}" if what else name)
    else:
        for i, (one, other) in enumerate(zip(got, want, strict=True)):
            same_bits(one, other, f"{what}: {i}" if what else str(i))


def same_memory(got: torch.Tensor, want: torch.Tensor, what: object = "") -> None:
    """Assert that all bytes of the memory behind two tensors are equal, those between their elements included."""
    __tracebackhide__ = True
    one, other = storage(got).cpu(), storage(want).cpu()
    if torch.equal(one, other):
        return
    same_bits(got, want, what)
    name = f"{what}: " if str(what) else ""
    assert one.shape == other.shape, f"{name}{len(one)} bytes of memory, wanted {len(other)}"
    wrong = (one != other).nonzero()
    at = int(wrong[0])
    raise AssertionError(
        f"{name}the elements agree, but {len(wrong)} of {len(one)} bytes of memory differ, first at byte {at}: "
        f"{int(one[at])}, wanted {int(other[at])}"
    )


def _at_first_difference(got: torch.Tensor, want: torch.Tensor, wrong: torch.Tensor | None, what: object) -> None:
    __tracebackhide__ = True
    name = f"{what}: " if str(what) else ""
    if wrong is None:
        raise AssertionError(f"{name}{got.dtype} {tuple(got.shape)}, wanted {want.dtype} {tuple(want.shape)}")
    places = wrong.nonzero()
    if len(places):
        at = tuple(places[0].tolist())
        raise AssertionError(
            f"{name}{len(places)} of {got.numel()} differ, first at {list(at)}: got {got[at].item()!r}, "
            f"wanted {want[at].item()!r}"
        )
