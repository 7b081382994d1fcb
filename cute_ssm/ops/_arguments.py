"""Checks that operators share; each error has the form of `errors.describe`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops._dlpack import NotTensorError, not_tensor

# Arguments that some operator writes.  Errors about them never suggest a copy, which would receive the results in place
# of the caller's tensor, not even where an operator only reads them: they belong to a pool that others write.
WRITTEN = frozenset((
    "out", "output", "state", "state_scale", "out_scale", "initial_state", "ssm_states",
    "intermediate_states_buffer", "intermediate_state_scales", "old_x", "old_B", "old_dt", "old_cumAdt",
    "x_cache", "B_cache", "dt_cache", "k_cache", "v_cache", "g_cache", "beta_cache", "x_history", "B_history",
    "dt_history", "cache_buf_idx", "ring_start", "prev_num_accepted_tokens", "work_items", "num_writes",
    "rand_seed",
))  # fmt: skip
# Arguments of one value per head, and the dimensions that are expanded.
PER_HEAD = {"dt": 1, "A": 2, "D": 1, "dt_bias": 1}
PHILOX_ROUNDS = 10  # for `cache_philox_rounds` = 0, in functions of vLLM and SGLang


def allocation(
    tensor: Tensor, shape: Iterable[int] | None = None, dtype: torch.dtype | None = None, device: object = None
) -> str:
    """Return the suggested fix for a tensor that is written: allocate one like it, except for what is given."""
    sizes = tuple(tensor.shape if shape is None else shape)
    made = f"torch.zeros({sizes}, dtype={dtype or tensor.dtype}, device={str(device or tensor.device)!r})"
    return f"it is written, so allocate it as {made}"


def draw_seed(device: torch.device) -> Tensor:
    """Return a seed of stochastic rounding, (1,) int64, drawn on the device."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def check_rounding(state: Tensor, enabled: bool, rounds: int, seed: Tensor | None, fix: str = "") -> None:
    """Check the arguments by which vLLM's functions ask for stochastic rounding."""
    if not enabled and seed is not None:
        raise ValueError(describe("rand_seed", "None without enable_stochastic_rounding", "a tensor"))
    if enabled and state.dtype != torch.float16:
        raise TypeError(describe("state", "dtype float16 with enable_stochastic_rounding", state.dtype, fix))
    if enabled and rounds < 0:
        raise ValueError(describe("cache_philox_rounds", "0 or more", rounds))


def name_of(dtype: torch.dtype) -> str:
    """Return ``"float16"`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


def type_of(tensor: Tensor | None) -> str | None:
    """Return the name of a tensor's type, or None for an argument that is absent."""
    return None if tensor is None else name_of(tensor.dtype)


def not_tensors(**given: object) -> NotTensorError:
    """Return the error that names the first argument that is no tensor."""
    return not_tensor(*next((name, value) for name, value in given.items() if not isinstance(value, Tensor)))


def check_tensors(
    tensors: Mapping[str, object], optional: Iterable[str], written: frozenset[str] = frozenset()
) -> None:
    """Raise unless all are tensors (or None where optional) of one device."""
    optional, written = set(optional), written | WRITTEN
    device = None
    for name, value in tensors.items():
        if value is None and name in optional:
            continue
        if not isinstance(value, Tensor):
            raise not_tensor(name, value)
        if device is None:
            first, device = name, value.device
            if device.type not in ("cuda", "cpu"):
                expected, fix = "a tensor on a GPU or on the CPU", "move all to one of them"
                if name in written:
                    fix = f"{fix}; {allocation(value, device='cuda')}"
                raise ValueError(describe(name, expected, f"one on {device}", fix))
        elif value.device != device:
            fix = f"move it with {name}.to({str(device)!r})"
            if name in written:
                fix = allocation(value, device=device)
            raise ValueError(describe(name, f"a tensor on {device} like {first}", f"one on {value.device}", fix))


