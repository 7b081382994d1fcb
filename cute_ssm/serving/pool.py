"""`StatePool`: what the layers of a model remember of their sequences between steps, slot by slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops._arguments import name_of
from cute_ssm.serving.cursors import build_work_items, commit
from cute_ssm.serving.states import materialize
from cute_ssm.spec import QUANTISED

HISTORIES = ("double", "double_x", "ring")
_SPLITMIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


class StatePool:
    """Slots for the sequences of a model: states, histories of pending tokens, inputs of convolutions, cursors, seeds.

    Made by `mamba2` or `gated_delta`.  All tensors are allocated once and start as zeros; their addresses never change.
    A slot is allocated and freed on the host, by a plain list.  Everything that belongs to a step of the model happens
    on the device and waits for nothing, so that steps can be captured in a CUDA graph.

    The last slot is reserved for padding and never allocated: rows of a batch that are there to fill it use
    `pad_slot_id`, and any number of them may.

    Attributes
    ----------
    layers, slots : int
        Layers that share the cursors; slots, the reserved one included.
    window, tokens : int
        Largest number of pending tokens, and of new tokens of a step.
    pad_slot_id : int
        What a row of a batch that is padding has in ``state_batch_indices``.
    state_name : str
        What the operator calls it: ``state`` or ``initial_state``.
    state : Tensor, (layers, slots, ...)
    state_scale : Tensor, (layers, slots, ...), float32, or None
    history : dict of str to Tensor, (layers, slots, ...)
        By the names of the operator's arguments.
    conv_state : Tensor, (layers, slots, channels, width - 1 + tokens), or None
        Inputs of the convolution: the last ``width - 1`` before a step, then the new tokens of the step.
    prev_num_accepted_tokens : Tensor, (slots,), int32
    cache_buf_idx, ring_start : Tensor, (slots,), int32, or None
        One of both, as the history has it.
    rand_seed : Tensor, (layers, slots), int64, or None
        Seeds of stochastic rounding.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        window: int,
        tokens: int,
        state: tuple[tuple[int, ...], torch.dtype],
        history: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        *,
        ring: bool,
        conv: tuple[tuple[int, int], torch.dtype] | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate a pool; `mamba2` and `gated_delta` say what an operator needs.

        Parameters
        ----------
        layers, slots, window, tokens : int
            As the attributes, but for the reserved slot, which is added.
        state : (shape, dtype)
            Of one slot of one layer.
        history : dict of str to (shape, dtype)
            Of one slot of one layer, by the names of the operator's arguments.
        ring : bool
            The second cursor is ``ring_start``; else ``cache_buf_idx``.
        conv : ((channels, width), dtype), optional
            Shape of the convolution's weight.
        seed : int, optional
            Round stochastically, with seeds drawn from this one.
        device : torch.device or str, optional

        Raises
        ------
        ValueError
            If a number is not positive, or a seed is given for float32 states.
        """
        for name, value in {"layers": layers, "slots": slots, "window": window, "tokens": tokens}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(describe(name, "a positive integer", value))
        if seed is not None and state[1] is torch.float32:
            raise ValueError(describe("seed", "None with float32 states, which are not rounded", seed))
        self.layers, self.slots, self.window, self.tokens = layers, slots + 1, window, tokens
        self.pad_slot_id = slots

        def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.zeros(layers, self.slots, *shape, dtype=dtype, device=device)

        self.state = zeros(*state)
        quantised = name_of(state[1]) in QUANTISED
        self.state_scale = zeros(state[0][:-1], torch.float32) if quantised else None
        self.history = {name: zeros(*entry) for name, entry in history.items()}
        self.conv_state = None
        self._conv_width = 1
        if conv is not None:
            (channels, self._conv_width), dtype = conv
            self.conv_state = zeros((channels, self._conv_width - 1 + tokens), dtype)
        self._cursors = torch.zeros(2, self.slots, dtype=torch.int32, device=self.state.device)
        self.prev_num_accepted_tokens, place = self._cursors
        self.cache_buf_idx: Tensor | None = None if ring else place
        self.ring_start: Tensor | None = place if ring else None
        self.ring_length = next(iter(self.history.values())).shape[3] if ring else None
        self.rand_seed = None
        self._root = seed
        if seed is not None:
            self.rand_seed = torch.zeros(layers, self.slots, dtype=torch.int64, device=self.state.device)
            self._draws = torch.zeros(self.slots, dtype=torch.int64, device=self.state.device)
            self._draw(torch.arange(self.slots, device=self.state.device))
        self._free = list(range(slots - 1, -1, -1))
        self.state_name = "state"
        self._arguments = [self._arguments_of(layer) for layer in range(layers)]

    @classmethod
    def mamba2(
        cls,
        layers: int,
        slots: int,
        *,
        nheads: int,
        dim: int,
        dstate: int,
        ngroups: int = 1,
        window: int = 16,
        tokens: int = 1,
        state_dtype: torch.dtype = torch.float32,
        input_dtype: torch.dtype = torch.bfloat16,
        history: str = "ring",
        conv_shape: tuple[int, int] | None = None,
        conv_dtype: torch.dtype | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
    ) -> StatePool:
        """Make a pool for `checkpointing_ssu` (double buffers) or `checkpointing_ssu_ring`.

        Parameters
        ----------
        layers, slots : int
            Layers of the model, and slots for sequences; one for padding is added.
        nheads, dim, dstate, ngroups : int
            Sizes of a layer.
        window, tokens : int
            Largest number of pending tokens, and of new tokens of a step.
        state_dtype : torch.dtype
            float32, bfloat16, float16, or int16, int8, float8_e4m3fn with a scale per row.
        input_dtype : torch.dtype
            bfloat16 or float16: that of x and B.
        history : {"double", "double_x", "ring"}
            Two buffers of `window` rows, x in one or in two; or a ring of `window + tokens` rows.
        conv_shape : (channels, width), optional
            Of the convolution before the recurrence, whose inputs are then kept too.
        conv_dtype : torch.dtype, optional
            By default that of the inputs.
        seed : int, optional
            Round states stochastically.
        device : torch.device or str, optional

        Raises
        ------
        ValueError
            If a size is not positive, or ``history`` is none of the above.
        """
        sizes = {"nheads": nheads, "dim": dim, "dstate": dstate, "ngroups": ngroups}
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(describe(name, "a positive integer", value))
        if history not in HISTORIES:
            raise ValueError(describe("history", " or ".join(HISTORIES), repr(history)))
        rows = window + tokens
        if history == "ring":
            entries = {
                "x_cache": ((nheads, rows, dim), input_dtype),
                "B_cache": ((ngroups, rows, dstate), input_dtype),
                "dt_cache": ((nheads, rows), torch.float32),
            }
        else:
            entries = {
                "old_x": ((*(2,) * (history == "double_x"), window, nheads, dim), input_dtype),
                "old_B": ((2, window, ngroups, dstate), input_dtype),
                "old_dt": ((2, nheads, window), torch.float32),
                "old_cumAdt": ((2, nheads, window), torch.float32),
            }
        conv = None if conv_shape is None else (conv_shape, conv_dtype or input_dtype)
        state = (nheads, dim, dstate), state_dtype
        return cls(
            layers, slots, window, tokens, state, entries, ring=history == "ring", conv=conv, seed=seed, device=device
        )

    @classmethod
    def gated_delta(
        cls,
        layers: int,
        slots: int,
        *,
        heads: int,
        value_heads: int,
        K: int,
        V: int,
        window: int = 16,
        tokens: int = 1,
        state_dtype: torch.dtype = torch.float32,
        input_dtype: torch.dtype = torch.bfloat16,
        conv_shape: tuple[int, int] | None = None,
        conv_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StatePool:
        """Make a pool for `gated_delta_rule_replay`; parameters as there and for `mamba2`.

        `pad_slot_id` is negative then, as that operator has it.
        """
        for name, value in {"heads": heads, "value_heads": value_heads, "K": K, "V": V}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(describe(name, "a positive integer", value))
        rows = window + tokens
        entries = {
            "k_cache": ((heads, rows, K), input_dtype),
            "v_cache": ((value_heads, rows, V), input_dtype),
            "g_cache": ((value_heads, rows), torch.float32),
            "beta_cache": ((value_heads, rows), torch.float32),
        }
        conv = None if conv_shape is None else (conv_shape, conv_dtype or input_dtype)
        state = (value_heads, V, K), state_dtype
        pool = cls(layers, slots, window, tokens, state, entries, ring=True, conv=conv, device=device)
        pool.pad_slot_id = -1
        pool.state_name = "initial_state"
        pool._arguments = [pool._arguments_of(layer) for layer in range(layers)]
        return pool

    # ----------------------------------------------------------------------------------------------------- the operator
    def arguments(self, layer: int) -> dict[str, Any]:
        """Return the pool's share of the operator's arguments for a layer, by name; the same views at every call.

        For `mamba2` all but the tokens, the weights, ``state_batch_indices`` and the work items; for `gated_delta` all
        but the tokens, the weights and ``initial_state_indices``.
        """
        return dict(self._arguments[layer])

    def _arguments_of(self, layer: int) -> dict[str, Any]:
        views: dict[str, Any] = {self.state_name: self.state[layer]}
        views |= {name: tensor[layer] for name, tensor in self.history.items()}
        views["prev_num_accepted_tokens"] = self.prev_num_accepted_tokens
        if self.cache_buf_idx is not None:
            views["cache_buf_idx"] = self.cache_buf_idx
        else:
            views |= {"ring_start": self.ring_start, "window": self.window}
        if self.state_name == "state":
            views["pad_slot_id"] = self.pad_slot_id
        if self.state_scale is not None:
            views["state_scale"] = self.state_scale[layer]
        if self.rand_seed is not None:
            views["rand_seed"] = self.rand_seed[layer]
        return views

    def _cursor_arguments(self, cu_seqlens: Tensor | None) -> dict[str, Any]:
        return {
            "window": self.window,
            "cache_buf_idx": self.cache_buf_idx,
            "ring_start": self.ring_start,
            "ring_length": self.ring_length,
            "tokens": self.tokens if cu_seqlens is None else None,
            "cu_seqlens": cu_seqlens,
            "pad_slot_id": self.pad_slot_id,
        }

    # ---------------------------------------------------------------------------------------------- a step of the model
    def build_work_items(
        self,
        state_batch_indices: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        work_items: Tensor | None = None,
        num_writes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """List the rows of a batch for the operator, before a step: `serving.build_work_items` on the pool's cursors.

        Rows have `tokens` new tokens each, or those of ``cu_seqlens``.
        """
        return build_work_items(
            self.prev_num_accepted_tokens,
            **self._cursor_arguments(cu_seqlens),
            state_batch_indices=state_batch_indices,
            work_items=work_items,
            num_writes=num_writes,
        )

    def commit(
        self, state_batch_indices: Tensor, num_accepted_tokens: Tensor, *, cu_seqlens: Tensor | None = None
    ) -> None:
        """Advance cursors, seeds and the inputs of the convolutions, after a step: see `serving.commit`.

        Parameters
        ----------
        state_batch_indices : Tensor, (batch,), int32/int64
            Slot of each row.
        num_accepted_tokens : Tensor, (batch,), int32/int64
            How many of its new tokens each row keeps; a negative number leaves the row as it is.
        cu_seqlens : Tensor, (batch + 1,), int32/int64, optional
            As the step had it.
        """
        commit(
            self.prev_num_accepted_tokens,
            num_accepted_tokens,
            **self._cursor_arguments(cu_seqlens),
            state_batch_indices=state_batch_indices,
            rand_seed=self.rand_seed,
        )
        if self.conv_state is not None:
            self._shift_conv(state_batch_indices.long(), num_accepted_tokens.long(), cu_seqlens)

    def _shift_conv(self, slots: Tensor, accepted: Tensor, cu_seqlens: Tensor | None) -> None:
        """Move accepted inputs of convolutions behind the older ones, of rows whose slot and count `commit` takes."""
        if self.conv_state is None:
            return
        kept = self._conv_width - 1
        inside = (slots >= 0) & (slots < self.slots)
        slots = slots.where(inside, self.slots - 1)
        counts = torch.full_like(accepted, self.tokens) if cu_seqlens is None else cu_seqlens.long().diff()
        moves = inside & (accepted >= 0) & (accepted <= counts.clamp(max=min(self.tokens, self.window)))
        inputs = self.conv_state[:, slots]  # (layers, batch, channels, kept + tokens)
        columns = accepted.where(moves, 0)[:, None] + torch.arange(kept, device=slots.device)
        columns = columns[None, :, None].expand(*inputs.shape[:3], kept)
        self.conv_state[:, slots, :, :kept] = inputs.gather(3, columns)

    # ------------------------------------------------------------------------------------------------------------ slots
    @property
    def available(self) -> int:
        """Number of free slots."""
        return len(self._free)

    def allocate(self) -> int:
        """Take a free slot and reset it; waits for nothing on the device.

        Raises
        ------
        ValueError
            If no slot is free.
        """
        if not self._free:
            raise ValueError(describe("slots", "a free one", f"{self.slots - 1} in use", "free one, or wait"))
        slot = self._free.pop()
        self.reset_slot(slot)
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back.

        Raises
        ------
        ValueError
            If the slot is not one that was allocated.
        """
        if not 0 <= slot < self.slots - 1 or slot in self._free:
            raise ValueError(describe("slot", "one that is allocated", slot))
        self._free.append(slot)

    def reset_slot(self, slots: int | Tensor) -> None:
        """Make slots those of new sequences: zeroed states, convolutions and cursors, and fresh seeds.

        Histories stay as they are: without pending tokens nothing of them is read.

        Parameters
        ----------
        slots : int or Tensor, (n,), int32/int64
            On the pool's device; nothing is waited for.
        """
        index = self._index("slots", slots)
        for tensor in (self.state, self.state_scale, self.conv_state):
            if tensor is not None:
                _zero(tensor, index)
        self._cursors.index_fill_(1, index, 0)
        if self.rand_seed is not None:
            self._draw(index)

    def copy_slot(self, source: int | Tensor, destination: int | Tensor) -> None:
        """Copy all that slots hold but their seeds, pending tokens included, so that both go on alike.

        Parameters
        ----------
        source, destination : int or Tensor, (n,), int32/int64
            On the pool's device; destinations are distinct, and no sources.

        Raises
        ------
        ValueError
            If there are not as many of both, or one is out of range, as far as the host can see.
        """
        read, written = self._index("source", source), self._index("destination", destination)
        self._check_pairs(read, written)
        tensors = (self.state, self.state_scale, self.conv_state, *self.history.values())
        for tensor in tensors:
            if tensor is not None:
                _copy(tensor, read, written)
        self._cursors[:, written] = self._cursors[:, read]

    def materialize(
        self,
        A: Sequence[Tensor],
        source: int | Tensor,
        destination: int | Tensor,
        *,
        num_tokens: Tensor | None = None,
        philox_rounds: int = 10,
    ) -> None:
        """Write the true states of slots, pending tokens folded in, to other slots, which have no pending tokens then.

        Parameters
        ----------
        A : sequence of Tensor, (nheads, dim, dstate)
            Of every layer.
        source, destination : int or Tensor, (n,), int32/int64
            On the pool's device; destinations are distinct, and no other row's source.
        num_tokens : Tensor, (n,), int32/int64, optional
            How many of the pending tokens to fold.  None: all; then the inputs of the convolutions are copied too.
            Otherwise they are zero: of tokens before the last step the pool knows none.
        philox_rounds : int
            Rounds of the Philox generator, with seeds.

        Raises
        ------
        ValueError
            If the pool is not one of `mamba2`, or as `serving.materialize` and `copy_slot` say.
        """
        names = ("x_cache", "B_cache", "dt_cache") if self.ring_start is not None else ("old_x", "old_B", "old_dt")
        if names[0] not in self.history:
            raise ValueError(describe("pool", "one for Mamba-2", "one for another recurrence"))
        if len(A) != self.layers:
            raise ValueError(describe("A", f"one tensor for each of {self.layers} layers", len(A)))
        read, written = self._index("source", source), self._index("destination", destination)
        self._check_pairs(read, written, same=True)
        for layer in range(self.layers):
            x, B, dt = (self.history[name][layer] for name in names)
            materialize(
                self.state[layer],
                x,
                B,
                dt,
                A[layer],
                self.prev_num_accepted_tokens,
                read,
                written,
                cache_buf_idx=self.cache_buf_idx,
                ring_start=self.ring_start,
                num_tokens=num_tokens,
                state_scale=None if self.state_scale is None else self.state_scale[layer],
                pad_slot_id=self.pad_slot_id,
                rand_seed=None if self.rand_seed is None else self.rand_seed[layer],
                philox_rounds=philox_rounds,
            )
        if self.conv_state is not None:
            if num_tokens is None:
                _copy(self.conv_state, read, written)
            else:
                _zero(self.conv_state, written)
        self._cursors.index_fill_(1, written, 0)

    @property
    def state_bytes(self) -> int:
        """Bytes of the states and scales of one slot in all layers: what a write of the state moves."""
        parts = [self.state] if self.state_scale is None else [self.state, self.state_scale]
        return sum(part[:, 0].numel() * part.element_size() for part in parts)

    # ---------------------------------------------------------------------------------------------------------- indices
    def _index(self, name: str, slots: int | Tensor) -> Tensor:
        """Slots as an index on the pool's device, by no copy from the host."""
        device = self.state.device
        if isinstance(slots, Tensor):
            if slots.device != device or slots.dim() != 1 or slots.dtype not in (torch.int32, torch.int64):
                got = f"{name_of(slots.dtype)} of shape {tuple(slots.shape)} on {slots.device}"
                raise ValueError(describe(name, f"int32 or int64 of shape (n,) on {device}", got))
            if device.type == "cpu" and bool(((slots < 0) | (slots >= self.slots)).any()):
                raise ValueError(describe(name, f"slots in [0, {self.slots})", slots.tolist()))
            return slots.long()
        if not 0 <= slots < self.slots:
            raise ValueError(describe(name, f"a slot in [0, {self.slots})", slots))
        return torch.full((1,), slots, dtype=torch.int64, device=device)

    def _check_pairs(self, read: Tensor, written: Tensor, same: bool = False) -> None:
        if read.shape != written.shape:
            raise ValueError(describe("destination", f"{len(read)} slots like source", len(written)))
        if read.device.type == "cpu":
            pairs = set(zip(read.tolist(), written.tolist()))
            foreign = {to for _, to in pairs} & {of for of, to in pairs if not (same and of == to)}
            if foreign or len({to for _, to in pairs}) != len(written):
                raise ValueError(describe("destination", "distinct slots that are no sources", written.tolist()))

    def _draw(self, index: Tensor) -> None:
        """Draw seeds of slots by SplitMix64, from the root, the layer, the slot, and how often it was drawn for."""
        if self.rand_seed is None or self._root is None:
            return
        self._draws[index] += 1
        layer = torch.arange(self.layers, device=index.device)[:, None]
        number = (self._draws[index] * self.slots + index) * self.layers + layer
        x = number * _signed(_SPLITMIX[0]) + _signed(self._root)
        for shift, factor in ((30, _SPLITMIX[1]), (27, _SPLITMIX[2])):
            x = (x ^ _shifted(x, shift)) * _signed(factor)
        self.rand_seed[:, index] = x ^ _shifted(x, 31)


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of a number."""
    return (value + 2**63) % 2**64 - 2**63


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right."""
    return x >> bits & (1 << 64 - bits) - 1


def _raw(tensor: Tensor) -> Tensor:
    """The same bytes, in a type that PyTorch can index by tensors on every device."""
    return tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor


def _zero(tensor: Tensor, index: Tensor) -> None:
    _raw(tensor).index_fill_(1, index, 0)


def _copy(tensor: Tensor, read: Tensor, written: Tensor) -> None:
    raw = _raw(tensor)
    raw.index_copy_(1, written, raw.index_select(1, read))
