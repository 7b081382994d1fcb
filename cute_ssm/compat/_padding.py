"""Outputs of padding rows as in vLLM and FlashInfer: those of a zero state, which is not stored."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NOBODY = -1  # for rows that are not padding


class Padding(NamedTuple):
    """A pool with one zero state, and the slots of the batch: 0 for padding rows, `NOBODY` for all others."""

    state: Tensor
    scale: Tensor | None
    slots: Tensor


def padding(state: Tensor, scale: Tensor | None, src: Tensor, accepted: Tensor | None, pad: int) -> Padding:
    """Return the arguments of a second call that writes the padding rows of ``out``.

    Parameters
    ----------
    src : Tensor, (batch,) or (batch, columns)
        Slots of the sequences; of several columns, the one that ``accepted`` selects, else the first.
    """
    first = src
    if src.dim() == 2:
        column = torch.zeros_like(src[:, 0]) if accepted is None else accepted[: src.shape[0]] - 1
        first = src.gather(1, column.long().clamp(0, src.shape[1] - 1)[:, None])[:, 0]
    zeros = state.new_zeros((1, *state.shape[1:]))
    ones = None if scale is None else scale.new_ones((1, *scale.shape[1:]))
    return Padding(zeros, ones, torch.where(first == pad, 0, NOBODY).to(src.dtype))