def check_dtype(
    name: str, tensor: Tensor, allowed: Iterable[torch.dtype], why: str = "", cast: bool = False, written: bool = False
) -> None:
    """Raise unless the tensor has one of the types.  `cast`: suggest a cast, unless the tensor is written."""
    allowed = tuple(allowed)
    if tensor.dtype not in allowed:
        if written or name in WRITTEN:
            why = f"{why}; " * bool(why) + allocation(tensor, dtype=allowed[0])
        elif cast:
            why = f"{why}; " * bool(why) + f"cast it with {name}.to({allowed[0]})"
        raise TypeError(describe(name, f"dtype {' or '.join(map(name_of, allowed))}", name_of(tensor.dtype), why))


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], letters: str, written: bool = False) -> None:
    """Raise unless the shape is the given one; `letters` spells it in the user's terms."""
    if tensor.shape != shape:
        fix = _of_shape(name, tensor, shape, written)
        raise ValueError(describe(name, f"shape {letters} = {shape}", tuple(tensor.shape), fix))


def _of_shape(name: str, tensor: Tensor, shape: tuple[int, ...], written: bool) -> str:
    """Return the suggested fix for a tensor of another shape."""
    if written or name in WRITTEN:
        return allocation(tensor, shape)
    axes = PER_HEAD.get(name.partition("[")[0], 0)  # A[1]: that of a layer
    if axes and len(shape) > axes and tensor.shape == shape[:-axes]:
        return f"pass {name}[..., {', '.join(['None'] * axes)}].expand({', '.join(map(str, shape))})"
    return ""


def check_last_contiguous(name: str, tensor: Tensor) -> None:
    """Raise unless the last dimension has stride 1."""
    if tensor.stride(-1) != 1:
        fix = allocation(tensor) if name in WRITTEN else f"pass {name}.contiguous()"
        raise ValueError(describe(name, "stride 1 in its last dimension", f"strides {tensor.stride()}", fix))


def check_contiguous(name: str, tensor: Tensor, count: int, axes: Sequence[str], written: bool) -> None:
    """Raise unless the last `count` dimensions are contiguous; `axes` spells all dimensions."""
    size, good = 1, True
    for n, stride in zip(reversed(tensor.shape[-count:]), reversed(tensor.stride()[-count:])):
        good, size = good and stride == size, size * n
    if not good:
        expected = "stride 1 in its last dimension"
        if count > 1:
            expected = f"contiguous rows of {axes[-1]} in contiguous blocks of {' x '.join(axes[-count:])}"
        fix = allocation(tensor) if written or name in WRITTEN else f"pass {name}.contiguous()"
        raise ValueError(describe(name, expected, f"strides {tensor.stride()}", fix))


def check_aligned(name: str, tensor: Tensor, n_bytes: int, contiguous: int, axis: str, written: bool) -> None:
    """Raise unless the address, and the strides of all but the last `contiguous` dimensions, are multiples of bytes.

    `axis` is what the first dimension counts.
    """
    if not aligned(tensor, n_bytes, contiguous):
        got = f"address {tensor.data_ptr():#x} and strides {tensor.stride()} of {tensor.element_size()} bytes"
        padded = "the slots of the pool" if axis == "slots" and contiguous > 1 else "its rows"
        fix = f"pad {padded}: {allocation(tensor)}" if written or name in WRITTEN else "pass a copy"
        expected = f"an address and outer strides of multiples of {n_bytes} bytes"
        raise ValueError(describe(name, expected, got, fix))


def check_integer(name: str, value: object, optional: bool = False) -> None:
    """Raise unless a value is an integer of 64 bits, or None where that is allowed."""
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(describe(name, "an int" + " or None" * optional, type(value).__name__))
    if not -(2**63) <= value < 2**63:
        raise ValueError(describe(name, "an int of 64 bits", value))


def check_saturate(saturate: bool, name: str, dtype: torch.dtype | None) -> None:
    """Raise unless new states may saturate: those of `dtype` in the argument `name`, None if there are none."""
    if not isinstance(saturate, bool):
        raise TypeError(describe("saturate", "a bool", type(saturate).__name__))
    if saturate and dtype is not torch.float16:
        fix = "it is for float16 states only: others have the range of float32, or scales"
        kind = "no states" if dtype is None else f"{name_of(dtype)} states in {name}"
        raise ValueError(describe("saturate", f"False with {kind}", saturate, fix))


def aligned(tensor: Tensor, n_bytes: int, contiguous: int = 1) -> bool:
    """Whether the address, and all strides but those of `contiguous` last dimensions, are multiples of `n_bytes`."""
    size = tensor.element_size()
    return tensor.data_ptr() % n_bytes == 0 and all(s * size % n_bytes == 0 for s in tensor.stride()[:-contiguous])


