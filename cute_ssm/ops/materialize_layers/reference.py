"""What `materialize_layers` computes, in plain PyTorch: `materialize`, layer by layer."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cute_ssm.ops.materialize.reference import Pool, materialize
from cute_ssm.reference.history import History, Move, Ring
from cute_ssm.spec import QUANTISED

if TYPE_CHECKING:
    from cute_ssm.ops.materialize_layers.arguments import Arguments


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


def layers_of(call: Arguments, moves_of_layers: Iterable[list[Move]]) -> Iterator[Layer]:
    """Yield what each layer is, with tensors over the memory that the tables speak of."""
    heads, groups, rows = call.num_heads, call.num_heads // call.heads_per_group, call.ring_buffer_len
    state_dtype, input_dtype, A_dtype = (
        getattr(torch, name) for name in (call.state_dtype, call.input_dtype, call.matrixA_dtype)
    )
    for layer, moves in enumerate(moves_of_layers):
        slots = 1 + max((max(move[:2]) for move in moves), default=-1)
        sources = 1 + max((move.source for move in moves), default=-1)

        def view(name: str, dtype: torch.dtype, *shape: int, layer: int = layer) -> Tensor:
            address, stride = (int(getattr(call, f"{name}_{of}")[layer]) for of in ("ptrs", "slot_strides"))
            return at_address(address, dtype, shape, stride)

        quantised = call.state_dtype in QUANTISED
        yield Layer(
            Pool(
                view("state", state_dtype, slots, heads, call.dim, call.dstate),
                view("state_scale", torch.float32, slots, heads, call.dim) if quantised else None,
            ),
            Ring(
                view("x_cache", input_dtype, sources, heads, rows, call.dim),
                view("B_cache", input_dtype, sources, groups, rows, call.dstate),
                view("dt_cache", torch.float32, sources, heads, rows),
            ),
            at_address(int(call.A_ptrs[layer]), A_dtype, (1, heads), heads)[0],
            moves,
            None if call.rand_seed is None else call.rand_seed[layer : layer + 1],
        )
