"""From declared calls, or from a file of specs, to the kernels that they run; nothing is compiled or computed here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from cute_ssm import arch as archs
from cute_ssm import runtime, serving, workloads
from cute_ssm.arch import Arch
from cute_ssm.errors import UnsupportedArchError, UnsupportedSpecError, describe
from cute_ssm.ops import operators
from cute_ssm.runtime import registry
from cute_ssm.spec import Config, Spec
from cute_ssm.workloads import Keys, Workload
from cute_ssm.workloads.maker import dtype

Kernel = tuple[Spec, Config, Arch]
FORM = 'a list of {"op", "keys", "batches"} and of {"spec", "config", "arch"} as `cache ls --json` prints them'


def of_call(op: str, keys: Keys, arch: Arch, sm_count: int | None = None) -> list[Kernel]:
    """Return the kernels that one call runs, in order.

    Parameters
    ----------
    op, keys
        As for `workloads.build`.
    arch, sm_count
        Target, and number of SMs of the GPU if not that of the target's reference board.
    """
    call = workloads.build(op, keys, fill=False)
    with runtime.planned(arch, sm_count) as plan:
        call.run()
    return plan.kernels


def around(workload: Workload, arch: Arch, sm_count: int | None = None) -> list[Kernel]:
    """Return the kernels that an engine runs around declared calls, with 32-bit indices: those of its
    `serving.StatePool`, and for Mamba-2 that of FlashInfer's fold on the same states."""
    pool = workloads.pool(workload.op, dict(workload.keys))
    if pool is None:
        return []
    one = torch.full((1,), pool.allocate(), dtype=torch.int32)
    with runtime.planned(arch, sm_count) as plan:
        pool.commit(one, torch.zeros_like(one))
        if pool.state_name == "state":  # that of Mamba-2
            for batch in workload.batches:
                pool.build_work_items(torch.full((batch,), pool.pad_slot_id, dtype=torch.int32))
            A = torch.zeros(pool.state.shape[2], 1, 1).expand(pool.state.shape[2:])
            for count in (None, one):
                pool.materialize([A], one, one, num_tokens=count)
            _fold_of_layers({**workloads.parameters(workload.op), **dict(workload.keys)})
        else:
            for count in (None, one):
                pool.materialize(None, one, one, num_tokens=count)
    return plan.kernels


def _fold_of_layers(keys: Keys) -> None:
    """Call FlashInfer's fold of the rings of all layers."""
    nheads, dim, dstate, ngroups, rows = (int(keys[name]) for name in ("nheads", "dim", "dstate", "ngroups", "W"))
    states, inputs = dtype(str(keys["state_dtype"])), dtype(str(keys["input_dtype"]))
    stochastic = keys["rounding"] == "stochastic"
    slots = torch.zeros(1, dtype=torch.int32)
    table, stride = torch.full((1,), 16), torch.full((1,), nheads * max(rows, dim) * max(dim, dstate))
    serving.materialize_layers(
        table, stride, table, stride, table, stride, table, stride, table, table, stride, slots[None], slots[None],
        slots, slots, slots - 1,
        state_dtype=states, input_dtype=inputs, matrixA_dtype=torch.float32, dim=dim, dstate=dstate, num_heads=nheads,
        heads_per_group=nheads // ngroups, max_window=rows, ring_buffer_len=rows,
        rand_seed=table if stochastic else None, philox_rounds=10 * stochastic,
    )  # fmt: skip


def of_workloads(declared: Iterable[Workload], targets: Sequence[Arch], sm_count: int | None = None) -> list[Kernel]:
    """Return the distinct kernels of declared calls, and of what is `around` them, for some targets."""
    found: list[Kernel] = []
    for workload in declared:
        for arch in targets:
            for keys in workload.calls():
                found += of_call(workload.op, keys, arch, sm_count)
            found += around(workload, arch, sm_count)
    return list(dict.fromkeys(found))


def read(
    source: str, targets: Sequence[Arch], batches: Sequence[int] | None = None, sm_count: int | None = None
) -> list[Kernel]:
    """Return the distinct kernels of a model, of all models ("all"), or of a file of specs.

    Parameters
    ----------
    source : str
        Name of a model, or path of a file with `FORM`.
    targets : sequence of Arch
        Compile targets; an entry that names its target is for that one alone.
    batches : sequence of int, optional
        Numbers of requests, for calls that do not list their own.
    sm_count : int, optional
        As for `of_call`.

    Raises
    ------
    ValueError
        Neither a model nor a file, or an entry of the file means nothing; the message says which.
    """
    if source == "all":
        return of_workloads(
            (w for op in workloads.OPERATORS for w in workloads.of_operator(op, batches)), targets, sm_count
        )
    path = Path(source)
    if source in workloads.models():
        return of_workloads(workloads.of_model(source, batches), targets, sm_count)
    if not path.is_file():
        expected = f"a file, all, or one of {', '.join(workloads.models())}"
        raise ValueError(describe("specs", expected, f"{source!r}, which is none of them"))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None
    if not isinstance(content, list):
        raise ValueError(describe(source, FORM, type(content).__name__))
    found: list[Kernel] = []
    for position, entry in enumerate(content):
        try:
            found += _entry(entry, targets, batches, sm_count) if "op" in entry else of_entry(entry, targets)
        except (KeyError, TypeError, ValueError, AttributeError, UnsupportedArchError, UnsupportedSpecError) as error:
            raise ValueError(f"{source}, entry {position}: expected {FORM}: {type(error).__name__}: {error}") from None
    return list(dict.fromkeys(found))


def as_entry(spec: Spec, config: Config, arch: Arch) -> dict[str, Any]:
    """Return a kernel as an entry of a file of specs."""
    return {
        "spec": {"type": type(spec).__name__, **dataclasses.asdict(spec)},
        "config": {"type": type(config).__name__, **dataclasses.asdict(config)},
        "arch": arch.name,
    }


def _entry(entry: Any, targets: Sequence[Arch], batches: Sequence[int] | None, sm_count: int | None) -> list[Kernel]:
    declared = workloads.workload(entry["op"], entry.get("keys", {}), entry.get("batches", batches))
    return of_workloads([declared], targets, sm_count)


def of_entry(entry: dict[str, Any], targets: Sequence[Arch] = ()) -> list[Kernel]:
    """Return the kernels of an entry that `as_entry` made, or of a kernel's record: one, or one for each target."""
    spec = _made(entry["spec"], {kind.__name__: kind for kind in registry.KERNELS})
    config = _made(entry["config"], _configs())
    spec.check()
    chosen = [archs.by_name(entry["arch"])] if "arch" in entry else list(targets)
    return [(spec, config, arch) for arch in chosen]


def _made(fields: dict[str, Any], kinds: dict[str, type[Any]]) -> Any:
    fields = dict(fields)
    name = fields.pop("type")
    if name not in kinds:
        raise ValueError(describe("type", f"one of {', '.join(kinds)}", repr(name)))
    return kinds[name](**fields)


def _configs() -> dict[str, type[Config]]:
    known = [operator.config_class for operator in operators()]
    return {kind.__name__: kind for kind in (*known, *Config.__subclasses__())}  # those of registered kernels, too
