"""`PoolStorage`: the memory of a state pool; copying, saving, moving and printing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops._arguments import name_of
from cute_ssm.serving._pool_checks import check_seed

PoolT = TypeVar("PoolT", bound="PoolStorage")
# attributes that `_bind` derives from the others
_DERIVED = ("prev_num_accepted_tokens", "cache_buf_idx", "ring_start", "_arguments")
_SPLITMIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SAME_OPTIONS = "make a pool with the same options"
_SETTINGS = ("layers", "slots", "window", "tokens", "state_name", "pad_slot_id", "_ring", "_conv_width")


class PoolStorage:
    """Base of `StatePool`: attributes that hold memory, and operations on all of them.

    Each tensor of memory is one attribute.  Views of it, including the arguments for operators, are derived by `_bind`,
    again after every copy or move, so that no memory is referenced twice in a saved pool.
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
        """Return the memory that operators and steps change, by its names in `state_dict`."""
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
        """Derive the views of the memory."""
        self.prev_num_accepted_tokens, cursor = self._cursors
        self.cache_buf_idx = None if self._ring else cursor
        self.ring_start = cursor if self._ring else None
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
        """Draw new seeds for slots by SplitMix64 from the root seed, the layer, the slot, and its number of draws."""
        if self.rand_seed is None or self._root is None or self._draws is None:
            return
        self._draws[index] += 1
        layer = torch.arange(self.layers, device=index.device)[:, None]
        number = (self._draws[index] * self.slots + index) * self.layers + layer
        self.rand_seed[:, index] = _splitmix(number, self._root)

    # ---------------------------------------------------------------------------------------------------------- copying
    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the views, for `pickle`, `torch.save`, `copy.deepcopy` and `copy.copy`."""
        state = {name: value for name, value in self.__dict__.items() if name not in _DERIVED}
        if self.state.dtype is torch.float8_e4m3fn:  # torch 2.13 pickles this dtype but cannot unpickle it
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
        """Return the pool on another device, with its slots, cursors and seeds; itself if it is already there.

        Parameters
        ----------
        device : torch.device, str, int or Tensor, optional
            The device, or a tensor on it.  None: the pool's device.
        dtype : torch.dtype, optional
            Not supported, because a pool cannot change its dtypes.
        non_blocking : bool
            As for ``Tensor.to``.
        copy : bool
            Always return a new pool.

        Raises
        ------
        TypeError
            If a dtype is given.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None:
            fix = "make a pool with that state_dtype, and materialize into it"
            raise TypeError(describe("dtype", "None, as a pool cannot change its dtypes", name_of(dtype), fix))
        target = self.state.device if device is None else device.device if isinstance(device, Tensor) else device

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(target, non_blocking=non_blocking, copy=copy)

        if not copy and moved(self._cursors) is self._cursors:
            return self
        return self._mapped(moved)

    def _mapped(self: PoolT, function: Callable[[Tensor], Tensor]) -> PoolT:
        """Return a pool like this one, with a function applied to all memory."""
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
        """Return the contents of the pool, in a form for ``torch.load(..., weights_only=True)``.

        Returns
        -------
        dict
            Tensors by name, which share memory with the pool; ``"free"``, a tensor of the free slots; ``"seed"``, an
            int or None; and ``"settings"``, a dict of values that must be equal in a pool that loads them.
        """
        return {
            **self._tensors(),
            "free": torch.tensor(self._free, dtype=torch.int64),
            "seed": self._root,
            "settings": self._settings(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the contents that `state_dict` returned for a pool with the same settings, on any device.

        The memory is written in place, so that captured CUDA graphs remain valid and use the restored contents.

        Raises
        ------
        ValueError, TypeError
            If names, settings, shapes or dtypes differ, or free slots are invalid.  Nothing has been written.
        """
        own, others = self._tensors(), {"free", "seed", "settings"}
        if not isinstance(state_dict, Mapping):
            raise TypeError(describe("state_dict", "a dict that state_dict() returned", type(state_dict).__name__))
        if set(state_dict) != set(own) | others:
            differ = sorted(map(str, set(state_dict) ^ (set(own) | others)))
            expected = "the names of this pool's state_dict()"
            raise ValueError(describe("state_dict", expected, f"a difference in {differ}", _SAME_OPTIONS))
        settings, seed = state_dict["settings"], state_dict["seed"]
        if not isinstance(settings, Mapping):
            raise TypeError(describe("state_dict: settings", "a dict", type(settings).__name__))
        for name, value in self._settings().items():
            got = settings.get(name)
            if type(got) is not type(value) or got != value:
                raise ValueError(describe(f"state_dict: {name}", repr(value), repr(got), _SAME_OPTIONS))
        check_seed(seed, "state_dict: seed")
        if (seed is None) != (self.rand_seed is None):
            expected = "an int" if seed is None else "None for a pool that does not round stochastically"
            raise ValueError(describe("state_dict: seed", expected, seed, _SAME_OPTIONS))
        for name, tensor in own.items():
            given = state_dict[name]
            if isinstance(given, Tensor) and (given.is_meta or given.layout is not torch.strided):
                got = f"one on {given.device} of layout {given.layout}"
                raise ValueError(describe(f"state_dict: {name}", "a dense tensor with data", got))
            if not isinstance(given, Tensor) or given.shape != tensor.shape or given.dtype != tensor.dtype:
                got = f"{name_of(given.dtype)} of {tuple(given.shape)}" if isinstance(given, Tensor) else given
                expected = f"{name_of(tensor.dtype)} of {tuple(tensor.shape)}"
                raise ValueError(describe(f"state_dict: {name}", expected, got, _SAME_OPTIONS))
        free = _free_slots(state_dict["free"])
        if len(set(free)) != len(free) or not all(0 <= slot < self.slots - 1 for slot in free):
            raise ValueError(describe("state_dict: free", f"distinct slots below {self.slots - 1}", free))
        with torch.no_grad():  # saved tensors may be part of an autograd graph
            for name, tensor in own.items():
                tensor.copy_(state_dict[name])
        self._free[:] = free
        self._root = seed
        unallocated = torch.zeros(self.slots, dtype=torch.bool)
        unallocated[[*free, self.slots - 1]] = True
        self._unallocated.copy_(unallocated)

    def _settings(self) -> dict[str, Any]:
        return {name.removeprefix("_"): getattr(self, name) for name in _SETTINGS}

    # --------------------------------------------------------------------------------------------------------- printing
    @property
    def kind(self) -> str:
        """The recurrence of the pool: ``"mamba2"`` or ``"gated_delta"``."""
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


def _free_slots(saved: object) -> list[int]:
    """Return the free slots of a state dict, a tensor or a sequence of ints, as a list."""
    slots = saved
    integers = isinstance(saved, Tensor) and saved.dtype in (torch.int32, torch.int64)
    if isinstance(saved, Tensor) and integers and saved.dim() == 1 and not saved.is_meta:
        slots = saved.tolist()
    if not isinstance(slots, (list, tuple)) or not all(type(slot) is int for slot in slots):
        got = f"{name_of(saved.dtype)} of {tuple(saved.shape)}" if isinstance(saved, Tensor) else repr(saved)
        raise TypeError(describe("state_dict: free", "a tensor of slots, (n,), int64", got))
    return list(slots)


def _bytes(number: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"


def _splitmix(number: Tensor, root: int) -> Tensor:
    """Return random int64 numbers for numbers of draws, by SplitMix64 from a root seed."""
    x = number * _signed(_SPLITMIX[0]) + _signed(root)
    for shift, factor in ((30, _SPLITMIX[1]), (27, _SPLITMIX[2])):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, 31)


def _signed(value: int) -> int:
    """Return the low 64 bits of a number as an int64."""
    return (value + 2**63) % 2**64 - 2**63


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right logically."""
    return x >> bits & (1 << 64 - bits) - 1
