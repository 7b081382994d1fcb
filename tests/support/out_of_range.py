"""Calls of which one argument holds what it must not, row by row: such rows stay untouched, all others are right.

The host would refuse these calls, as it looks at what tensors on the CPU hold; on a GPU it does not.  `unchecked` turns
that off, so that kernels are alone with their arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from bits import same_memory
from memory import copy

from cute_ssm.ops import _slot_rows
from cute_ssm.ops.build_work_items import arguments as _work_items_arguments
from cute_ssm.ops.checkpointing_ssu import arguments as _checkpointing_arguments
from cute_ssm.ops.commit import arguments as _commit_arguments
from cute_ssm.ops.gated_delta_rule_mtp import arguments as _mtp_arguments
from cute_ssm.ops.gated_delta_rule_replay import arguments as _replay_arguments
from cute_ssm.ops.selective_scan import operator as selective_scan
from cute_ssm.ops.selective_state_update import arguments as _step_arguments

Parts = Iterable[tuple[str, Any]]  # (name of a tensor that is written, index of a part of it)


def unchecked(monkeypatch) -> None:
    """Have operators look at no contents of tensors, as on a GPU."""
    steps = (_step_arguments, _checkpointing_arguments, _mtp_arguments, _replay_arguments)
    for module in (*steps, _commit_arguments, _work_items_arguments):
        monkeypatch.setattr(module, "check_contents", lambda *_: None)
    monkeypatch.setattr(selective_scan, "plan_on_cpu", lambda *_: [])
    monkeypatch.setattr(_slot_rows.SlotRows, "read", lambda *_: [])


def outside(bound: int, dtype: torch.dtype, right: int = 0) -> list[int]:
    """Numbers that are no index below `bound`; of 64 bits, also some that 32 bits would take for `right`."""
    few = [-(2**31), -1000, -3, -1, bound, bound + 1, 2**31 - 1]
    many = [2**32 + right, right - 2**32, 2**63 - 1, -(2**63)]
    return few + many if dtype is torch.int64 else few


def swap(call: dict, tensors: Iterable[str], indices: Iterable[str], one: int, other: int) -> None:
    """Exchange two slots of a call, and their numbers wherever they are named."""
    for name in tensors:
        if call.get(name) is not None:
            call[name][[one, other]] = call[name][[other, one]]
    for name in indices:
        if call.get(name) is not None:
            values = call[name].clone()
            call[name][values == one], call[name][values == other] = other, one


class Sweep:
    """A right call, run once, to which calls are compared that differ from it in some entries of an argument.

    Parameters
    ----------
    run
        Runs the operator, in place.
    call
        Right arguments.
    """

    def __init__(self, run: Callable[[dict], Any], call: dict):
        self.run, self.call, self.right = run, call, copy(call)
        run(self.right)

    def check(self, name: str, changes: dict[Any, int], owned: Callable[[Any], Parts]) -> None:
        """Run with new values, by position, in the argument `name`.

        `owned(position)` are the parts that a changed entry keeps from being written; all else must be as in the right
        call.
        """
        wrong, want = copy(self.call), copy(self.right)
        for position, value in changes.items():
            wrong[name][position] = value
        before = copy(wrong)
        self.run(wrong)
        for position in changes:
            want[name][position] = before[name][position]
            for tensor, part in owned(position):
                want[tensor][part] = before[tensor][part]
        for tensor, value in want.items():
            if isinstance(value, torch.Tensor):
                same_memory(wrong[tensor], value, f"{name} with {changes}: {tensor}")


def check(run: Callable[[dict], Any], call: dict, name: str, changes: dict[Any, int], owned: Any) -> None:
    """Run one such comparison; see `Sweep`."""
    Sweep(run, call).check(name, changes, owned)
