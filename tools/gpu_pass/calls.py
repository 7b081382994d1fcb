"""The calls of a pass, as `gpu_calls` lists them, and what the steps do with calls on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import gpu_calls
import torch
from gpu_calls import Made

from cute_ssm import workloads
from cute_ssm.workloads.maker import moved


def every_mode() -> list[Made]:
    """Return one call of every mode and type of every operator; the plain call of each operator first."""
    return list({made.text(): made for made in [*plain(), *dependent(), *gpu_calls.modes()]}.values())


def plain() -> list[Made]:
    """Return one call of each operator."""
    return [gpu_calls.base(op) for op in workloads.OPERATORS]


def dependent() -> list[Made]:
    """Return small calls that ask for programmatic dependent launch, of operators that have the choice."""
    return [made for made in gpu_calls.dependent() if made.keys == workloads.tiny(made.op)]


def made_on(made: Made, device: str = "cuda") -> workloads.Call:
    """Return a call on a device, on random arguments that are made on the CPU and do not depend on the device."""
    return on_device(made.build(), device)


def on_device(call: workloads.Call, device: torch.device | str = "cuda") -> workloads.Call:
    """Return a call whose tensors have been copied to a device, with their strides of zero."""
    call.arguments = {
        name: moved(value, device) if isinstance(value, torch.Tensor) else value
        for name, value in call.arguments.items()
    }
    return call


def clones(call: workloads.Call) -> dict[str, torch.Tensor]:
    """Return copies of what a call writes."""
    return {name: value.clone() for name, value in call.results().items()}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Return a graph of a call that has run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph
