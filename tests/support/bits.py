"""Comparison of tensors bit for bit, with a message that says where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of the elements, as integers: a NaN equals itself, and -0 is not 0."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().contiguous().view(sizes[tensor.dtype.itemsize])


def same_bits(got: torch.Tensor, want: torch.Tensor, what: str = "") -> None:
    """Assert that two tensors have the same type, shape and bits; `what` is named if they do not."""
    name = f"{what}: " if what else ""
    assert got.dtype == want.dtype and got.shape == want.shape, (
        f"{name}{got.dtype} {tuple(got.shape)}, wanted {want.dtype} {tuple(want.shape)}"
    )
    wrong = (stored(got) != stored(want)).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{name}{len(wrong)} of {got.numel()} differ, first at {list(at)}: {got[at].item()!r}, "
            f"wanted {want[at].item()!r}"
        )


def each_same_bits(got: Mapping[str, torch.Tensor] | Sequence[torch.Tensor], want: object, what: str = "") -> None:
    """Do so for every tensor of `want`, a mapping or a sequence like `got`."""
    if isinstance(want, Mapping):
        for name, tensor in want.items():
            same_bits(got[name], tensor, f"{what}: {name}" if what else name)
    else:
        for i, (one, other) in enumerate(zip(got, want, strict=True)):
            same_bits(one, other, f"{what}: {i}" if what else str(i))
