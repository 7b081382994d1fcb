"""`StatePool`: what the layers of a model remember of their sequences between steps, slot by slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops._arguments import first_rows, name_of
from cute_ssm.ops._gated_delta.arguments import check_heads
from cute_ssm.ops._gated_delta.spec import token_bucket, window_bucket
from cute_ssm.ops.build_work_items.operator import build_work_items
from cute_ssm.ops.checkpointing_ssu.spec import CheckpointingSSUSpec
from cute_ssm.ops.commit.operator import commit
from cute_ssm.ops.gated_delta_rule_replay.spec import GatedDeltaRuleReplaySpec
from cute_ssm.serving._folds import check_decays, check_fits, fold_gated_delta, fold_mamba2
from cute_ssm.serving._pool_checks import (
    as_slot,
    check_allocated,
    check_equal,
    check_seed,
    check_sizes,
    check_spec,
    check_types,
    refuse_slot,
)
from cute_ssm.serving.storage import PoolStorage
from cute_ssm.spec import QUANTISED

HISTORIES = ("double", "double_x", "ring")


class StatePool(PoolStorage):
    """Slots for the sequences of a model: states, histories of pending tokens, inputs of convolutions, cursors, seeds.

    Made by `mamba2` or `gated_delta`.  All tensors are allocated once and start as zeros; their addresses never change.
    A slot is allocated and freed on the host, by a plain list.  Everything that belongs to a step of the model happens
    on the device and waits for nothing, so that steps can be captured in a CUDA graph.

    The last slot is reserved for padding and never allocated: rows of a batch that are there to fill it use
    `pad_slot_id`, and any number of them may.

    ``pickle``, ``torch.save`` and ``copy.deepcopy`` make pools of their own, with all slots, cursors and seeds, and
    `to` one on another device.  `state_dict` and `load_state_dict` keep contents without code.  ``copy.copy`` makes
    another name for the same memory and the same free slots.

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
        gated_delta: bool = False,
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
        gated_delta : bool
            The state is called ``initial_state``, and padding is negative.

        Raises
        ------
        ValueError, TypeError
            If a number is not positive, or a seed is no int or given for float32 states.
        """
        check_sizes(layers=layers, slots=slots, window=window, tokens=tokens)
        check_seed(seed)
        if seed is not None and state[1] is torch.float32:
            raise ValueError(describe("seed", "None with float32 states, which are not rounded", seed))
        self.layers, self.slots, self.window, self.tokens = layers, slots + 1, window, tokens
        self.state_name, self.pad_slot_id = ("initial_state", -1) if gated_delta else ("state", slots)
        self._ring = ring

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
        device = self.state.device
        self._cursors = torch.zeros(2, self.slots, dtype=torch.int32, device=device)
        self._unallocated = torch.ones(self.slots, dtype=torch.bool, device=device)
        self.rand_seed = self._draws = None
        self._root = seed
        if seed is not None:
            self.rand_seed = torch.zeros(layers, self.slots, dtype=torch.int64, device=device)
            self._draws = torch.zeros(self.slots, dtype=torch.int64, device=device)
            self._draw(torch.arange(self.slots, device=device))
        self._free = list(range(slots - 1, -1, -1))
        self._bind()

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
        UnsupportedSpecError
            If the operator refuses such sizes or types.
        """
        check_sizes(nheads=nheads, dim=dim, dstate=dstate, ngroups=ngroups, window=window, tokens=tokens)
        if history not in HISTORIES:
            raise ValueError(describe("history", " or ".join(HISTORIES), repr(history)))
        check_types(state_dtype, input_dtype, conv_shape, conv_dtype)
        spec = CheckpointingSSUSpec(
            state_dtype=name_of(state_dtype), input_dtype=name_of(input_dtype), A_dtype="float32", dt_dtype="float32",
            D_dtype=None, dt_bias_dtype=None, heads=nheads, groups=ngroups, dim=dim, dstate=dstate, tokens=tokens,
            window=window, history=history,
        )  # fmt: skip
        check_spec(spec, {"heads": "nheads"})
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
        check_sizes(heads=heads, value_heads=value_heads, K=K, V=V, window=window, tokens=tokens)
        check_heads("value_heads", heads, value_heads)
        check_types(state_dtype, input_dtype, conv_shape, conv_dtype)
        spec = GatedDeltaRuleReplaySpec(
            state_dtype=name_of(state_dtype), input_dtype=name_of(input_dtype), output_dtype="float32",
            gate_dtype="float32", dt_bias_dtype="float32", K=K, V=V, tokens=token_bucket(tokens), l2norm=True,
            src_dtype="int32", zero_padding=False, vector_output=False, window=window_bucket(window),
        )  # fmt: skip
        check_spec(spec, {})
        rows = window + tokens
        entries = {
            "k_cache": ((heads, rows, K), input_dtype),
            "v_cache": ((value_heads, rows, V), input_dtype),
            "g_cache": ((value_heads, rows), torch.float32),
            "beta_cache": ((value_heads, rows), torch.float32),
        }
        conv = None if conv_shape is None else (conv_shape, conv_dtype or input_dtype)
        state = (value_heads, V, K), state_dtype
        return cls(
            layers, slots, window, tokens, state, entries, ring=True, conv=conv, device=device, gated_delta=True
        )  # fmt: skip

    # ----------------------------------------------------------------------------------------------------- the operator
    def arguments(self, layer: int) -> dict[str, Any]:
        """Return the pool's share of the operator's arguments for a layer, by name; the same views at every call.

        For `mamba2` all but the tokens, the weights, ``state_batch_indices`` and the work items; for `gated_delta` all
        but the tokens, the weights and ``initial_state_indices``.
        """
        return dict(self._arguments[layer])

    def _cursor_arguments(self, cu_seqlens: Tensor | None) -> dict[str, Any]:
        return {
            "window": self.window,
            "cache_buf_idx": self.cache_buf_idx,
            "ring_start": self.ring_start,
            "ring_length": next(iter(self.history.values())).shape[3] if self._ring else None,
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

        Rows have `tokens` new tokens each, or those of ``cu_seqlens``; ``work_items`` may be longer.
        """
        return build_work_items(
            self.prev_num_accepted_tokens,
            **self._cursor_arguments(cu_seqlens),
            state_batch_indices=state_batch_indices,
            batch=_batch(state_batch_indices, cu_seqlens),
            work_items=work_items,
            num_writes=num_writes,
        )

    def commit(
        self, state_batch_indices: Tensor, num_accepted_tokens: Tensor, *, cu_seqlens: Tensor | None = None
    ) -> None:
        """Advance cursors, seeds and the inputs of the convolutions, after a step: see `serving.commit`.

        Cursors and seeds take one launch and no allocation; inputs of convolutions are moved by PyTorch.

        Parameters
        ----------
        state_batch_indices : Tensor, (batch,), int32/int64
            Slot of each row: allocated ones, or `pad_slot_id`.
        num_accepted_tokens : Tensor, (batch,), int32/int64
            How many of its new tokens each row keeps; a negative number leaves the row as it is.  It may be longer.
        cu_seqlens : Tensor, (batch + 1,), int32/int64, optional
            As the step had it.

        Raises
        ------
        ValueError, TypeError, UnsupportedArchError
            As for `serving.commit`; and if a slot is not allocated, for pools on the CPU.  On a GPU such a row stays
            as it is.
        """
        batch = _batch(state_batch_indices, cu_seqlens)
        if batch is not None:
            if isinstance(num_accepted_tokens, Tensor) and num_accepted_tokens.shape[:1] < (batch,):
                expected = f"at least {batch} numbers, one for each row"
                raise ValueError(describe("num_accepted_tokens", expected, tuple(num_accepted_tokens.shape)))
            num_accepted_tokens, state_batch_indices = first_rows(batch, num_accepted_tokens, state_batch_indices)
        commit(
            self.prev_num_accepted_tokens,
            num_accepted_tokens,
            **self._cursor_arguments(cu_seqlens),
            state_batch_indices=state_batch_indices,
            rand_seed=self.rand_seed,
            unallocated=self._unallocated,
        )
        if self.conv_state is not None:
            slots = state_batch_indices.long()
            closed = self._unallocated[slots.clamp(0, self.slots - 1)]
            self._shift_conv(slots, num_accepted_tokens.long().masked_fill(closed, -1), cu_seqlens)

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
        self._unallocated[slot] = False
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back.

        Raises
        ------
        ValueError
            If the slot is not one that was allocated.
        """
        slot = as_slot("slot", slot)
        if not 0 <= slot < self.slots - 1 or slot in self._free:
            raise ValueError(describe("slot", "one that is allocated", slot))
        self._free.append(slot)
        self._unallocated[slot] = True

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

    def copy_slot(
        self, source: int | Tensor, destination: int | Tensor, *, destination_pool: StatePool | None = None
    ) -> None:
        """Copy all that slots hold but their seeds, pending tokens included, so that both go on alike.

        Parameters
        ----------
        source, destination : int or Tensor, (n,), int32/int64
            On the device of their pool; destinations are distinct, and no sources of the same pool.
        destination_pool : StatePool, optional
            Where destinations lie: a pool that differs in its number of slots, its seeds and its device at most, such
            as one on the CPU that sequences are swapped to.  None: this pool.

        Raises
        ------
        ValueError, TypeError
            If there are not as many of both, pools differ, or, as far as the host can see, a slot is out of range or a
            destination is not allocated: ``allocate`` would reset it.  The host sees ints, and tensors on the CPU.
        """
        target = self._other(destination_pool)
        read, written = self._index("source", source), target._index("destination", destination)
        self._check_pairs(read, written, target)
        own, others = self._slotted(), target._slotted()
        if target is not self:
            for name in ("kind", "layers", "window", "tokens"):
                check_equal(name, getattr(self, name), getattr(target, name))
            check_equal("tensors", sorted(own), sorted(others))
            for name, tensor in own.items():
                check_equal(f"{name}.dtype", tensor.dtype, others[name].dtype)
                check_equal(f"{name}.shape", (..., *tensor.shape[2:]), (..., *others[name].shape[2:]))
        target._check_allocated("destination", destination)
        for name, tensor in own.items():
            _copy(tensor, read, others[name], written)
        target._cursors[:, written] = self._cursors[:, read].to(target._cursors.device)

    def materialize(
        self,
        A: Sequence[Tensor] | None,
        source: int | Tensor,
        destination: int | Tensor,
        *,
        num_tokens: Tensor | None = None,
        philox_rounds: int = 10,
        use_qk_l2norm: bool = True,
        destination_pool: StatePool | None = None,
        saturate: bool = False,
    ) -> None:
        """Write the true states of slots, pending tokens folded in, to other slots, which have no pending tokens then.

        Parameters
        ----------
        A : sequence of Tensor, (nheads, dim, dstate), or None
            Of every layer; None for gated delta nets, whose decays are in the history.
        source, destination : int or Tensor, (n,), int32/int64
            On the pool's device; destinations are distinct, and no other row's source.
        num_tokens : Tensor, (n,), int32/int64, optional
            How many of the pending tokens to fold.  None: all; then the inputs of the convolutions are copied too.
            Otherwise they are zero: of tokens before the last step the pool knows none.
        philox_rounds : int
            Rounds of the Philox generator, with seeds.
        use_qk_l2norm : bool
            Of gated delta nets, as the steps have it.
        destination_pool : StatePool, optional
            Where destinations lie: a pool of the same device, layers and sizes of states and convolutions.  Its types
            of states, window, history and number of slots may be others.  None: this pool.
        saturate : bool
            Of new float16 states, make +-65504 what would round to an infinity (`serving.materialize`).

        Raises
        ------
        ValueError, TypeError
            If the pools do not fit, or as `serving.materialize`, `materialize_gated_delta` and `copy_slot` say.
            Nothing has been written in any layer.

        Notes
        -----
        Where the states that are written are not float32, they are rounded stochastically if this pool has seeds, with
        those of the sources.
        """
        target = self._other(destination_pool)
        read, written = self._index("source", source), target._index("destination", destination)
        self._check_pairs(read, written, target, same=True)
        if target is not self:
            check_fits(self, target)
        decays = check_decays(self, A)
        target._check_allocated("destination", destination)
        if self.kind == "mamba2":
            fold_mamba2(self, decays, read, written, target, num_tokens, philox_rounds, saturate)
        else:
            fold_gated_delta(self, read, written, target, num_tokens, use_qk_l2norm, saturate)
        if self.conv_state is not None and target.conv_state is not None:
            if num_tokens is None:
                most = min(self.conv_state.shape[3], target.conv_state.shape[3])
                _copy(self.conv_state[..., :most], read, target.conv_state[..., :most], written)
            else:
                _zero(target.conv_state, written)
        target._cursors.index_fill_(1, written, 0)

    def _slotted(self) -> dict[str, Tensor]:
        """What `copy_slot` copies: (layers, slots, ...)."""
        return {n: t for n, t in self._tensors().items() if n not in ("cursors", "rand_seed", "draws")}

    @property
    def state_bytes(self) -> int:
        """Bytes of the states and scales of one slot in all layers: what a write of the state moves."""
        parts = [self.state] if self.state_scale is None else [self.state, self.state_scale]
        return sum(part[:, 0].numel() * part.element_size() for part in parts)

    # ---------------------------------------------------------------------------------------------------------- indices
    def _index(self, name: str, slots: int | Tensor) -> Tensor:
        """Slots as an index on the pool's device, without a copy from the host."""
        device = self.state.device
        if isinstance(slots, Tensor):
            if slots.device != device or slots.dim() != 1 or slots.dtype not in (torch.int32, torch.int64):
                got = f"{name_of(slots.dtype)} of shape {tuple(slots.shape)} on {slots.device}"
                raise ValueError(describe(name, f"int32 or int64 of shape (n,) on {device}", got))
            if device.type == "cpu" and bool(((slots < 0) | (slots >= self.slots)).any()):
                raise ValueError(describe(name, f"slots in [0, {self.slots})", slots.tolist()))
            return slots.long()
        slot = as_slot(name, slots)
        if not 0 <= slot < self.slots:
            raise ValueError(describe(name, f"a slot in [0, {self.slots})", slot))
        return torch.full((1,), slot, dtype=torch.int64, device=device)

    def _other(self, pool: StatePool | None) -> StatePool:
        if pool is None:
            return self
        if not isinstance(pool, StatePool):
            raise TypeError(describe("destination_pool", "a StatePool or None", type(pool).__name__))
        return pool

    def _check_allocated(self, name: str, slots: int | Tensor) -> None:
        """Raise if slots in range, but for padding, are such as no sequence has, as far as the host can see."""
        if isinstance(slots, Tensor):
            if slots.device.type == "cpu":
                index = slots.long()
                check_allocated(name, index, self._unallocated, index != self.pad_slot_id, self.pad_slot_id)
        elif slots != self.pad_slot_id and (slots in self._free or slots == self.slots - 1):
            refuse_slot(name, slots, 0, self.pad_slot_id)

    def _check_pairs(self, read: Tensor, written: Tensor, target: StatePool, same: bool = False) -> None:
        if read.shape != written.shape:
            raise ValueError(describe("destination", f"{len(read)} slots like source", len(written)))
        if read.device.type == written.device.type == "cpu":
            pairs = set(zip(read.tolist(), written.tolist()))
            if target is not self:
                same, pairs = True, {(to, to) for _, to in pairs}
            foreign = {to for _, to in pairs} & {of for of, to in pairs if not (same and of == to)}
            if foreign or len({to for _, to in pairs}) != len(written):
                raise ValueError(describe("destination", "distinct slots that are no sources", written.tolist()))


def _batch(slots: object, cu_seqlens: object) -> int | None:
    """Rows of a batch, as its offsets or else its slots tell; None if they are no tensors, which others name."""
    counted = slots if cu_seqlens is None else cu_seqlens
    if not isinstance(counted, Tensor) or counted.dim() != 1:
        return None
    return max(counted.shape[0] - (cu_seqlens is not None), 0)


def _raw(tensor: Tensor) -> Tensor:
    """The same bytes, in a type that PyTorch can index by tensors on every device."""
    return tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor


def _zero(tensor: Tensor, index: Tensor) -> None:
    _raw(tensor).index_fill_(1, index, 0)


def _copy(tensor: Tensor, read: Tensor, target: Tensor, written: Tensor) -> None:
    """Copy slots of one tensor to slots of another, or of itself; they may lie on two devices."""
    _raw(target).index_copy_(1, written, _raw(tensor).index_select(1, read).to(target.device))