def common_alignment(tensors: Iterable[Tensor | None], most: int) -> int:
    """The largest power of two up to `most` that divides, in bytes, the addresses and the outer strides of tensors."""
    bits = most
    for tensor in tensors:
        if tensor is not None:
            size = tensor.element_size()
            bits |= tensor.data_ptr()
            for stride in tensor.stride()[:-1]:
                bits |= stride * size
    return bits & -bits


def overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory, or dimensions at least do not nest: then no kernel may write them in parallel."""
    span = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1):
        if stride < span:
            return True
        span += stride * (size - 1)
    return False


def check_writable(name: str, tensor: Tensor) -> None:
    """Raise if elements of a tensor that is written share memory."""
    if overlaps(tensor):
        expected = "elements that do not share memory"
        raise ValueError(describe(name, expected, f"strides {tensor.stride()}", allocation(tensor)))


def check_tied(name: str, tensor: object, inner: int, state: object) -> None:
    """Raise unless a tensor has one value per head: stride 0 in its `inner` last dimensions, which are a state's."""
    if not isinstance(tensor, Tensor):
        raise not_tensor(name, tensor)
    if not isinstance(state, Tensor):
        raise not_tensor("state", state)
    sizes = state.shape[2 : 2 + inner]
    if tensor.dim() <= inner or tensor.shape[-inner:] != sizes:
        fix = f"pass {name}[..., {', '.join(['None'] * inner)}].expand(*{name}.shape, {', '.join(map(str, sizes))})"
        raise ValueError(describe(name, f"last dimensions {tuple(sizes)}", f"shape {tuple(tensor.shape)}", fix))
    if any(tensor.stride()[-inner:]):
        several = "dimension" if inner == 1 else f"{inner} dimensions"
        fix = f"pass {name}[...{', :1' * inner}].expand({name}.shape)"
        expected = f"one value per head, that is, stride 0 in its last {several}"
        raise ValueError(describe(name, expected, f"strides {tensor.stride()}", fix))


def first_rows(batch: int, *tensors: Any) -> tuple[Any, ...]:
    """Return views of the first `batch` rows of tensors that are longer, such as buffers of a CUDA graph."""
    return tuple([t[:batch] if isinstance(t, Tensor) and t.dim() and t.shape[0] > batch else t for t in tensors])


def first_of_batch(listed: Any, cu_seqlens: Any, *tensors: Any) -> tuple[Any, ...]:
    """Return the first rows of tensors, as many as ``cu_seqlens`` or else `listed` counts; views, if they have more."""
    counted = listed if cu_seqlens is None else cu_seqlens
    if not isinstance(counted, Tensor) or not counted.dim():
        return tensors  # the checks name what is wrong
    return first_rows(counted.shape[0] - (cu_seqlens is not None), *tensors)


def check_slots(
    name: str, indices: Tensor, used: Tensor, slots: int, pad_slot_id: int | None, pad: str = "pad_slot_id"
) -> None:
    """Raise if an index on the CPU that is `used` is neither a slot nor the pad; None: there is no pad."""
    outside = used & ((indices < 0) | (indices >= slots))
    if pad_slot_id is not None:
        outside &= indices != pad_slot_id
    if bool(outside.any()):
        at = tuple(outside.nonzero()[0].tolist())
        expected = f"indices in [0, {slots})" + ("" if pad_slot_id is None else f" or {pad} = {pad_slot_id}")
        position = at[0] if len(at) == 1 else at
        raise ValueError(describe(name, expected, f"{int(indices[at])} at position {position}"))


def check_allocated(name: str, slots: Tensor, unallocated: Tensor, rows: Tensor, pad_slot_id: int) -> None:
    """Raise if a slot of the rows in the mask `rows` is not allocated; tensors are on the CPU, slots in range."""
    closed = unallocated[slots.where(rows, 0)] & rows if len(unallocated) else torch.zeros_like(rows)
    if bool(closed.any()):
        at = int(closed.nonzero()[0])
        refuse_slot(name, int(slots[at]), at, pad_slot_id)


def refuse_slot(name: str, slot: int, at: int, pad_slot_id: int) -> NoReturn:
    """Raise the error about a slot that is not allocated."""
    fix = f"get slots from allocate(); padding rows have slot {pad_slot_id}"
    raise ValueError(describe(name, "allocated slots", f"slot {slot} at position {at}", fix))
