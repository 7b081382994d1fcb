"""`StatePool`: the memory of a model's sequences between steps, in slots."""

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
    """Slots for the sequences of a model: states, histories of pending tokens, convolution inputs, cursors and seeds.

    Make a pool with `mamba2` or `gated_delta`.  All tensors are allocated once, as zeros, and their addresses never
    change.  Slots are allocated and freed on the host.  The methods that belong to a step of the model run on the
    device without synchronisation, so that steps can be captured in a CUDA graph.

    The last slot is reserved for padding and never allocated: any number of rows of a batch may use `pad_slot_id`.

    ``pickle``, ``torch.save`` and ``copy.deepcopy`` make independent pools with all slots, cursors and seeds, and `to`
    makes one on another device.  `state_dict` and `load_state_dict` save and restore the contents as tensors.
    ``copy.copy`` shares memory and free slots with the original.

    Attributes
    ----------
    layers, slots : int
        Number of layers, which share the cursors, and of slots, including the reserved one.
    window, tokens : int
        Largest number of pending tokens, and of new tokens per step.
    pad_slot_id : int
        The slot of padding rows in ``state_batch_indices``.
    state_name : str
        Name of the operator's argument: ``state`` or ``initial_state``.
    state : Tensor, (layers, slots, ...)
    state_scale : Tensor, (layers, slots, ...), float32, or None
    history : dict of str to Tensor, (layers, slots, ...)
        By names of the operator's arguments.
    conv_state : Tensor, (layers, slots, channels, width - 1 + tokens), or None
        Inputs of the convolution: the last ``width - 1`` before a step, then the new tokens of the step.
    prev_num_accepted_tokens : Tensor, (slots,), int32
        Pending tokens of each slot.
    cache_buf_idx, ring_start : Tensor, (slots,), int32, or None
        The second cursor: the first for double buffers, the other for a ring.
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
        """Allocate a pool; `mamba2` and `gated_delta` derive the shapes from sizes of the model.

        Parameters
        ----------
        layers, slots, window, tokens : int
            As the attributes, except that `slots` does not include the reserved one.
        state : (shape, dtype)
            State of one slot of one layer.
        history : dict of str to (shape, dtype)
            History of one slot of one layer, by names of the operator's arguments.
        ring : bool
            Whether the second cursor is ``ring_start`` instead of ``cache_buf_idx``.
        conv : ((channels, width), dtype), optional
            Shape of the convolution's weight, and dtype of its inputs.
        seed : int, optional
            Round states stochastically, with seeds derived from this one.
        device : torch.device or str, optional
        gated_delta : bool
            Whether the state is named ``initial_state``, with -1 as padding.

        Raises
        ------
        ValueError, TypeError
            If a size is not positive, or a seed is not an int or given with float32 states.
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
            Layers of the model, and slots for sequences; a slot for padding is added.
        nheads, dim, dstate, ngroups : int
            Sizes of a layer.
        window, tokens : int
            Largest number of pending tokens, and of new tokens per step.
        state_dtype : torch.dtype
            float32, bfloat16, float16, or int16, int8, float8_e4m3fn with a scale per row.
        input_dtype : torch.dtype
            dtype of x and B: bfloat16 or float16.
        history : {"double", "double_x", "ring"}
            "double": two buffers of `window` rows, with one for x; "double_x": with two for x; "ring": a ring of
            ``window + tokens`` rows.
        conv_shape : (channels, width), optional
            Shape of the weight of the convolution before the recurrence; adds `conv_state` to the pool.
        conv_dtype : torch.dtype, optional
            dtype of the convolution's inputs.  Default: `input_dtype`.
        seed : int, optional
            Round states stochastically.
        device : torch.device or str, optional

        Raises
        ------
        ValueError
            If a size is not positive, or ``history`` is not one of the above.
        UnsupportedSpecError
            If the operator does not support the sizes or dtypes.
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
        """Make a pool for `gated_delta_rule_replay`, which treats negative slots as padding: `pad_slot_id` is -1.

        Parameters
        ----------
        layers, slots, window, tokens, conv_shape, conv_dtype, device
            As for `mamba2`.
        heads, value_heads, K, V, state_dtype, input_dtype
            Sizes and types of a layer's tensors, as for `gated_delta_rule_replay`; inputs are q, k and v.
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
        """Return the operator's arguments that the pool holds for a layer, by name; every call returns the same views.

        For `mamba2` these are all arguments except tokens, weights, ``state_batch_indices`` and work items; for
        `gated_delta` all except tokens, weights and ``initial_state_indices``.
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
        """Build the operator's list of work before a step: `serving.build_work_items` with the pool's cursors.

        Call it once for all layers.  ``state_batch_indices`` holds the slot of each row, or `pad_slot_id`.  Each row
        has `tokens` new tokens, or those of ``cu_seqlens``.  ``work_items``, which may have more rows than the batch,
        and ``num_writes`` are **written**, or allocated if None; both are returned.
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
        """Advance cursors, seeds and convolution inputs after a step: see `serving.commit`.

        Call it once for all layers.  Cursors and seeds take one launch and no allocation; convolution inputs are moved
        with PyTorch.

        Parameters
        ----------
        state_batch_indices : Tensor, (batch,), int32/int64
            Slot of each row: an allocated one, or `pad_slot_id`.
        num_accepted_tokens : Tensor, (>= batch,), int32/int64
            Number of accepted tokens of each row.  A row with a negative number does not change.
        cu_seqlens : Tensor, (batch + 1,), int32/int64, optional
            As passed to the step.

        Raises
        ------
        ValueError, TypeError, UnsupportedArchError
            As for `serving.commit`, and on the CPU if a slot is not allocated.  On a GPU such a row does not change.
        """
        batch = _batch(state_batch_indices, cu_seqlens)
        if batch is not None:
            if isinstance(num_accepted_tokens, Tensor) and num_accepted_tokens.shape[:1] < (batch,):
                expected = f"at least {batch} numbers, one per row"
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
            unallocated = self._unallocated[slots.clamp(0, self.slots - 1)]
            self._shift_conv(slots, num_accepted_tokens.long().masked_fill(unallocated, -1), cu_seqlens)

    def _shift_conv(self, slots: Tensor, accepted: Tensor, cu_seqlens: Tensor | None) -> None:
        """Shift convolution inputs by the accepted tokens, in the rows that `commit` advances."""
        if self.conv_state is None:
            return
        taps = self._conv_width - 1
        inside = (slots >= 0) & (slots < self.slots)
        slots = slots.where(inside, self.slots - 1)
        counts = torch.full_like(accepted, self.tokens) if cu_seqlens is None else cu_seqlens.long().diff()
        moves = inside & (accepted >= 0) & (accepted <= counts.clamp(max=min(self.tokens, self.window)))
        inputs = self.conv_state[:, slots]  # (layers, batch, channels, taps + tokens)
        columns = accepted.where(moves, 0)[:, None] + torch.arange(taps, device=slots.device)
        columns = columns[None, :, None].expand(*inputs.shape[:3], taps)
        self.conv_state[:, slots, :, :taps] = inputs.gather(3, columns)

    # ------------------------------------------------------------------------------------------------------------ slots
    @property
    def available(self) -> int:
        """Number of free slots."""
        return len(self._free)

    def allocate(self) -> int:
        """Allocate a free slot and reset it, without synchronisation.

        Raises
        ------
        ValueError
            If no slot is free.
        """
        if not self._free:
            raise ValueError(describe("slots", "a free slot", f"{self.slots - 1} in use", "free a slot first"))
        slot = self._free.pop()
        self.reset_slot(slot)
        self._unallocated[slot].fill_(False)  # an assignment would copy from the host, and wait
        return slot

    def free(self, slot: int) -> None:
        """Free a slot.

        Raises
        ------
        ValueError
            If the slot is not allocated.
        """
        slot = as_slot("slot", slot)
        if not 0 <= slot < self.slots - 1 or slot in self._free:
            raise ValueError(describe("slot", "an allocated slot", slot))
        self._free.append(slot)
        self._unallocated[slot].fill_(True)

    def reset_slot(self, slots: int | Tensor) -> None:
        """Reset slots for new sequences: zero states, convolution inputs and cursors, and draw new seeds.

        Histories do not change, because without pending tokens they are not read.

        Parameters
        ----------
        slots : int or Tensor, (n,), int32/int64
            A tensor is on the pool's device, and is not synchronised with.
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
        """Copy slots with their pending tokens, but without seeds: a copy continues like its source.

        Parameters
        ----------
        source, destination : int or Tensor, (n,), int32/int64
            Tensors are on the device of their pool.  Destinations are distinct, and not sources in the same pool.
        destination_pool : StatePool, optional
            Pool of the destinations, which may differ only in the number of slots, the seeds and the device: a pool on
            the CPU for swapping, for example.  None: this pool.

        Raises
        ------
        ValueError, TypeError
            If numbers of slots or the pools differ, a slot is out of range, or a destination is not allocated.  Values
            of tensors on a GPU are not checked.
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
        """Write the current states of slots, with pending tokens folded in, to slots that then have no pending tokens.

        Parameters
        ----------
        A : sequence of Tensor, (nheads, dim, dstate), or None
            Decay rates of every layer.  None for gated delta nets, whose decays are in the history.
        source, destination : int or Tensor, (n,), int32/int64
            Tensors are on the pool's device.  Destinations are distinct, and not the source of another row.  A row may
            have the same slot twice: then its pending tokens are folded in place.
        num_tokens : Tensor, (n,), int32/int64, optional
            Number of pending tokens to fold, from the oldest on.  None: all, and convolution inputs are copied too.
            Otherwise convolution inputs are zeroed, because the pool has only those of the last step.
        philox_rounds : int
            Rounds of the Philox generator, if the pool has seeds.
        use_qk_l2norm : bool
            For gated delta nets, as passed to the steps.
        destination_pool : StatePool, optional
            Pool of the destinations, on the same device, with the same layers and sizes of states and convolutions.
            State dtype, window, history and number of slots may differ.  None: this pool.
        saturate : bool
            Store +-65504 where a new float16 state would round to an infinity; see `serving.materialize`.

        Raises
        ------
        ValueError, TypeError
            If the pools do not match, or as for `serving.materialize`, `materialize_gated_delta` and `copy_slot`.
            Nothing has been written in any layer.

        Notes
        -----
        If this pool has seeds and the written states are not float32, they are rounded stochastically, with the seeds
        of the sources.
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
        """Tensors that `copy_slot` copies, (layers, slots, ...)."""
        return {n: t for n, t in self._tensors().items() if n not in ("cursors", "rand_seed", "draws")}

    @property
    def state_bytes(self) -> int:
        """Bytes of the states and scales of one slot in all layers, which a write of the state moves."""
        parts = [self.state] if self.state_scale is None else [self.state, self.state_scale]
        return sum(part[:, 0].numel() * part.element_size() for part in parts)

    # ---------------------------------------------------------------------------------------------------------- indices
    def _index(self, name: str, slots: int | Tensor) -> Tensor:
        """Return slots as an index tensor on the pool's device, without a copy from the host."""
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
        """Raise if a slot, other than padding, is not allocated; tensors on a GPU are not checked."""
        if isinstance(slots, Tensor):
            if slots.device.type == "cpu":
                index = slots.long()
                check_allocated(name, index, self._unallocated, index != self.pad_slot_id, self.pad_slot_id)
        elif slots != self.pad_slot_id and (slots in self._free or slots == self.slots - 1):
            refuse_slot(name, slots, 0, self.pad_slot_id)

    def _check_pairs(self, read: Tensor, written: Tensor, target: StatePool, same: bool = False) -> None:
        if read.shape != written.shape:
            raise ValueError(describe("destination", f"{len(read)} slots, as many as in source", len(written)))
        if read.device.type == written.device.type == "cpu":
            pairs = set(zip(read.tolist(), written.tolist()))
            if target is not self:
                same, pairs = True, {(to, to) for _, to in pairs}
            foreign = {to for _, to in pairs} & {of for of, to in pairs if not (same and of == to)}
            if foreign or len({to for _, to in pairs}) != len(written):
                raise ValueError(describe("destination", "distinct slots that are not sources", written.tolist()))


def _batch(slots: object, cu_seqlens: object) -> int | None:
    """Return the size of a batch, by its offsets or slots; None if they are not tensors, which later checks report."""
    counted = slots if cu_seqlens is None else cu_seqlens
    if not isinstance(counted, Tensor) or counted.dim() != 1:
        return None
    return max(counted.shape[0] - (cu_seqlens is not None), 0)


def _raw(tensor: Tensor) -> Tensor:
    """Return the same bytes in a dtype that PyTorch can index with tensors on every device."""
    return tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor


def _zero(tensor: Tensor, index: Tensor) -> None:
    _raw(tensor).index_fill_(1, index, 0)


def _copy(tensor: Tensor, read: Tensor, target: Tensor, written: Tensor) -> None:
    """Copy slots of a tensor to slots of another one, which may be on another device, or of itself."""
    _raw(target).index_copy_(1, written, _raw(tensor).index_select(1, read).to(target.device))
