"""`selective_state_update_replayssm_output_only`: one token from a state that is stored every so many tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _library
from cute_ssm.ops._arguments import PHILOX_ROUNDS, check_rounding, check_tied, draw_seed, first_rows
from cute_ssm.ops._calls import CallPath, Checked
from cute_ssm.ops._dlpack import NotTensorError, again, not_tensor
from cute_ssm.ops.replay_decode import arguments, reference
from cute_ssm.ops.replay_decode.arguments import TABLE, Arguments
from cute_ssm.ops.replay_decode.config import choose_replay_decode

RESHAPED = ("state", "x", "dt", "A", "B", "C", "D", "dt_bias", "z")  # may get an axis of one element


def selective_state_update_replayssm_output_only(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    z: Tensor | None = None,
    dt_softplus: bool = False,
    x_cache: Tensor | None = None,
    dt_cache: Tensor | None = None,
    B_cache: Tensor | None = None,
    bc_pre: Tensor | None = None,
    write_pos: Tensor | None = None,
    is_flush: Tensor | None = None,
    max_cache_len: int = 16,
    state_batch_indices: Tensor | None = None,
    null_block_id: int = 0,
    out: Tensor | None = None,
    enable_stochastic_rounding: bool = False,
    cache_philox_rounds: int = 0,
    *,
    rand_seed: Tensor | None = None,
    saturate: bool = False,
) -> Tensor:
    """Return the outputs at one new token of every sequence, from a state and the tokens since it was stored.

    A slot holds a state and the inputs of ``write_pos`` tokens after it.  A step computes the outputs from both and
    appends its token to the caches, or, with ``is_flush``, stores the state after all of them, the new token included:
    the next step then has ``write_pos`` 0.  Name and signature are those of vLLM 0.33 (ReplaySSM), which takes two
    launches where this takes one.  Tensors on a GPU run the compiled kernel; tensors on the CPU run the PyTorch
    reference, or the same compiled kernel inside ``ptxsim.emulate()``.

    Parameters
    ----------
    state : Tensor, (slots[, nheads], dim, dstate), float32/bfloat16/float16
        Pool of states, **updated in place** by steps that flush.  The last two dimensions are contiguous; the address
        and other strides are multiples of 16 bytes.  dim and dstate are multiples of 8 up to 256.
    x : Tensor, (batch[, nheads], dim), float32/bfloat16/float16
        Input.  x, B, C, z and out have stride 1 in the last dimension and any other strides.
    dt : Tensor, (batch[, nheads], dim), float32/bfloat16/float16
        Step size before bias and softplus, one value per head: stride 0 in the last dimension.
    A : Tensor, ([nheads, ]dim, dstate), float32/bfloat16/float16
        Decay rate, not positive, one value per head: strides 0 in the last two dimensions.
    B, C : Tensor, (batch[, ngroups], dstate), type of x
        Input and output projections; nheads is a multiple of ngroups.
    D, dt_bias : Tensor, ([nheads, ]dim), float32/bfloat16/float16, optional
        Skip weights, and what is added to dt; dt_bias has stride 0 in the last dimension.
    z : Tensor, (batch[, nheads], dim), type of x, optional
        Gate.
    dt_softplus : bool
        Apply softplus to dt + dt_bias (the identity above 20).
    x_cache : Tensor, (slots, nheads, max_cache_len, dim), type of x
    B_cache : Tensor, (slots, ngroups, max_cache_len, dstate), type of x
        **Updated in place** by steps that do not flush.  Stride 1 in the last dimension; the address and other strides
        are multiples of 16 bytes.
    dt_cache : Tensor, (slots, nheads, max_cache_len), float32
        **Updated in place** likewise: processed step sizes.
    bc_pre : Tensor, optional
        Scratch memory of vLLM's first kernel.  Not used.
    write_pos : Tensor, (>= batch,), int32
        Number of tokens in the caches of each sequence, 0 to max_cache_len - 1.  Rows from there on are never read.
    is_flush : Tensor, (>= batch,), bool/int8
        Sequences whose state is stored.
    max_cache_len : int
        Rows of the caches, 1 to 64.
    state_batch_indices : Tensor, (>= batch,) or (>= batch, n), int32/int64, optional
        Slot of each sequence, all different; of a matrix, column 0.  None: sequence b uses slot b, and none is padding.
    null_block_id : int
        A sequence with this slot is padding: nothing of it is read or written, ``out`` included.
    out : Tensor, (batch[, nheads], dim), type of x
        **Written.**  Required.
    enable_stochastic_rounding : bool
        Round states stochastically, with a seed drawn on the device.  float16 states only.
    cache_philox_rounds : int
        Rounds of the Philox generator; 0: 10.
    rand_seed : Tensor, (1,), int64, optional
        Not in vLLM.  The seed of stochastic rounding; without it, every layer draws one.
    saturate : bool
        Not in vLLM.  Store +-65504 in place of infinities in new float16 states.  NaN stays NaN.  Must be False with
        states of other types.

    Returns
    -------
    Tensor
        ``out``.

    Raises
    ------
    ValueError, TypeError
        A shape, type, stride, device, index or position is not as described above.  Nothing has been written.
    UnsupportedSpecError, UnsupportedArchError
        This version has no kernel for the sizes, or for the GPU.
    GradientError
        Grad mode is on, and an argument requires grad.  Weights that require grad are used as constants, with one
        warning.

    Notes
    -----
    The host never reads the contents of tensors on a GPU: there, a sequence whose slot or position is out of range is
    skipped.  All sums are float32; exponents are summed from the last token on.  Stochastic rounding takes the random
    bits of `cute_ssm.reference.rounding`, with ``write_pos`` as the token.

    vLLM's kernel rounds the products of dt' and B to the type of x when it flushes; this one does not.
    """
    given = (state, x, dt, A, B, C, D, dt_bias, z)
    try:
        for name, value in (("state", state), ("x", x), ("out", out)):
            if not isinstance(value, Tensor):
                raise not_tensor(name, value)
        arguments.check_rows(max_cache_len, x_cache)
        seed = _seed(state, enable_stochastic_rounding, cache_philox_rounds, rand_seed)
        state, A = _with_axis(state, 4, 1), _with_axis(A, 3, 0)
        x, dt, B, C, z, rows = (_with_axis(tensor, 3, 1) for tensor in (x, dt, B, C, z, out))
        D, dt_bias = _with_axis(D, 2, 0), _with_axis(dt_bias, 2, 0)
        if state.dim() != 4:
            raise ValueError(describe("state", "shape (slots, nheads, dim, dstate)", tuple(state.shape)))
        _REGISTERED.route(x)(
            state, x, _per_head("dt", dt, 1, state), _per_head("A", A, 2, state), B, C, D,
            None if dt_bias is None else _per_head("dt_bias", dt_bias, 1, state), z, x_cache, dt_cache, B_cache,
            write_pos, is_flush, _column("state_batch_indices", state_batch_indices), rows, seed, dt_softplus,
            null_block_id, cache_philox_rounds or PHILOX_ROUNDS, saturate,
        )  # fmt: skip
        return out  # type: ignore[return-value]
    except NotTensorError:
        named = {**locals(), **dict(zip(RESHAPED, given))}
        return again(selective_state_update_replayssm_output_only, named, *TABLE.written)


def _with_axis(tensor: Any, rank: int, axis: int) -> Any:
    """Insert an axis of one element that a tensor of this rank has and the argument leaves out."""
    return tensor.unsqueeze(axis) if isinstance(tensor, Tensor) and tensor.dim() == rank - 1 else tensor


def _per_head(name: str, tensor: object, inner: int, state: Tensor) -> Any:
    """Return a tensor that has one value per head without its `inner` last axes, which repeat it."""
    check_tied(name, tensor, inner, state)
    return tensor[(..., *[0] * inner)]  # type: ignore[index]


def _column(name: str, indices: Any) -> Any:
    if isinstance(indices, Tensor) and indices.dim() == 2 and indices.shape[1]:
        return indices[:, 0]
    return indices


def _seed(state: Tensor, enabled: bool, rounds: int, seed: Tensor | None) -> Tensor | None:
    """Return the given or a drawn seed, or None to round to nearest."""
    check_rounding(state, enabled, rounds, seed)
    return draw_seed(state.device) if enabled and seed is None else seed


_inputs = TABLE.getter("B", "C")


def _layout(operands: tuple[Any, ...]) -> tuple[object, ...]:
    """Return the strides and the alignment that a kernel for rows at any address does not check."""
    return tuple([(tensor.stride(), tensor.data_ptr() % arguments.ACCESS_BYTES) for tensor in _inputs(operands)])


_path = CallPath(_layout)


def _run(*values: Any) -> None:
    """Run the operator ``cute_ssm::replay_decode``."""
    call = Arguments(*values)
    key: tuple[object, ...] | None
    try:
        batch = call.x.shape[0]
        positions, flags, slots = first_rows(batch, call.write_pos, call.is_flush, call.state_batch_indices)
        call = call._replace(write_pos=positions, is_flush=flags, state_batch_indices=slots)
        tensors: tuple[Any, ...] = call[: len(TABLE.tensors)]
        key = (
            call.x.shape, call.state.shape, call.B.shape, call.x_cache.shape, call.x.device, call.dt_softplus,
            call.saturate,
            *[None if tensor is None else tensor.dtype for tensor in tensors],
            slots is not None or call.state.shape[0] >= batch, call.philox_rounds,
        )  # fmt: skip
        mask = call.is_flush.view(torch.uint8)  # as the kernel reads it
    except (AttributeError, IndexError, RuntimeError, TypeError):  # no tensor, or other types: the checks tell
        key, mask = None, call.is_flush
    operands = (*call._replace(is_flush=mask)[: len(TABLE.tensors)], call.null_block_id)
    if _path.run_plan(key, operands):
        return
    _path.run(key, _checked(call, operands))


def _checked(call: Arguments, operands: tuple[Any, ...]) -> Checked:
    """Check the arguments of a call, and say how it runs."""
    spec = arguments.check(call)
    return Checked(
        spec,
        operands,
        units=call.x.numel(),
        choose=lambda arch, sm_count: choose_replay_decode(spec, arch, call.dt.numel()),
        check_contents=lambda: arguments.check_contents(call),
        reference=lambda: reference.update(call, spec.philox_rounds),
        strict=spec.vector_inputs,
    )


_REGISTERED = _library.register(TABLE.schema("replay_decode"), _run)
