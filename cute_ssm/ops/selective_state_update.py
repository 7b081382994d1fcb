"""`selective_state_update`: one token of a state-space model's recurrence, in place on a pool of states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cute_ssm import arch as archs
from cute_ssm import runtime
from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops import _library
from cute_ssm.reference.selective_state_update import selective_state_update as reference
from cute_ssm.spec import SelectiveStateUpdateSpec
from cute_ssm.tuning import overridden
from cute_ssm.tuning import selective_step as tuning

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
BULK_BYTES = 16  # bulk copies: addresses and sizes are multiples of it
ALGORITHMS = ("auto", "simple", "vertical", "horizontal", "async_horizontal")


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    state_scale: Tensor | None = None,
    out: Tensor | None = None,
    disable_state_update: bool = False,
    intermediate_states_buffer: Tensor | None = None,
    intermediate_state_indices: Tensor | None = None,
    intermediate_state_scales: Tensor | None = None,
    rand_seed: Tensor | None = None,
    philox_rounds: int = 10,
    cache_steps: int = 0,
    algorithm: str = "auto",
    dst_state_batch_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
) -> Tensor:
    """Advance the state of every sequence by one token and return the outputs.

    With the state h [dim, dstate] of a (sequence, head), in float32::

        dt' = softplus(dt + dt_bias);  h <- exp(A dt') h + (dt' x) B^T;  out = (h C + D x) silu(z)

    ``out`` is computed from h before it is rounded to the type of ``state``.  Tensors on a GPU run the compiled kernel;
    tensors on the CPU run the PyTorch reference, or the same compiled kernel inside ``ptxsim.emulate()``.

    Parameters
    ----------
    state : Tensor, (slots, nheads, dim, dstate), float32/bfloat16/float16
        Pool of states, **updated in place**.  The last two dimensions are contiguous; the strides of slots and heads
        are free multiples of 16 bytes, and so is the address.  dim is a multiple of 8, dstate 16 to 256.
    x : Tensor, (batch, nheads, dim), float32/bfloat16/float16
        Input.  Stride 1 in the last dimension, like z, B, C and out; other strides are free.
    dt : Tensor, (batch, nheads, dim), float32/bfloat16/float16
        Step size before bias and softplus.  Stride 0 in the last dimension means one value per head.
    A : Tensor, (nheads, dim, dstate), float32/bfloat16/float16
        Decay rates.  Strides 0 in the last two dimensions mean one value per head (Mamba-2); otherwise the last
        dimension is contiguous (Mamba-1).
    B, C : Tensor, (batch, ngroups, dstate), type of x
        Input and output projections; nheads is a multiple of ngroups.
    D : Tensor, (nheads, dim), float32/bfloat16/float16, optional
        Skip weights, any strides.
    z : Tensor, (batch, nheads, dim), type of x, optional
        Gate.
    dt_bias : Tensor, (nheads, dim), float32/bfloat16/float16, optional
        Any strides; if dt has stride 0 in its last dimension, dt_bias has too.
    dt_softplus : bool
        Apply softplus to dt + dt_bias (the identity above 20).
    state_batch_indices : Tensor, (batch,) or (batch, n), int32/int64, optional
        Slot of each sequence; of a matrix, column 0.  None: sequence b uses slot b, and none is padding.
    pad_slot_id : int
        A sequence whose slot is this one is padding: nothing of it is read or written, and its row of ``out`` stays as
        it is, or is zero if ``out`` was not given.
    out : Tensor, (batch, nheads, dim), type of x, optional
        **Written.**  Allocated if None.
    disable_state_update : bool
        Leave ``state`` as it is.
    dst_state_batch_indices : Tensor, like state_batch_indices, optional
        Slots that receive the new states instead of those read; ``pad_slot_id`` entries are not written.  Slots of
        one call must be distinct, and none may be read by another sequence.
    algorithm : {"auto", "simple", "vertical", "horizontal", "async_horizontal"}
        Accepted for compatibility: one kernel serves all, and chooses its tiles by the amount of work.
    state_scale, intermediate_states_buffer, intermediate_state_indices, intermediate_state_scales, rand_seed, \
    philox_rounds, cache_steps, cu_seqlens, num_accepted_tokens
        Quantised states, stochastic rounding and several tokens per sequence: refused by this version.

    Returns
    -------
    Tensor
        ``out``, of the shape of x.

    Raises
    ------
    ValueError, TypeError
        A shape, type, stride, device or index is not as described above.  Nothing has been written.
    UnsupportedSpecError
        A legal call that this version has no kernel for.
    UnsupportedArchError
        The tensors are on a GPU that the kernels are not compiled for.

    Notes
    -----
    A single head may be left out of every shape at once or of some: state (slots, dim, dstate), x, dt, z, out
    (batch, dim), A (dim, dstate), B, C (batch, dstate), D, dt_bias (dim,).

    The signature follows ``flashinfer.mamba.selective_state_update``; the recurrence is that of Dao and Gu,
    "Transformers are SSMs" (2024), and of Gu and Dao, "Mamba" (2023), whose layouts are distinguished by strides.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(describe("algorithm", " or ".join(ALGORITHMS), repr(algorithm)))
    if cache_steps or not (
        state_scale is intermediate_states_buffer is intermediate_state_indices is intermediate_state_scales is None
        and rand_seed is cu_seqlens is num_accepted_tokens is None
    ):
        raise _refusal(
            state_scale=state_scale,
            intermediate_states_buffer=intermediate_states_buffer,
            intermediate_state_indices=intermediate_state_indices,
            intermediate_state_scales=intermediate_state_scales,
            rand_seed=rand_seed,
            cache_steps=cache_steps or None,
            cu_seqlens=cu_seqlens,
            num_accepted_tokens=num_accepted_tokens,
        )
    for name, value in (("state", state), ("x", x), ("A", A), ("B", B)):
        if not isinstance(value, Tensor):
            raise TypeError(describe(name, "a torch.Tensor", type(value).__name__))
    allocated = out is None
    result = out if out is not None else torch.empty_like(x, memory_format=torch.contiguous_format)
    operands = (state, x, dt, A, B, C, D, z, dt_bias, result)
    if state.dim() != 4 or x.dim() != 3 or A.dim() != 3 or B.dim() != 3:
        operands = _with_heads(*operands)
    state, x, dt, A, B, C, D, z, dt_bias, written = operands
    if state_batch_indices is not None and state_batch_indices.dim() == 2:
        state_batch_indices = state_batch_indices[:, 0]
    if dst_state_batch_indices is not None and dst_state_batch_indices.dim() == 2:
        dst_state_batch_indices = dst_state_batch_indices[:, 0]
    run = _run if type(x) is Tensor and not torch.compiler.is_compiling() else _overload
    run(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, pad_slot_id, written,
        disable_state_update, dst_state_batch_indices, allocated,
    )  # fmt: skip
    return result


def _refusal(**given: object) -> UnsupportedSpecError:
    names = ", ".join(name for name, value in given.items() if value is not None)
    return UnsupportedSpecError(
        f"{names}: this version advances one token per sequence with a float32, bfloat16 or float16 state; "
        "call it once per token, and leave these arguments out"
    )


def _with_heads(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    out: Tensor,
) -> tuple[Any, ...]:
    """Insert the axis of a single head, or group, where an argument leaves it out."""

    def insert(tensor: Tensor | None, rank: int, axis: int) -> Tensor | None:
        return tensor.unsqueeze(axis) if isinstance(tensor, Tensor) and tensor.dim() == rank - 1 else tensor

    x, dt, B, C, z, out = (insert(tensor, 3, 1) for tensor in (x, dt, B, C, z, out))  # type: ignore[assignment]
    D, dt_bias = insert(D, 2, 0), insert(dt_bias, 2, 0)
    return insert(state, 4, 1), x, dt, insert(A, 3, 0), B, C, D, z, dt_bias, out


# Steady state: everything a kernel is chosen by, but for strides and alignment.  Those, and the equality of sizes and
# types, the kernel's own entry checks before it launches; if it refuses, the arguments are examined one by one.
_plans: dict[tuple[object, ...] | None, tuple[Callable[..., None], int]] = {}


def _run(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    src: Tensor | None,
    pad_slot_id: int,
    out: Tensor,
    disable_state_update: bool,
    dst: Tensor | None,
    zero_padding: bool,
) -> None:
    tensors = (state, x, dt, A, B, C, D, z, dt_bias, src, dst, out)
    flags = (dt_softplus, disable_state_update, zero_padding)
    key: tuple[object, ...] | None
    try:
        key = (
            x.shape, B.shape, state.dtype, x.dtype, dt.dtype, A.dtype, flags, x.device,
            None if D is None else D.dtype, z is None, None if dt_bias is None else dt_bias.dtype,
            None if src is None else src.dtype, None if dst is None else dst.dtype,
        )  # fmt: skip
    except AttributeError:  # something is no tensor, which `_check` will name
        key = None
    plan = _plans.get(key)
    if plan is not None and not overridden():
        try:
            plan[0](*_canonical(*tensors), pad_slot_id, 1, plan[1])
            return
        except (TypeError, ValueError):
            pass  # other strides or alignment than last time, or a bad argument: the checks below tell
    spec = _check(*tensors, flags)
    if not x.is_cuda:
        _run_on_cpu(spec, tensors, pad_slot_id, flags)
    elif x.shape[0]:
        arch = runtime.target(x.device)
        sm_count = torch.cuda.get_device_properties(x.device).multi_processor_count
        config = tuning.choose(spec, arch, x.shape[0] * x.shape[1], sm_count)
        plan = (runtime.get(spec, config, arch), sm_count * config.ctas_per_sm)
        if not overridden():
            _plans[key] = plan
        plan[0](*_canonical(*tensors), pad_slot_id, 1, plan[1])


def _run_on_cpu(
    spec: SelectiveStateUpdateSpec, tensors: tuple[Any, ...], pad_slot_id: int, flags: tuple[bool, bool, bool]
) -> None:
    """Run the compiled kernel if an emulator is open, else the reference."""
    state, x, src, dst = tensors[0], tensors[1], tensors[9], tensors[10]
    for name, indices in (("state_batch_indices", src), ("dst_state_batch_indices", dst)):
        if indices is not None:
            arguments.check_slots(name, indices, state.shape[0], pad_slot_id)
    emulator = runtime.emulator()
    if emulator is None:
        _reference(*tensors, pad_slot_id, flags)
    elif x.shape[0]:
        arch = archs.by_name(emulator.arch)
        sm_count = emulator.sm_count or arch.sm_count
        config = tuning.choose(spec, arch, x.shape[0] * x.shape[1], sm_count)
        runtime.emulated(spec, config, arch)(*_canonical(*tensors), pad_slot_id, 1, sm_count * config.ctas_per_sm)


def _check(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    src: Tensor | None,
    dst: Tensor | None,
    out: Tensor,
    flags: tuple[bool, bool, bool],
) -> SelectiveStateUpdateSpec:
    """Validate the arguments and return the spec of the call."""
    named = {
        "state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias,
        "state_batch_indices": src, "dst_state_batch_indices": dst, "out": out,
    }  # fmt: skip
    arguments.check_tensors(named, ("D", "z", "dt_bias", "state_batch_indices", "dst_state_batch_indices"))
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    _check_shapes(given)
    for name in ("state", "x", "dt", "A", "D", "dt_bias"):
        if name in given:
            arguments.check_dtype(name, given[name], FLOATS)
    for name in ("B", "C", "z", "out"):
        if name in given:
            arguments.check_dtype(name, given[name], (x.dtype,), f"the type of x; cast it with {name}.to(x.dtype)")
    for name in ("state_batch_indices", "dst_state_batch_indices"):
        if name in given:
            arguments.check_dtype(name, given[name], INTEGERS)
    for name in ("x", "B", "C", "z", "out"):
        if name in given:
            arguments.check_last_contiguous(name, given[name])
    _check_state_layout(state)
    A_tied = A.stride(-1) == 0 and A.stride(-2) == 0
    if not A_tied and A.stride(-1) != 1:
        expected = "strides 0 in the last two dimensions (one value per head) or stride 1 in the last"
        raise ValueError(describe("A", expected, f"strides {A.stride()}", "pass A.contiguous()"))

    def name_of(tensor: Tensor | None) -> str | None:
        return None if tensor is None else arguments.DTYPE_NAMES[tensor.dtype]

    softplus, disabled, zero_padding = flags
    spec = SelectiveStateUpdateSpec(
        state_dtype=arguments.DTYPE_NAMES[state.dtype],
        input_dtype=arguments.DTYPE_NAMES[x.dtype],
        A_dtype=arguments.DTYPE_NAMES[A.dtype],
        dt_dtype=arguments.DTYPE_NAMES[dt.dtype],
        D_dtype=name_of(D),
        dt_bias_dtype=name_of(dt_bias),
        dim=state.shape[2],
        dstate=state.shape[3],
        A_tied=A_tied,
        dt_tied=dt.stride(-1) == 0 and (dt_bias is None or dt_bias.stride(-1) == 0),
        D_tied=D is not None and D.stride(-1) == 0,
        has_z=z is not None,
        dt_softplus=softplus,
        src_dtype=name_of(src),
        dst_dtype=name_of(dst),
        update_state=not disabled,
        zero_padding=zero_padding and src is not None,
        vector_inputs=False,
    )
    spec.check()
    vectors = (B, C) if A_tied else (A, B, C)
    if all(arguments.aligned(t, tuning.input_vector(spec, t.element_size()) * t.element_size()) for t in vectors):
        spec = dataclasses.replace(spec, vector_inputs=True)
    return spec


def _check_shapes(given: dict[str, Tensor]) -> None:
    """Raise unless all shapes agree; `given` holds the arguments that are not None."""
    ranks = {
        "state": (4, "(slots, nheads, dim, dstate)"),
        "x": (3, "(batch, nheads, dim)"),
        "B": (3, "(batch, ngroups, dstate)"),
    }
    for name, (rank, letters) in ranks.items():
        if given[name].dim() != rank:
            shape = tuple(given[name].shape)
            raise ValueError(describe(name, f"shape {letters}", shape, "this version takes one token per sequence"))
    slots, nheads, dim, dstate = given["state"].shape
    batch, ngroups = given["x"].shape[0], given["B"].shape[1]
    shapes = {
        "x": ((batch, nheads, dim), "(batch, nheads, dim)"),
        "dt": ((batch, nheads, dim), "(batch, nheads, dim)"),
        "A": ((nheads, dim, dstate), "(nheads, dim, dstate)"),
        "B": ((batch, ngroups, dstate), "(batch, ngroups, dstate)"),
        "C": ((batch, ngroups, dstate), "(batch, ngroups, dstate)"),
        "D": ((nheads, dim), "(nheads, dim)"),
        "z": ((batch, nheads, dim), "(batch, nheads, dim)"),
        "dt_bias": ((nheads, dim), "(nheads, dim)"),
        "state_batch_indices": ((batch,), "(batch,)"),
        "dst_state_batch_indices": ((batch,), "(batch,)"),
        "out": ((batch, nheads, dim), "(batch, nheads, dim)"),
    }
    for name, (shape, letters) in shapes.items():
        if name in given:
            arguments.check_shape(name, given[name], shape, letters)
    if ngroups < 1 or nheads % ngroups:
        raise ValueError(describe("B", f"ngroups that divides nheads = {nheads}", f"ngroups = {ngroups}"))
    if slots < batch and not {"state_batch_indices", "dst_state_batch_indices"} <= given.keys():
        if "state_batch_indices" not in given:
            fix = "pass state_batch_indices to say which slot each sequence uses"
            raise ValueError(describe("state", f"at least batch = {batch} slots", slots, fix))


def _check_state_layout(state: Tensor) -> None:
    """Raise unless tiles of the state are contiguous and can be copied in bulk."""
    if state.stride(-1) != 1 or state.stride(-2) != state.shape[-1]:
        expected = "contiguous rows of dstate and heads of dim x dstate"
        raise ValueError(describe("state", expected, f"strides {state.stride()}", "the pool is updated in place"))
    if not arguments.aligned(state[..., 0], BULK_BYTES):
        size = state.element_size()
        got = f"address {state.data_ptr():#x} and strides {state.stride()} of {size} bytes"
        expected = f"an address, and strides of slots and heads, of multiples of {BULK_BYTES} bytes"
        raise ValueError(describe("state", expected, got, "pad the slots of the pool"))


def _reference(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    src: Tensor | None,
    dst: Tensor | None,
    out: Tensor,
    pad_slot_id: int,
    flags: tuple[bool, bool, bool],
) -> None:
    """Gather, compute in float32, round, scatter: what the kernel does, by PyTorch."""
    softplus, disabled, zero_padding = flags
    rows = torch.arange(x.shape[0], device=x.device)
    source = rows if src is None else src.long()
    real = torch.ones_like(rows, dtype=torch.bool) if src is None else source != pad_slot_id
    if zero_padding:
        out[~real] = 0
    rows, source = rows[real], source[real]
    y, new_state = reference(
        state[source], x[rows], dt[rows], A, B[rows], C[rows], D, None if z is None else z[rows], dt_bias, softplus
    )
    out[rows] = y.to(out.dtype)
    if disabled:
        return
    target = source if dst is None else dst.long()[rows]
    kept = torch.ones_like(target, dtype=torch.bool) if dst is None else target != pad_slot_id
    state[target[kept]] = new_state[kept].to(state.dtype)


_overload = _library.register(
    "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, bool dt_softplus, Tensor? state_batch_indices, int pad_slot_id, Tensor(b!) out, "
    "bool disable_state_update, Tensor? dst_state_batch_indices, bool zero_padding) -> ()",
    _run,
    lambda *_: None,
)


def _canonical(state, x, dt, A, B, C, D, z, dt_bias, src, dst, out):
    return (state, x, dt, A, B, C, D, z, dt_bias, out, None, src, dst, None, None, None, None, None, None)
