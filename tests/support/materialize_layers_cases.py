"""Calls of `serving.materialize_layers`, with layers that are allocations of their own, and what they must do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from bits import same_bits
from bounds import within
from materialize_cases import DTYPES, NAN, fold, unit
from memory import storage

from cute_ssm import serving
from cute_ssm.reference import rounding

SLOTS, GAP = 7, 16  # of a layer; elements between slots
SOURCES, TARGETS = ((0, 3, 5, 2), (1, 0, 4, 5)), ((6, 1, -1, 4), (2, 6, 3, 3))  # of layer and request
ACTIVE = (2, 0, 1, -1)  # request 3 is not processed


@dataclass(frozen=True)
class Case:
    """A call; the defaults are the base that tests vary one factor of at a time."""

    state: str = "bf16"
    inputs: str = "bf16"
    A: torch.dtype = torch.float32
    heads: int = 4
    groups: int = 2
    dim: int = 16
    dstate: int = 32
    rows: int = 10
    window: int = 8
    rounds: int = 0
    place: bool = False  # fold into the slot that is read


class Layer(NamedTuple):
    """The memory of a layer, each a view with gaps between slots, and the tokens of its requests, oldest first."""

    state: torch.Tensor
    scale: torch.Tensor | None
    x: torch.Tensor
    B: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    tokens: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def memory(self) -> list[torch.Tensor]:
        """The allocations, with what lies between slots."""
        return [storage(tensor) for tensor in self[:6] if tensor is not None]


class Made(NamedTuple):
    """A call, its layers, and the slots of each layer's requests."""

    call: dict[str, Any]
    layers: list[Layer]
    starts: list[int]
    counts: list[int]


def apart(values: torch.Tensor, gap: int) -> torch.Tensor:
    """The same values, with NaN (or 99) between slots."""
    size = values[0].numel()
    filler = NAN if values.dtype.is_floating_point and values.dtype.itemsize > 1 else 99
    flat = torch.full((len(values), size + gap), filler).to(values.dtype)
    flat[:, :size] = values.reshape(len(values), size)
    return flat.view(-1).as_strided(values.shape, (size + gap, *values.stride()[1:]))


def made(case: Case, seed: int = 0) -> Made:
    """Random arguments; slots and rows of rings that are not read hold NaN."""
    g = torch.Generator().manual_seed(seed)
    counts, starts = [case.window, 0, 3 % (case.window + 1), 2], [case.rows - 2, 1, 0, 99]
    layers = []
    for sources in SOURCES:
        values = torch.randn(SLOTS, case.heads, case.dim, case.dstate, generator=g)
        values[:, 0, 1] = 0.0  # a row of zeros
        state, scale = rounding.store(values, DTYPES[case.state])
        unread = [slot for slot in range(SLOTS) if slot not in (sources[b] for b in ACTIVE if b >= 0)]
        if scale is None:
            state[unread] = NAN
        else:
            scale[unread] = NAN
        kind = DTYPES[case.inputs]
        x = torch.full((SLOTS, case.heads, case.rows, case.dim), NAN, dtype=kind)
        B = torch.full((SLOTS, case.groups, case.rows, case.dstate), NAN, dtype=kind)
        dt = torch.full((SLOTS, case.heads, case.rows), NAN)
        tokens = []
        for b, slot in enumerate(sources):
            n = counts[b]
            one = torch.randn(n, case.heads, case.dim, generator=g).to(kind)
            two = torch.randn(n, case.groups, case.dstate, generator=g).to(kind)
            step = torch.rand(n, case.heads, generator=g) * 0.5
            tokens.append((one, two, step))
            for t in range(n if b in ACTIVE else 0):
                row = (starts[b] + t) % case.rows
                x[slot, :, row], B[slot, :, row], dt[slot, :, row] = one[t], two[t], step[t]
        A = (-torch.rand(case.heads, generator=g)).to(case.A)
        gap = GAP * (1 + len(layers))  # layers have strides of their own
        views = [None if tensor is None else apart(tensor, gap) for tensor in (state, scale, x, B, dt)]
        layers.append(Layer(*views, A, tokens))

    def table(name: str, what: str) -> torch.Tensor:
        tensors = [getattr(layer, name) for layer in layers]
        if tensors[0] is None:
            return torch.zeros(len(layers), dtype=torch.int64)
        return torch.tensor([tensor.data_ptr() if what == "ptrs" else tensor.stride(0) for tensor in tensors])

    names = {"state": "state", "x_cache": "x", "B_cache": "B", "dt_cache": "dt", "state_scale": "scale"}
    call: dict[str, Any] = {
        f"{name}_{what}": table(field, what.removeprefix("slot_"))
        for name, field in names.items()
        for what in ("ptrs", "slot_strides")
    }
    call |= {
        "A_ptrs": table("A", "ptrs"),
        "src_slots": torch.tensor(SOURCES, dtype=torch.int32),
        "dst_slots": torch.tensor(SOURCES if case.place else TARGETS, dtype=torch.int32),
        "ring_start": torch.tensor(starts, dtype=torch.int32),
        "replay_prefix_len": torch.tensor(counts, dtype=torch.int32),
        "active_request_indices": torch.tensor(ACTIVE, dtype=torch.int32),
        "state_dtype": DTYPES[case.state], "input_dtype": DTYPES[case.inputs], "matrixA_dtype": case.A,
        "dim": case.dim, "dstate": case.dstate, "num_heads": case.heads,
        "heads_per_group": case.heads // case.groups, "max_window": case.window, "ring_buffer_len": case.rows,
    }  # fmt: skip
    if case.rounds:
        call |= {"rand_seed": torch.randint(-(2**62), 2**62, (2,), generator=g), "philox_rounds": case.rounds}
    return Made(call, layers, starts, counts)


