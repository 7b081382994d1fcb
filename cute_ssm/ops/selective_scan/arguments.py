"""Validation of `selective_scan` and `selective_scan_fn`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


def check(
    named: dict[str, Any], outputs: dict[str, Tensor | None], null_block_id: int, block_size: int, saturate: bool
) -> None:
    """Raise unless the arguments are as documented; the contents of tensors are not looked at.

    `named` are all tensors but outputs, which may be among them under their own names.
    """
    named = dict(named)
    for name, tensor in outputs.items():
        named.setdefault(name, tensor)
    required = ("u", "delta", "A", "B", "C", "out")
    arguments.check_tensors(named, [name for name in named if name not in required])
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    for name, number, least in (("null_block_id", null_block_id, None), ("block_size", block_size, 1)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(describe(name, "an int", type(number).__name__))
        if least is not None and number < least:
            raise ValueError(describe(name, "a positive number of tokens", number))
    _check_presence(given)
    _check_shapes(given)
    _check_dtypes(given, outputs)
    states = given.get("ssm_states")
    arguments.check_saturate(saturate, "ssm_states", None if states is None else states.dtype)
    for name in ("A", "ssm_states"):
        if name in given and given[name].shape[-1] > 1:
            arguments.check_last_contiguous(name, given[name])
    if "cu_chunk_seqlen" in given:
        arguments.check_last_contiguous("cu_chunk_seqlen", given["cu_chunk_seqlen"])
    if "query_start_loc" in given:
        arguments.check_last_contiguous("query_start_loc", given["query_start_loc"])
    for name, tensor in outputs.items():
        if tensor is not None and any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride())):
            expected = "distinct elements, as it is written"
            raise ValueError(describe(name, expected, f"strides {tensor.stride()}", arguments.allocation(tensor)))


_BLOCKS = ("block_idx_first_scheduled_token", "block_idx_last_scheduled_token", "initial_state_idx")
_CHUNKS = ("cu_chunk_seqlen", "last_chunk_indices")


def _check_presence(given: dict[str, Tensor]) -> None:
    """Raise if an argument lacks another that it needs."""
    for names in (_BLOCKS, _CHUNKS):
        present = [name for name in names if name in given]
        if present and len(present) < len(names):
            missing = next(name for name in names if name not in given)
            raise ValueError(describe(missing, f"a tensor, as {present[0]} is given", None, "pass all of them or none"))
    needs = {_CHUNKS[0]: _BLOCKS[0], _BLOCKS[0]: "cache_indices", "cache_indices": "ssm_states"}
    needs["has_initial_state"] = "ssm_states"
    for name, needed in needs.items():
        if name in given and needed not in given:
            # a null slot skips a sequence, so cache_indices mean something without states
            if name == "cache_indices" and _BLOCKS[0] not in given:
                continue
            raise ValueError(describe(needed, f"a tensor, as {name} is given", None))
    if _BLOCKS[0] in given and given["cache_indices"].dim() != 2:
        shape = tuple(given["cache_indices"].shape)
        raise ValueError(describe("cache_indices", f"shape (batch, blocks), as {_BLOCKS[0]} is given", shape))


def _check_shapes(given: dict[str, Tensor]) -> None:
    """Raise unless all shapes agree; `given` holds the arguments that are not None."""
    u, A, B = given["u"], given["A"], given["B"]
    varlen = "query_start_loc" in given
    rank, letters = (2, "(dim, total)") if varlen else (3, "(batch, dim, length)")
    if u.dim() != rank:
        fix = "without query_start_loc sequences have one length" if varlen else "packed ones need query_start_loc"
        raise ValueError(describe("u", f"shape {letters}", tuple(u.shape), fix))
    if A.dim() != 2:
        raise ValueError(describe("A", "shape (dim, dstate)", tuple(A.shape)))
    if varlen and (given["query_start_loc"].dim() != 1 or not given["query_start_loc"].shape[0]):
        raise ValueError(describe("query_start_loc", "shape (batch + 1,)", tuple(given["query_start_loc"].shape)))
    dim, length = u.shape[-2:]
    batch = given["query_start_loc"].shape[0] - 1 if varlen else u.shape[0]
    dstate = A.shape[1]
    if not 1 <= dstate <= 256:
        raise ValueError(describe("A", "dstate of 1 to 256", f"dstate = {dstate}"))
    lead: tuple[int, ...] = () if varlen else (batch,)
    front = "" if varlen else "batch, "
    tail = "total" if varlen else "length"
    grouped = B.dim() == len(lead) + 3
    if not grouped and B.dim() != len(lead) + 2:
        raise ValueError(describe("B", f"shape ({front}ngroups, dstate, {tail})", tuple(B.shape)))
    ngroups = B.shape[-3] if grouped else 1
    if ngroups < 1 or dim % ngroups:
        raise ValueError(describe("B", f"ngroups that divides dim = {dim}", f"ngroups = {ngroups}"))
    columns = (*lead, *((ngroups,) if grouped else ()), dstate, length)
    columns_text = f"({front}{'ngroups, ' if grouped else ''}dstate, {tail})"
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "A": ((dim, dstate), "(dim, dstate)"),
        "B": (columns, columns_text),
        "C": (columns, columns_text),
        "D": ((dim,), "(dim,)"),
        "delta_bias": ((dim,), "(dim,)"),
        **{name: ((*lead, dim, length), letters) for name in ("delta", "z", "out")},
        **{name: ((batch,), "(batch,)") for name in ("has_initial_state", *_BLOCKS, "last_chunk_indices")},
    }
    for name, (shape, text) in shapes.items():
        if name in given:
            arguments.check_shape(name, given[name], shape, text)
    if "cache_indices" in given:
        cache = given["cache_indices"]
        if cache.dim() not in (1, 2) or cache.shape[0] != batch or (cache.dim() == 2 and not cache.shape[1]):
            expected = f"shape (batch,) = {(batch,)} or (batch, n)"
            raise ValueError(describe("cache_indices", expected, tuple(cache.shape)))
    if "cu_chunk_seqlen" in given and given["cu_chunk_seqlen"].dim() != 1:
        raise ValueError(describe("cu_chunk_seqlen", "shape (chunks + 1,)", tuple(given["cu_chunk_seqlen"].shape)))
    if "ssm_states" in given:
        states = given["ssm_states"]
        if states.dim() != 3 or states.shape[1:] != (dim, dstate):
            expected = f"shape (slots, dim, dstate) = (slots, {dim}, {dstate})"
            raise ValueError(describe("ssm_states", expected, tuple(states.shape)))
        if "cache_indices" not in given and states.shape[0] < batch:
            fix = "pass cache_indices to say which slot each sequence uses"
            raise ValueError(describe("ssm_states", f"at least batch = {batch} slots", states.shape[0], fix))


def _check_dtypes(given: dict[str, Tensor], outputs: Iterable[str]) -> None:
    u = given["u"]
    arguments.check_dtype("u", u, FLOATS)
    for name in ("delta", "B", "C", "z", "out"):
        if name in given:
            arguments.check_dtype(name, given[name], (u.dtype,), "the type of u", cast=True, written=name in outputs)
    for name in ("A", "D", "delta_bias"):
        if name in given:
            arguments.check_dtype(name, given[name], (torch.float32,), cast=True)
    if "ssm_states" in given:
        allowed = dict.fromkeys((u.dtype, torch.float32))
        arguments.check_dtype("ssm_states", given["ssm_states"], allowed, "the type of u or float32")
    for name in ("query_start_loc", "cache_indices"):
        if name in given:
            arguments.check_dtype(name, given[name], INTEGERS)
    if "has_initial_state" in given:
        arguments.check_dtype("has_initial_state", given["has_initial_state"], (torch.bool,))
    for name in (*_BLOCKS, *_CHUNKS):
        if name in given:
            arguments.check_dtype(name, given[name], (given["cache_indices"].dtype,), "the type of cache_indices")
