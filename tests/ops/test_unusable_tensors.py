"""Tensors that no operator can use: without dimensions, of no elements, without memory, batched by vmap."""

from __future__ import annotations

import pytest
import torch
from bits import same_bits
from index_calls import CALLS
from memory import copy

CHOSEN = (
    "step", "step, matrices", "step, saved", "checkpointing", "checkpointing, list", "gated delta", "replay", "scan",
    "scan, blocks", "commit", "work items", "materialize",
)  # fmt: skip
KINDS = {
    "0-d": lambda t: t.reshape(-1)[0],
    "last dimension of 0": lambda t: t[..., :0],
    "first dimension of 0": lambda t: t[:0],
}
EACH = [
    (call, name)
    for call in CHOSEN
    for name, value in CALLS[call][1]().items()
    if isinstance(value, torch.Tensor)
]  # fmt: skip


@pytest.mark.parametrize("kind", [*list(KINDS)[:2], pytest.param(list(KINDS)[2], marks=pytest.mark.slow)])
@pytest.mark.parametrize(("call", "name"), EACH, ids=str)
def test_a_tensor_of_no_use_is_refused_by_name_or_means_nothing(call, name, kind):
    operator, make, _ = CALLS[call]
    given = make()
    given[name] = KINDS[kind](given[name])
    before = copy(given)
    try:
        operator(**given)
    except (ValueError, TypeError) as error:
        assert ": expected" in str(error), error
        for key, value in given.items():
            if isinstance(value, torch.Tensor):
                same_bits(value, before[key], f"{key} was written before the error")
    else:  # a single seed has a shape of its own, and a batch may be empty
        assert kind != "0-d" or name in ("rand_seed",)


@pytest.mark.parametrize("call", CHOSEN)
def test_meta_tensors_are_refused(call):
    operator, make, _ = CALLS[call]
    given = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in make().items()}
    with pytest.raises(ValueError, match="expected a tensor on a GPU or on the CPU, got one on meta"):
        operator(**given)


@pytest.mark.parametrize("call", CHOSEN)
def test_vmap_is_refused(call):
    operator, make, _ = CALLS[call]
    given = make()
    name = next(n for n in ("x", "q", "u", "state_batch_indices") if isinstance(given.get(n), torch.Tensor))
    batched = torch.stack([given[name]] * 2)
    with torch.no_grad(), pytest.raises(ValueError, match="got one that vmap has batched; operators have no rule"):
        torch.func.vmap(lambda one: operator(**{**given, name: one}))(batched)