def run(one: Made, session: Any, operator: Any = serving.materialize_layers) -> None:
    """Make the call; an emulator is told of the memory behind the addresses."""
    for i, layer in enumerate(one.layers):
        for tensor, name in zip(layer[:6], Layer._fields):
            if tensor is not None and hasattr(session, "register"):
                session.register(tensor, f"{name} of layer {i}")
    operator(**one.call)


def verify(case: Case, session: Any, seed: int = 0) -> None:
    """States within a rounding of token-by-token float64; every other byte as it was."""
    one = made(case, seed)
    before = [[tensor.clone() for tensor in layer.memory()] for layer in one.layers]
    first = [(layer.state.clone(), None if layer.scale is None else layer.scale.clone()) for layer in one.layers]
    run(one, session)
    sources, targets = (one.call[name].tolist() for name in ("src_slots", "dst_slots"))
    for i, layer in enumerate(one.layers):
        written = []
        for b in ACTIVE:
            if b < 0 or -1 in (sources[i][b], targets[i][b]):
                continue
            source, to, n = sources[i][b], targets[i][b], one.counts[b]
            written.append(to)
            state, scale = first[i]
            if n == 0:
                same_bits(layer.state[to].view(torch.uint8), state[source].view(torch.uint8), "a copy of bytes")
                if scale is not None:
                    same_bits(layer.scale[to], scale[source])
                continue
            start = rounding.load(state[source], None if scale is None else scale[source]).double()
            want = fold(start, layer.A, *layer.tokens[b])
            got = rounding.load(layer.state[to], None if scale is None else layer.scale[to]).double()
            size = fold(start.abs(), layer.A, *(t.abs() for t in layer.tokens[b]))
            exponent = (layer.A.double()[:, None] * layer.tokens[b][2].T).abs().sum(1)[:, None, None]
            bound = 2.0**-22 * (2 + exponent) * size + unit(want, layer.state.dtype) * (1 if case.rounds else 0.5)
            within(got, want, bound, f"layer {i}, slot {to}, of request {b}")
        assert len(written) >= 2
        for slot in written:  # take back what may change, to compare all the rest
            layer.state[slot] = first[i][0][slot]
            if layer.scale is not None:
                layer.scale[slot] = first[i][1][slot]
        for now, then in zip(layer.memory(), before[i]):
            same_bits(now, then, f"layer {i}")
