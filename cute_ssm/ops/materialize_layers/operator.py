"""`materialize_layers`: the states that pending tokens lead to, in all layers of a model by one launch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from cute_ssm.errors import describe
from cute_ssm.ops import _library
from cute_ssm.ops._arguments import name_of
from cute_ssm.ops._calls import CallPath, Checked
from cute_ssm.ops.materialize.config import choose_materialize
from cute_ssm.ops.materialize_layers import arguments, reference
from cute_ssm.ops.materialize_layers.arguments import TABLE, Arguments


def materialize_layers(
    state_ptrs: Tensor,
    state_slot_strides: Tensor,
    x_cache_ptrs: Tensor,
    x_cache_slot_strides: Tensor,
    B_cache_ptrs: Tensor,
    B_cache_slot_strides: Tensor,
    dt_cache_ptrs: Tensor,
    dt_cache_slot_strides: Tensor,
    A_ptrs: Tensor,
    state_scale_ptrs: Tensor,
    state_scale_slot_strides: Tensor,
    src_slots: Tensor,
    dst_slots: Tensor,
    ring_start: Tensor,
    replay_prefix_len: Tensor,
    active_request_indices: Tensor,
    *,
    state_dtype: torch.dtype,
    input_dtype: torch.dtype,
    matrixA_dtype: torch.dtype,
    dim: int,
    dstate: int,
    num_heads: int,
    heads_per_group: int,
    max_window: int,
    ring_buffer_len: int,
    pad_slot_id: int = -1,
    rand_seed: Tensor | None = None,
    philox_rounds: int = 0,
) -> None:
    """Fold the first pending tokens of rings into states, and store the results in other slots, in all layers.

    It is `materialize` with ``ring_start`` for every layer, by one launch.  The memory of the layers is given by tables
    of addresses on the device, so that layers may be separate allocations.  Cursors and rings are not modified.

    Parameters
    ----------
    state_ptrs, x_cache_ptrs, B_cache_ptrs, dt_cache_ptrs, state_scale_ptrs : Tensor, (layers,), int64
        Addresses of each layer's states (slots, num_heads, dim, dstate), rings x (slots, num_heads, ring_buffer_len,
        dim), B (slots, groups, ring_buffer_len, dstate) and dt' (slots, num_heads, ring_buffer_len), and scales (slots,
        num_heads, dim): contiguous within a slot.  States and scales are **written**.  Those of states, x and B are
        multiples of 16 bytes.  dt' and scales are float32; scales are not read unless states are quantised.
    state_slot_strides, x_cache_slot_strides, B_cache_slot_strides, dt_cache_slot_strides, state_scale_slot_strides : \
    Tensor, (layers,), int64
        Elements from one slot to the next; of states, x and B, multiples of 16 bytes.
    A_ptrs : Tensor, (layers,), int64
        Addresses of each layer's A (num_heads,).
    src_slots, dst_slots : Tensor, (layers, batch), int32
        Slots that are read and written.  Those that are written are distinct within a layer, and no other request reads
        them.  A request whose slots are the same folds its pending tokens in place.
    ring_start : Tensor, (batch,), int32
        Row of the oldest pending token of each request.
    replay_prefix_len : Tensor, (batch,), int32
        Number of pending tokens to fold: 0 to ``max_window``.
    active_request_indices : Tensor, (batch,), int32
        The requests to process, each once, in any order; -1 behind them.
    state_dtype : torch.dtype
        float32, bfloat16, float16, int16, int8 or float8_e4m3fn.
    input_dtype : torch.dtype
        Of x and B: bfloat16 or float16.
    matrixA_dtype : torch.dtype
        Of A: float32, bfloat16 or float16.
    dim, dstate : int
        Multiples of 8 up to 256.
    num_heads, heads_per_group : int
        Heads of each layer, and how many share a row of B.
    max_window, ring_buffer_len : int
        Most pending tokens, up to 64, and rows of each ring, up to 128.
    pad_slot_id : int
        Requests that read or write this slot are skipped in that layer.
    rand_seed : Tensor, (layers,), int64, optional
        Round stochastically, with a seed for each layer.  None if states are float32.
    philox_rounds : int
        Number of rounds of the Philox generator; 0 without ``rand_seed``.

    Raises
    ------
    ValueError, TypeError
        A shape, type or value is not as described above.  Nothing has been written.  On a GPU, the host reads no
        contents: requests with a negative slot, or a row or number out of range, are skipped.  Nothing can check an
        address, or that a slot is within its allocation.
    UnsupportedSpecError, UnsupportedArchError
        The kernel does not support the sizes, or the GPU.

    Notes
    -----
    The states of a layer have the bits that `materialize` gives with ``num_tokens = replay_prefix_len``.

    The tensors behind the addresses must live until the launch has ended.  Nothing that traces a program sees them, so
    a call breaks a graph of ``torch.compile``.  The emulator knows only the memory of arguments: tell it of theirs by
    ``session.register(tensor)``.
    """
    if is_compiling():
        fix = "call it outside of torch.compile, or without fullgraph=True"
        raise RuntimeError(f"materialize_layers: writes memory by address, which no graph can order; {fix}")
    for name, dtype in (("state_dtype", state_dtype), ("input_dtype", input_dtype), ("matrixA_dtype", matrixA_dtype)):
        if not isinstance(dtype, torch.dtype):
            raise TypeError(describe(name, "a torch.dtype", type(dtype).__name__))
    _untraced(_REGISTERED.route(state_ptrs))(
        state_ptrs, state_slot_strides, x_cache_ptrs, x_cache_slot_strides, B_cache_ptrs, B_cache_slot_strides,
        dt_cache_ptrs, dt_cache_slot_strides, A_ptrs, state_scale_ptrs, state_scale_slot_strides, src_slots, dst_slots,
        ring_start, replay_prefix_len, active_request_indices, rand_seed, name_of(state_dtype), name_of(input_dtype),
        name_of(matrixA_dtype), dim, dstate, num_heads, heads_per_group, max_window, ring_buffer_len, pad_slot_id,
        philox_rounds,
    )  # fmt: skip


def _untraced(run: Callable[..., None]) -> Callable[..., None]:
    """Return a function whose calls ``torch.compile`` does not trace, not even behind a break."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return run
    if run not in _disabled:
        _disabled[run] = dynamo.disable(run)
    return _disabled[run]


