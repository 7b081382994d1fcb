"""How checked calls of steps run: what the operators of the gated delta rule have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cute_ssm.ops._calls import Checked
from cute_ssm.ops._gated_delta import config
from cute_ssm.ops._gated_delta.arguments import ROW_BYTES
from cute_ssm.ops._gated_delta.spec import GatedDeltaSpec


def checked_step(
    spec: GatedDeltaSpec,
    operands: tuple[Any, ...],
    units: int,
    check_contents: Callable[[], None],
    reference: Callable[[], object],
) -> Checked:
    """Return how a step with `units` (request, value head) pairs runs; the other parameters are those of `Checked`."""
    return Checked(
        spec,
        operands=operands,
        units=units,
        choose=lambda arch, sm_count: config.choose(spec, arch, units, sm_count),
        check_contents=check_contents,
        reference=reference,
        strict=spec.input_bytes == ROW_BYTES,
    )
