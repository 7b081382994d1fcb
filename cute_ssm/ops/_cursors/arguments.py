"""Checks that `commit` and `build_work_items` share."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops._cursors.config import MOST_TOKENS
from cute_ssm.ops._table import Table
from cute_ssm.reference.cursors import Cursors

NO_PAD = -1  # not a slot


class CursorCall(Protocol):
    """The arguments that both operators have."""

    @property
    def prev_num_accepted_tokens(self) -> Tensor: ...
    @property
    def cursor(self) -> Tensor: ...
    @property
    def state_batch_indices(self) -> Tensor | None: ...
    @property
    def cu_seqlens(self) -> Tensor | None: ...
    @property
    def ring(self) -> bool: ...
    @property
    def pad_slot_id(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def num_cursors(self) -> int: ...


class Scalars(NamedTuple):
    """The numbers of a call, in the order of the schemas; ``tokens`` is 0 with ``cu_seqlens``."""

    pad_slot_id: int
    tokens: int
    window: int
    num_cursors: int


def cursor_name(ring: bool) -> str:
    """Return the public name of the argument that holds cursors."""
    return "ring_start" if ring else "cache_buf_idx"


def cursor_and_scalars(
    window: int,
    cache_buf_idx: Tensor | None,
    ring_start: Tensor | None,
    ring_length: int | None,
    tokens: int | None,
    cu_seqlens: Tensor | None,
    pad_slot_id: int,
) -> tuple[Tensor, Scalars]:
    """Return the cursors and the numbers of a call; raise unless exactly one of each choice of arguments is given."""
    if cache_buf_idx is not None and ring_start is not None:
        raise ValueError(describe("ring_start", "None with cache_buf_idx", "both", "a history has one of them"))
    cursor = cache_buf_idx if ring_start is None else ring_start
    if cursor is None:
        raise ValueError(describe("cache_buf_idx", "a tensor, or ring_start instead", "neither"))
    if window < 1:
        raise ValueError(describe("window", "at least 1", window))
    if (tokens is None) == (cu_seqlens is None):
        got: object = "neither" if tokens is None else "both"
        raise ValueError(describe("tokens", "a number, or cu_seqlens instead", got))
    if tokens is not None and not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(describe("tokens", f"at least 1, at most {MOST_TOKENS}", tokens))
    if ring_start is None:
        if ring_length is not None:
            raise ValueError(describe("ring_length", "None without ring_start", ring_length))
        return cursor, Scalars(pad_slot_id, tokens or 0, window, 2)
    least = window + (tokens or 1)
    if ring_length is None or ring_length < least:
        got = "None" if ring_length is None else ring_length
        fix = "the rows of a ring hold the window and the new tokens"
        raise ValueError(describe("ring_length", f"at least {least}", got, fix))
    return cursor, Scalars(pad_slot_id, tokens or 0, window, ring_length)


def check_rows(table: Table, call: CursorCall, listed: str) -> None:
    """Raise unless shapes, types and strides are those of the table, and each row has a slot.

    `listed` is the argument with an entry per row: it sets the batch, unless ``cu_seqlens`` does.
    """
    given = table.given(call, {"cursor": cursor_name(call.ring)})
    given.check_dtypes()
    given.check_ranks({}, ("prev_num_accepted_tokens", listed, "rand_seed"))
    slots, packed = call.prev_num_accepted_tokens.shape[0], call.cu_seqlens
    batch = given[listed].shape[0]
    if packed is not None and packed.dim() == 1 and len(packed):
        batch = len(packed) - 1
    if call.state_batch_indices is None and slots < batch:
        fix = "pass state_batch_indices to say which slot each row uses"
        raise ValueError(describe("prev_num_accepted_tokens", f"at least batch = {batch} slots", slots, fix))
    given.check_shapes({"slots": slots, "batch": batch})
    given.check_strides()
    given.check_written()


def spec_fields(call: CursorCall) -> dict[str, Any]:
    """Return the fields that the specs of both operators have."""

    src, cu = call.state_batch_indices, call.cu_seqlens
    return {"ring": call.ring, "src_dtype": arguments.type_of(src), "cu_dtype": arguments.type_of(cu)}


def cursors_of(call: CursorCall, batch: int) -> Cursors:
    """Return the rows of a call on the CPU; raise on slots, offsets and cursors out of range."""
    slots = torch.arange(batch) if call.state_batch_indices is None else call.state_batch_indices.long()
    num_tokens = torch.full((batch,), call.tokens)
    if call.cu_seqlens is not None:
        num_tokens = call.cu_seqlens.long().diff()
        if bool((num_tokens < 0).any()) or bool((call.cu_seqlens < 0).any()):
            raise ValueError(describe("cu_seqlens", "non-decreasing offsets from 0 on", call.cu_seqlens.tolist()))
    if bool((num_tokens > MOST_TOKENS).any()):
        expected = f"at most {MOST_TOKENS} tokens of a row"
        raise ValueError(describe("cu_seqlens", expected, int(num_tokens.max())))
    pending, cursor = call.prev_num_accepted_tokens, call.cursor
    active = (slots != call.pad_slot_id) & (num_tokens > 0)
    arguments.check_slots("state_batch_indices", slots, active, pending.shape[0], call.pad_slot_id)
    used = slots[active]
    for name, values, most in (
        ("prev_num_accepted_tokens", pending, call.window),
        (cursor_name(call.ring), cursor, call.num_cursors - 1),
    ):
        bad = used[(values[used] < 0) | (values[used] > most)]
        if len(bad):
            got = f"{int(values[bad[0]])} in slot {int(bad[0])}"
            raise ValueError(describe(name, f"values from 0 to {most}", got))
    room = call.num_cursors - call.window  # rows of a ring for new tokens
    if call.ring and call.cu_seqlens is not None and len(num_tokens) and int(num_tokens.max()) > room:
        expected = f"at most {room} tokens of a row, the ring's length minus the window"
        raise ValueError(describe("cu_seqlens", expected, int(num_tokens.max())))
    return Cursors(pending, cursor, call.num_cursors, call.ring, call.window, slots, num_tokens, active)