_disabled: dict[Callable[..., None], Callable[..., None]] = {}
_path = CallPath()


def _run(*values: Any) -> None:
    call = Arguments(*values)
    tensors = call[: call._fields.index("state_dtype")]
    key: tuple[object, ...] | None
    try:
        layers, batch = call.src_slots.shape
        key = (*call[len(tensors) :], layers, batch > 0, call.src_slots.device, call.rand_seed is None)
    except (AttributeError, ValueError):  # something is no tensor, or of another rank, which the checks will name
        key = None
    operands = (
        *tensors, call.num_heads, call.heads_per_group, min_of(call.max_window, call.ring_buffer_len),
        call.ring_buffer_len, call.pad_slot_id,
    )  # fmt: skip
    if _path.run_plan(key, operands):
        return
    _path.run(key, _checked(call, operands))


def min_of(max_window: Any, ring_buffer_len: Any) -> Any:
    """Return the most tokens that a request can have; what is no number is left to the checks."""
    both = isinstance(max_window, int) and isinstance(ring_buffer_len, int)
    return min(max_window, ring_buffer_len) if both else max_window


def _checked(call: Arguments, operands: tuple[Any, ...]) -> Checked:
    """Check the arguments of a call, and say how it runs."""
    spec = arguments.check(call)
    return Checked(
        spec,
        operands,
        units=call.src_slots.numel() * call.num_heads,
        choose=lambda arch, sm_count: choose_materialize(),
        check_contents=lambda: arguments.check_contents(call),
        reference=lambda: reference.materialize_layers(
            list(reference.layers_of(call, arguments.moves_of(call))), spec.philox_rounds
        ),
    )


_REGISTERED = _library.register(TABLE.schema("serving_materialize_layers"), _run)
