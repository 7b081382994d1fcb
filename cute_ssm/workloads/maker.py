"""Random tensors on a device, or memory that only looks like them."""

from __future__ import annotations

import torch


class Maker:
    """Makes the tensors of a call.

    Parameters
    ----------
    device : torch.device or str
    fill : bool
        False: floating-point tensors have no values.
    seed : int
    """

    def __init__(self, device: torch.device | str = "cpu", fill: bool = True, seed: int = 0):
        self.device = torch.device(device)
        self.fill = fill
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return values of mean 0 and variance 1."""
        if not self.fill:
            return self.empty(*shape, dtype=dtype)
        return torch.randn(*shape, generator=self.generator, device=self.device).to(dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return values between 0 and 1."""
        if not self.fill:
            return self.empty(*shape, dtype=dtype)
        return torch.rand(*shape, generator=self.generator, device=self.device).to(dtype)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return memory for results."""
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def slots(self, pool: int, count: int) -> torch.Tensor:
        """Return `count` different slots of a pool, int32."""
        order = torch.randperm(pool, generator=self.generator, device=self.device)
        return order[:count].int()

    def steps(self, count: int, size: int) -> torch.Tensor:
        """Return offsets of `count` equally long sequences, int32."""
        return torch.arange(count + 1, dtype=torch.int32, device=self.device) * size


def dtype(name: str) -> torch.dtype:
    """Return ``torch.float16`` for ``"float16"``."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype: expected the name of one of torch's types, got {name!r}")
    return found


def stored_bytes(tensor: torch.Tensor | None) -> int:
    """Bytes of a tensor's distinct elements: dimensions of stride 0 count once."""
    if tensor is None:
        return 0
    size = tensor.element_size()
    for extent, stride in zip(tensor.shape, tensor.stride()):
        size *= extent if stride else 1
    return size


def moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a copy on a device with the same strides, and the same address modulo 16 bytes.

    The choice of a kernel depends on both.  Memory between the elements is not copied.
    """
    sizes = [size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride())]
    span = 1 + sum((size - 1) * stride for size, stride in zip(sizes, tensor.stride())) if tensor.numel() else 0
    offset = tensor.data_ptr() % 16 // tensor.element_size()
    memory = torch.empty(offset + span, dtype=tensor.dtype, device=device)
    stored = torch.as_strided(memory, sizes, tensor.stride(), offset)
    stored.copy_(tensor[tuple(slice(0, size) for size in sizes)])
    return stored.expand(tensor.shape)
