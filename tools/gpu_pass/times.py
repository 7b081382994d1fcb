"""Which calls a pass times, and in what order; `bench.circumstances` says how."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench import cases, run
from bench.cases import Case
from bench.circumstances import Clockwork, Effort
from bench.outputs import commit

from cute_ssm import workloads
from gpu_pass import records
from gpu_pass.records import Item

BATCHES = (64, 1, 16, 512)  # in the order of interest
REHEARSAL = Effort(samples=1, warm_up=0, sets=2, copy_bytes=1 << 16)
LINES = "times.jsonl"


def declared(first: bool, rehearse: bool = False) -> Iterator[tuple[Case, int]]:
    """Yield cases and batches: of each operator the first case, or all others; all cases at one batch before the next.

    Where a case's usual batches lack one, it is left out there; a scan has few sequences of many tokens.  To rehearse,
    small calls stand for those of models: of each operator one request, then of one operator three.
    """
    if rehearse:
        batch = 1 if first else 3
        for op in workloads.OPERATORS if first else workloads.OPERATORS[:1]:
            keys = tuple((k, v) for k, v in workloads.small(op).items() if k != workloads.batch_key(op))
            yield Case("small", op, keys, (batch,)), batch
        return
    chosen = []
    for op in workloads.OPERATORS:
        of_op = list(cases.declared([op]))
        chosen += of_op[:1] if first else of_op[1:]
    for batch in BATCHES:
        for case in chosen:
            usual = case.batches
            if batch in usual:
                yield case, batch
            elif max(usual) < batch and batch == next((b for b in BATCHES if b > max(usual)), None):
                yield case, max(usual)


def items(out: Path, first: bool, rehearse: bool = False) -> list[Item]:
    """Return the calls to time; each writes its line when it is done."""
    device = torch.device("cuda", torch.cuda.current_device())
    clockwork: list[Clockwork] = []
    about, now = run.versions(), commit()
    gated: dict[tuple[str, str], str] = {}

    def one(case: Case, batch: int) -> dict[str, Any]:
        if not clockwork:
            clockwork.append(Clockwork(device, REHEARSAL if rehearse else Effort()))
        key = (case.op, case.name)
        if key not in gated:
            gated[key] = "its results were found wrong before"
            run.gate(case, device)
            gated[key] = ""
        if gated[key]:
            raise RuntimeError(gated[key])
        line = clockwork[0].line(case, batch)
        records.append(out / LINES, {**line, "versions": about, "commit": now})
        run.show(line)
        return {"us": line["us"]["median"], "of_copy": line["of_copy"]}

    return [
        Item(f"{case.op} {case.name} batch {batch}", lambda c=case, b=batch: one(c, b))
        for case, batch in declared(first, rehearse)
    ]
