"""`serving.materialize_gated_delta`: against token-by-token float64 on reference and emulator, and through pools."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import replay_cases
import tensor_sums
import torch
from bits import same_bits, same_memory
from cases import vary
from gdn_cases import DTYPES, NAN, within
from memory import copy

from cute_ssm import serving
from cute_ssm.ops.materialize_gated_delta.spec import MaterializeGatedDeltaSpec

RINGS = ("k_cache", "v_cache", "g_cache", "beta_cache")
TAKEN = ("initial_state", *RINGS, "ring_start", "prev_num_accepted_tokens", "use_qk_l2norm", "window")


@dataclass(frozen=True)
class Case(replay_cases.Case):
    """A call; `counts` of the pending tokens are folded, and repeat; None: all."""

    batch: int = 5
    K: int = 64
    pending: tuple[int, ...] = (5, 16, 0, 13, 8)
    counts: tuple[int, ...] | None = (5, 9, 0, 1, 0)
    to: str | None = None  # type of another pool
    place: bool = False  # fold into the slot that is read


def arguments(case: Case, seed: int = 0) -> dict:
    """Random arguments; whatever is not folded is NaN, pending tokens behind those that are included."""
    made = replay_cases.arguments(case, seed)
    src = made["initial_state_indices"]
    call = {name: made[name] for name in TAKEN}
    slots, length = call["initial_state"].shape[0], call["k_cache"].shape[2]
    counts = None if case.counts is None else [case.counts[i % len(case.counts)] for i in range(case.batch)]
    for i, slot in enumerate(src.tolist()):
        if slot >= 0 and counts is not None:
            last = case.pending[i % len(case.pending)]
            rows = (call["ring_start"][slot] + torch.arange(counts[i], last)) % length
            for name in RINGS:
                call[name][slot][:, rows] = NAN
    for i, slot in enumerate(src.tolist()):
        if slot >= 0 and counts is not None and not counts[i] and not case.to:  # any bytes, of which some are NaN
            call["initial_state"][slot].view(torch.uint8).random_(256, generator=torch.Generator().manual_seed(seed))
    free = [slot for slot in range(slots) if slot not in src.tolist()]
    if case.place:
        dst = src.clone()
    elif case.to:
        dst = torch.arange(case.batch).flip(0)
        shape = (case.batch + 2, *call["initial_state"].shape[1:3], case.K + 8)
        call["out"] = torch.full(shape, NAN, dtype=DTYPES[case.to])[..., : case.K]
    else:
        dst = torch.tensor((free + [-1] * case.batch)[: case.batch])
    call |= {"state_batch_indices": src, "dst_state_batch_indices": dst.to(src.dtype)}
    if counts is not None:
        call["num_tokens"] = torch.tensor(counts, dtype=src.dtype)
    return call


def fold(call: dict, slot: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """The state of a slot after its first tokens, head by head and token by token."""
    state = call["initial_state"][slot].to(dtype)
    ratio, length = state.shape[0] // call["k_cache"].shape[1], call["k_cache"].shape[2]
    heads = []
    for h, S in enumerate(state):
        for t in range(count):
            row = (int(call["ring_start"][slot]) + t) % length
            k, v = call["k_cache"][slot, h // ratio, row].to(dtype), call["v_cache"][slot, h, row].to(dtype)
            if call["use_qk_l2norm"]:
                k = k / torch.sqrt((k * k).sum() + 1e-6)
            S = torch.exp(call["g_cache"][slot, h, row].to(dtype)) * S
            S = S + call["beta_cache"][slot, h, row].to(dtype) * torch.outer(v - S @ k, k)
        heads.append(S)
    return torch.stack(heads)


def losses(call: dict, slot: int, count: int) -> tensor_sums.Loss | None:
    """What tensor cores lose of `fold`; None: nothing."""
    sums = tensor_sums.in_use()
    if not sums.any():
        return None
    state = call["initial_state"][slot].double()
    rows = (int(call["ring_start"][slot]) + torch.arange(count)) % call["k_cache"].shape[2]
    keys, *rest = (call[name][slot][:, rows].double() for name in RINGS)
    keys = keys.repeat_interleave(len(state) // len(keys), dim=0)
    return tensor_sums.gated_delta_fold(sums, state, keys, *rest, call["use_qk_l2norm"])


def verify(case: Case, seed: int = 0) -> dict:
    """States within 1.5 times the errors of float32, all other bytes as they were."""
    call = arguments(case, seed)
    before = copy(call)
    check(case, before, call, serving.materialize_gated_delta(**call))
    return call


def check(case: Case, before: dict, call: dict, got: torch.Tensor) -> None:
    """What a call has returned and written; ``before`` is used up."""
    name = "out" if case.to else "initial_state"
    assert got is call[name]
    done = 0
    slots = zip(call["state_batch_indices"].tolist(), call["dst_state_batch_indices"].tolist())
    for i, (source, to) in enumerate(slots):
        if source < 0 or to < 0:
            continue
        count = int(before["prev_num_accepted_tokens"][source] if case.counts is None else before["num_tokens"][i])
        result = got[to]
        if count == 0 and result.dtype == before["initial_state"].dtype:
            same_bits(result.view(torch.uint8), before["initial_state"][source].view(torch.uint8), "bytes")
        else:
            want, rounded = (fold(before, source, count, dtype) for dtype in (torch.float64, torch.float32))
            lost = losses(before, source, count)
            within(result, rounded.to(result.dtype), want, (-2, -1), f"row {i}, {count} tokens", lost)
        before[name][to] = result
        done += 1
    assert done >= 3
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            same_memory(call[key], value, f"{key} changed where it must not")


BASE = Case()


FEW = [
    BASE,
    Case(
        state="bf16", counts=(16, 3, 8, 9, 0), K=128, V=128, ratio=1, pending=(16, 3, 8, 16, 0), io="f16", strided=True
    ),
    Case(to="f16", state="f32", window=40, pending=(40, 33, 0, 7, 39), counts=(40, 8, 0, 7, 17), l2norm=False),
]
MANY = vary(
    BASE, state=("bf16", "f16"), io=("f16",), K=(128, 256), V=(128, 256), heads=(2,), ratio=(1, 4), window=(1, 5, 64),
    counts=(None,), indices=(torch.int64,), to=("f32", "bf16"), place=(True,), l2norm=(False,), strided=(True,),
    regime=("slow", "fast", "cut", "extreme", "collinear", "zero"),
)  # fmt: skip


def fitted(case: Case) -> Case:
    """With no more pending tokens than the window."""
    most = [min(n, case.window) for n in case.pending]
    counts = None if case.counts is None else tuple(min(n, m) for n, m in zip(case.counts, most))
    return dataclasses.replace(case, pending=tuple(most), counts=counts)


SPEC = MaterializeGatedDeltaSpec("float32", "float32", "bfloat16", 128, 128, 16, True, "int32", "int32", "int32")
