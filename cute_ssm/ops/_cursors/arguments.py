"""What `commit` and `build_work_items` check, and how both run a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops._cursors.config import MOST_TOKENS
from cute_ssm.ops._plans import REFUSALS, Plans
from cute_ssm.reference.cursors import Cursors
from cute_ssm.tuning import overridden

INTEGERS = (torch.int32, torch.int64)
NO_PAD = -1  # no row's number


def is_eager(tensor: object) -> bool:
    return type(tensor) is Tensor and not torch.compiler.is_compiling()


def places_of(
    window: int,
    cache_buf_idx: Tensor | None,
    ring_start: Tensor | None,
    ring_length: int | None,
    tokens: int | None,
    cu_seqlens: Tensor | None,
    pad_slot_id: int,
) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Return the second cursor, and (pad slot, tokens of a row, window, values of that cursor)."""
    if cache_buf_idx is not None and ring_start is not None:
        raise ValueError(describe("ring_start", "None beside cache_buf_idx", "both", "a history is one or the other"))
    place = cache_buf_idx if ring_start is None else ring_start
    if place is None:
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
        return place, (pad_slot_id, tokens or 0, window, 2)
    least = window + (tokens or 1)
    if ring_length is None or ring_length < least:
        got = "None" if ring_length is None else ring_length
        fix = "the rows of a ring hold the window and the new tokens"
        raise ValueError(describe("ring_length", f"at least {least}", got, fix))
    return place, (pad_slot_id, tokens or 0, window, ring_length)


def batch_of(batch: int | None, src: Tensor | None, cu_seqlens: Tensor | None) -> int:
    if batch is not None:
        return batch
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.dim():
        return len(cu_seqlens) - 1
    if isinstance(src, Tensor) and src.dim():
        return len(src)
    raise ValueError(describe("batch", "a number of rows", None, "nothing else tells it"))


class Rows(NamedTuple):
    """What both functions read."""

    pnat: Tensor
    place: Tensor
    src: Tensor | None
    cu_seqlens: Tensor | None
    ring: bool
    pad_slot_id: int
    tokens: int
    window: int
    places: int

    @property
    def place_name(self) -> str:
        return "ring_start" if self.ring else "cache_buf_idx"

    def named(self) -> dict[str, Any]:
        return {
            "prev_num_accepted_tokens": self.pnat,
            self.place_name: self.place,
            "state_batch_indices": self.src,
            "cu_seqlens": self.cu_seqlens,
        }

    def batch(self, listed: Tensor) -> int:
        """Rows, as many as ``cu_seqlens`` or else `listed` counts."""
        packed = self.cu_seqlens
        return listed.shape[0] if packed is None or packed.dim() != 1 or not len(packed) else len(packed) - 1

    def check(self, batch: int) -> None:
        """Raise unless shapes and types fit a batch."""
        arguments.check_dtype("prev_num_accepted_tokens", self.pnat, (torch.int32,))
        if self.pnat.dim() != 1:
            raise ValueError(describe("prev_num_accepted_tokens", "shape (slots,)", tuple(self.pnat.shape)))
        slots = self.pnat.shape[0]
        arguments.check_dtype(self.place_name, self.place, (torch.int32,))
        arguments.check_shape(self.place_name, self.place, (slots,), "(slots,)")
        if self.src is not None:
            arguments.check_dtype("state_batch_indices", self.src, INTEGERS)
            arguments.check_shape("state_batch_indices", self.src, (batch,), "(batch,)")
        elif slots < batch:
            fix = "pass state_batch_indices to say which slot each row uses"
            raise ValueError(describe("prev_num_accepted_tokens", f"at least batch = {batch} slots", slots, fix))
        if self.cu_seqlens is not None:
            arguments.check_dtype("cu_seqlens", self.cu_seqlens, INTEGERS)
            arguments.check_shape("cu_seqlens", self.cu_seqlens, (batch + 1,), "(batch + 1,)")

    def spec(self) -> dict[str, Any]:
        def name_of(tensor: Tensor | None) -> str | None:
            return None if tensor is None else arguments.DTYPE_NAMES[tensor.dtype]

        return {"ring": self.ring, "src_dtype": name_of(self.src), "cu_dtype": name_of(self.cu_seqlens)}

    def cursors(self, batch: int) -> Cursors:
        """The rows of tensors on the CPU; raise if what they hold does not fit."""
        slots = torch.arange(batch) if self.src is None else self.src.long()
        counts = torch.full((batch,), self.tokens) if self.cu_seqlens is None else self.cu_seqlens.long().diff()
        if self.cu_seqlens is not None and (bool((counts < 0).any()) or bool((self.cu_seqlens < 0).any())):
            raise ValueError(describe("cu_seqlens", "rising offsets from 0 on", self.cu_seqlens.tolist()))
        if bool((counts > MOST_TOKENS).any()):
            expected = f"at most {MOST_TOKENS} tokens of a row"
            raise ValueError(describe("cu_seqlens", expected, int(counts.max())))
        live = (slots != self.pad_slot_id) & (counts > 0)
        arguments.check_slots("state_batch_indices", slots, live, self.pnat.shape[0], self.pad_slot_id)
        used = slots[live]
        for name, values, most in (
            ("prev_num_accepted_tokens", self.pnat, self.window),
            (self.place_name, self.place, self.places - 1),
        ):
            bad = used[(values[used] < 0) | (values[used] > most)]
            if len(bad):
                got = f"{int(values[bad[0]])} in slot {int(bad[0])}"
                raise ValueError(describe(name, f"values from 0 to {most}", got))
        if self.ring and self.cu_seqlens is not None and len(counts) and self.window + int(counts.max()) > self.places:
            expected = f"at most {self.places - self.window} tokens of a row, the ring's length but for the window"
            raise ValueError(describe("cu_seqlens", expected, int(counts.max())))
        fields = (self.pnat, self.place, self.places, self.ring, self.window)
        return Cursors(*fields, slots=slots, num_tokens=counts, active=live)

    def scalars(self) -> tuple[int, int, int, int]:
        return self.pad_slot_id, self.tokens, self.window, self.places


def plan_key(kind: type, rows: Rows, listed: Tensor, *others: Tensor | None) -> tuple[object, ...] | None:
    """Key of a plan for rows that `listed` counts; None if something is no tensor, which the checks will name."""
    src, cu_seqlens = rows.src, rows.cu_seqlens
    try:
        batch = listed.shape[0]
        types = tuple(None if t is None else t.dtype for t in (src, cu_seqlens, listed, *others))
        enough = src is not None or rows.pnat.shape[0] >= batch
        fits = cu_seqlens is None or cu_seqlens.shape[0] == batch + 1
        known = batch > 0 and enough and fits and rows.pnat.is_cuda and not overridden()
        return (kind, rows.ring, types, rows.pnat.device) if known else None
    except (AttributeError, IndexError):
        return None


def run_plan(plans: Plans[Callable[..., None]], key: tuple[object, ...] | None, arguments: tuple[Any, ...]) -> bool:
    """Run as an earlier call like this one, if there was one and the kernel's entry accepts the arguments."""
    plan = plans.get(key)
    if plan is None:
        return False
    try:
        plan(*arguments)
    except REFUSALS:
        return False
    return True
