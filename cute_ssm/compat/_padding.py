"""Outputs of padding as vLLM and FlashInfer have them: those of a state of zeros, while nothing is stored."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NOBODY = -1  # no slot of a state of zeros


class Padding(NamedTuple):
    """A pool with one state of zeros, and its indices: slot 0 for rows that are padding, `NOBODY` for all others."""

    state: Tensor
    scale: Tensor | None
    slots: Tensor


def padding(state: Tensor, scale: Tensor | None, src: Tensor, accepted: Tensor | None, pad: int) -> Padding:
    """Return what a second call needs that writes the rows of ``out`` whose sequence is padding.

    Parameters
    ----------
    src : Tensor, (batch,) or (batch, columns)
        Slots of the sequences; of several columns, that which ``accepted`` chooses, or the first.
    """
    first = src
    if src.dim() == 2:
        column = torch.zeros_like(src[:, 0]) if accepted is None else accepted[: src.shape[0]] - 1
        first = src.gather(1, column.long().clamp(0, src.shape[1] - 1)[:, None])[:, 0]
    zeros = state.new_zeros((1, *state.shape[1:]))
    ones = None if scale is None else scale.new_ones((1, *scale.shape[1:]))
    return Padding(zeros, ones, torch.where(first == pad, 0, NOBODY).to(src.dtype))
