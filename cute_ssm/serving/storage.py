"""`PoolStorage`: the memory of a pool of slots, and how it is copied, kept, moved and printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops._arguments import name_of
from cute_ssm.serving._pool_checks import check_seed

PoolT = TypeVar("PoolT", bound="PoolStorage")
# what is made from the other attributes, by `_bind`
_DERIVED = ("prev_num_accepted_tokens", "cache_buf_idx", "ring_start", "_arguments")
_SPLITMIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SETTINGS = ("layers", "slots", "window", "tokens", "state_name", "pad_slot_id", "_ring", "_conv_width")


class PoolStorage:
    """Base of `StatePool`: attributes that hold memory, and operations on all of them at once.

    Every piece of memory is one attribute.  Views of it, those that operators are given included, are made anew
    wherever memory is, so that nothing is ever kept in two places.
    """

    layers: int
    slots: int
    window: int
    tokens: int
    pad_slot_id: int
    state_name: str
    state: Tensor
    state_scale: Tensor | None
    history: dict[str, Tensor]
    conv_state: Tensor | None
    rand_seed: Tensor | None
    prev_num_accepted_tokens: Tensor
    cache_buf_idx: Tensor | None
    ring_start: Tensor | None
    _conv_width: int
    _ring: bool
    _root: int | None
    _cursors: Tensor
    _draws: Tensor | None
    _unallocated: Tensor
    _free: list[int]
    _arguments: list[dict[str, Any]]

    # ----------------------------------------------------------------------------------------------------------- memory
    def _tensors(self) -> dict[str, Tensor]:
        """All memory that operators and steps change, by the names that `state_dict` has."""
        named = {
            "state": self.state,
            "state_scale": self.state_scale,
            **{f"history.{name}": tensor for name, tensor in self.history.items()},
            "conv_state": self.conv_state,
            "cursors": self._cursors,
            "rand_seed": self.rand_seed,
            "draws": self._draws,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _bind(self) -> None:
        """Make the views of the memory."""
        self.prev_num_accepted_tokens, place = self._cursors
        self.cache_buf_idx = None if self._ring else place
        self.ring_start = place if self._ring else None
        self._arguments = [self._arguments_of(layer) for layer in range(self.layers)]

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

    def _draw(self, index: Tensor) -> None:
        """Draw seeds of slots by SplitMix64, from the root, the layer, the slot, and how often it was drawn for."""
        if self.rand_seed is None or self._root is None or self._draws is None:
            return
        self._draws[index] += 1
        layer = torch.arange(self.layers, device=index.device)[:, None]
        number = (self._draws[index] * self.slots + index) * self.layers + layer
        self.rand_seed[:, index] = _splitmix(number, self._root)

    # ---------------------------------------------------------------------------------------------------------- copying
    def __getstate__(self) -> dict[str, Any]:
        """All but the views: what `pickle`, `torch.save`, `copy.deepcopy` and `copy.copy` copy."""
        state = {name: value for name, value in self.__dict__.items() if name not in _DERIVED}
        if self.state.dtype is torch.float8_e4m3fn:  # which torch 2.13 pickles, but does not unpickle
            state["state"] = self.state.view(torch.uint8)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.state.dtype is torch.uint8:
            self.state = self.state.view(torch.float8_e4m3fn)
        self._bind()

    def to(
        self: PoolT,
        device: torch.device | str | int | torch.dtype | Tensor | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
        copy: bool = False,
    ) -> PoolT:
        """Return the pool on another device, with its slots, cursors and seeds; itself if it is there already.

        Parameters
        ----------
        device : torch.device, str, int or Tensor, optional
            Or a tensor whose device is meant.  None: the device that the pool is on.
        dtype : torch.dtype, optional
            Refused: a pool keeps its types.
        non_blocking : bool
            As for ``Tensor.to``.
        copy : bool
            Return another pool in any case.

        Raises
        ------
        TypeError
            If a type is given.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None:
            fix = "make a pool of that type, and materialize into it"
            raise TypeError(describe("dtype", "None, as pools keep their types", name_of(dtype), fix))
        target = self.state.device if device is None else device.device if isinstance(device, Tensor) else device

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(target, non_blocking=non_blocking, copy=copy)

        if not copy and moved(self._cursors) is self._cursors:
            return self
        return self._mapped(moved)

    def _mapped(self: PoolT, function: Callable[[Tensor], Tensor]) -> PoolT:
        """A pool like this one with the results of a function in place of all memory."""
        pool = object.__new__(type(self))
        state = self.__getstate__()
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = function(value)
            elif isinstance(value, dict):
                state[name] = {key: function(tensor) for key, tensor in value.items()}
            elif isinstance(value, list):
                state[name] = list(value)
        pool.__setstate__(state)
        return pool

    # ------------------------------------------------------------------------------------------------------ state dicts
    def state_dict(self) -> dict[str, Any]:
        """Return all that the pool remembers, as ``torch.load(..., weights_only=True)`` takes it.

        Returns
        -------
        dict
            Tensors by name, which share memory with the pool; ``"free"``, a tensor of the slots that are free;
            ``"seed"``, an int or None; and ``"settings"``, a dict of what a pool that loads them must equal.
        """
        return {
            **self._tensors(),
            "free": torch.tensor(self._free, dtype=torch.int64),
            "seed": self._root,
            "settings": self._settings(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, of a pool with the same settings on any device.

        The memory stays where it is, so that captured CUDA graphs go on with what was restored.

        Raises
        ------
        ValueError, TypeError
            If names, settings, shapes or types differ, or the list of free slots is invalid.  Nothing has been written.
        """
        own, others = self._tensors(), {"free", "seed", "settings"}
        if not isinstance(state_dict, Mapping):
            raise TypeError(describe("state_dict", "a dict that state_dict() returned", type(state_dict).__name__))
        if set(state_dict) != set(own) | others:
            differ = sorted(map(str, set(state_dict) ^ (set(own) | others)))
            raise ValueError(describe("state_dict", "what a pool like this one returned", f"{differ} in one alone"))
        settings, seed = state_dict["settings"], state_dict["seed"]
        if not isinstance(settings, Mapping):
            raise TypeError(describe("state_dict: settings", "a dict", type(settings).__name__))
        for name, value in self._settings().items():
            got = settings.get(name)
            if type(got) is not type(value) or got != value:
                raise ValueError(describe(f"state_dict: {name}", repr(value), repr(got), "make a pool like it"))
        check_seed(seed, "state_dict: seed")
        if (seed is None) != (self.rand_seed is None):
            expected = "an int" if seed is None else "None for a pool that does not round stochastically"
            raise ValueError(describe("state_dict: seed", expected, seed, "make a pool like it"))
        for name, tensor in own.items():
            given = state_dict[name]
            if isinstance(given, Tensor) and (given.is_meta or given.layout is not torch.strided):
                got = f"one on {given.device} of layout {given.layout}"
                raise ValueError(describe(f"state_dict: {name}", "a dense tensor that holds data", got))
            if not isinstance(given, Tensor) or given.shape != tensor.shape or given.dtype != tensor.dtype:
                got = f"{name_of(given.dtype)} of {tuple(given.shape)}" if isinstance(given, Tensor) else given
                expected = f"{name_of(tensor.dtype)} of {tuple(tensor.shape)}"
                raise ValueError(describe(f"state_dict: {name}", expected, got, "make a pool like it"))
        free = _free_slots(state_dict["free"])
        if len(set(free)) != len(free) or not all(0 <= slot < self.slots - 1 for slot in free):
            raise ValueError(describe("state_dict: free", f"distinct slots below {self.slots - 1}", free))
        with torch.no_grad():  # what is kept may be part of a graph
            for name, tensor in own.items():
                tensor.copy_(state_dict[name])
        self._free[:] = free
        self._root = seed
        closed = torch.zeros(self.slots, dtype=torch.bool)
        closed[[*free, self.slots - 1]] = True
        self._unallocated.copy_(closed)

    def _settings(self) -> dict[str, Any]:
        return {name.removeprefix("_"): getattr(self, name) for name in _SETTINGS}

    # --------------------------------------------------------------------------------------------------------- printing
    @property
    def kind(self) -> str:
        """``"mamba2"`` or ``"gated_delta"``: the recurrence that the pool is for."""
        return "mamba2" if self.state_name == "state" else "gated_delta"

    @property
    def nbytes(self) -> int:
        """Bytes of all memory."""
        return sum(tensor.nbytes for tensor in (*self._tensors().values(), self._unallocated))

    def __repr__(self) -> str:
        slots = self.slots - 1
        lines = [
            f"StatePool({self.kind}, layers={self.layers}, slots={slots} ({slots - len(self._free)} used, "
            f"{len(self._free)} free), window={self.window}, tokens={self.tokens}, {_bytes(self.nbytes)} on "
            f"{self.state.device})"
        ]
        for name, tensor in self._tensors().items():
            if name not in ("cursors", "draws"):
                shape = ", ".join(map(str, tensor.shape))
                lines.append(f"  {name.removeprefix('history.')}: {name_of(tensor.dtype)} ({shape})")
        return "\n".join(lines)


def _free_slots(kept: object) -> list[int]:
    """Slots in a state dict, a tensor or a sequence of ints, as a list."""
    slots = kept
    if isinstance(kept, Tensor) and kept.dim() == 1 and kept.dtype in (torch.int32, torch.int64) and not kept.is_meta:
        slots = kept.tolist()
    if not isinstance(slots, (list, tuple)) or not all(type(slot) is int for slot in slots):
        got = f"{name_of(kept.dtype)} of {tuple(kept.shape)}" if isinstance(kept, Tensor) else repr(kept)
        raise TypeError(describe("state_dict: free", "a tensor of slots, (n,), int64", got))
    return list(slots)


def _bytes(number: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"


def _splitmix(number: Tensor, root: int) -> Tensor:
    """The random int64 of the numbers of draws, by SplitMix64 from a root."""
    x = number * _signed(_SPLITMIX[0]) + _signed(root)
    for shift, factor in ((30, _SPLITMIX[1]), (27, _SPLITMIX[2])):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, 31)


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of a number."""
    return (value + 2**63) % 2**64 - 2**63


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right."""
    return x >> bits & (1 << 64 - bits) - 1
