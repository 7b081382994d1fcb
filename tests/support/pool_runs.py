"""Pools with a few steps of random calls behind them."""

from __future__ import annotations

import torch

import cute_ssm
from cute_ssm import serving

LAYERS, WINDOW, TOKENS, CHANNELS, WIDTH = 2, 8, 3, 3, 4
CONV = {"conv_shape": (CHANNELS, WIDTH), "conv_dtype": torch.float32}


def gated(**options):
    sizes = {"heads": 1, "value_heads": 2, "K": 64, "V": 64, "window": WINDOW, "tokens": TOKENS, **CONV}
    return serving.StatePool.gated_delta(LAYERS, 5, **{**sizes, **options})


class Run:
    """A loop of steps through the operators that is the same for equal pools, slots and numbers of the step."""

    def __init__(self, pool, slots):
        self.pool, self.slots = pool, torch.tensor([*slots, pool.pad_slot_id])

    def step(self, number):
        """Return the outputs of all layers."""
        g = torch.Generator().manual_seed(number)
        outputs = [self.layer(layer, g) for layer in range(LAYERS)]
        fresh = torch.randn(LAYERS, 2, CHANNELS, TOKENS, generator=g)
        self.pool.conv_state[:, self.slots[:2], :, WIDTH - 1 : WIDTH - 1 + TOKENS] = fresh
        self.pool.commit(self.slots, torch.randint(0, TOKENS + 1, (3,), generator=g))
        return torch.stack(outputs)

    def layer(self, layer, g):
        def randn(*shape):
            return torch.randn(3, TOKENS, *shape, generator=g)

        arguments = self.pool.arguments(layer)
        if self.pool.kind == "gated_delta":
            q, k, v = (randn(heads, 64).bfloat16() for heads in (1, 1, 2))
            gates = {"A_log": torch.zeros(2), "a": randn(2), "dt_bias": torch.zeros(2), "b": randn(2)}
            call = {"q": q, "k": k, "v": v, "initial_state_indices": self.slots, **gates}
            return cute_ssm.gated_delta_rule_replay(**arguments, **call)[0][:2]
        dtype = next(iter(self.pool.history.values())).dtype
        x, B, C = (randn(n, size).to(dtype) for n, size in ((2, 16), (1, 64), (1, 64)))
        dt = torch.rand(3, TOKENS, 2, generator=g)[..., None].expand(x.shape)
        operator = cute_ssm.checkpointing_ssu_ring if "x_cache" in arguments else cute_ssm.checkpointing_ssu
        call = {"x": x, "dt": dt, "A": rates()[layer], "B": B, "C": C, "out": torch.zeros_like(x)}
        return operator(**arguments, **call, state_batch_indices=self.slots)[:2]


def rates():
    return [torch.full((2, 1, 1), -1.0 - layer).expand(2, 16, 64) for layer in range(LAYERS)]


def memory(pool):
    return {name: tensor.view(torch.uint8) for name, tensor in pool._tensors().items()}


def started(make, steps=7):
    """A pool with two sequences after some steps, a slot that was freed, and the run."""
    pool = make()
    slots = [pool.allocate() for _ in range(3)]
    pool.free(slots.pop(1))
    run = Run(pool, slots)
    for number in range(steps):
        run.step(number)
    assert pool.prev_num_accepted_tokens.any()
    return pool, run
