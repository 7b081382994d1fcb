"""What `materialize_layers` computes, in plain PyTorch: `materialize`, layer by layer."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cute_ssm.ops.materialize.reference import Pool, materialize
from cute_ssm.reference.history import History, Move


class Layer(NamedTuple):
    """The states and pending tokens of one layer, and what to do."""

    pool: Pool
    history: History
    A: Tensor
    moves: Sequence[Move]
    seed: Tensor | None


def materialize_layers(layers: Sequence[Layer], rounds: int) -> None:
    """Fold pending tokens into the states of every layer, and store the results in the same pool.

    Parameters
    ----------
    layers : sequence of Layer
        The states of each are **written**.
    rounds : int
        Rounds of Philox.
    """
    for layer in layers:
        materialize(layer.pool, layer.history, layer.A, layer.pool, layer.moves, layer.seed, rounds)


def at_address(address: int, dtype: torch.dtype, shape: Sequence[int], slot_stride: int) -> Tensor:
    """Return the memory of this process at an address as a tensor, without a copy.

    Parameters
    ----------
    shape : sequence of int
        Slots first; everything behind them is contiguous.
    slot_stride : int
        Elements from one slot to the next.
    """
    inner, size = list(torch.empty(shape, device="meta").stride())[1:], 1
    for extent in shape[1:]:
        size *= extent
    if shape[0] == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    elements = (shape[0] - 1) * slot_stride + size
    memory = (ctypes.c_uint8 * (elements * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(tuple(shape), (slot_stride, *inner))
