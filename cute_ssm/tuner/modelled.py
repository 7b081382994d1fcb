"""Times of declared calls by the machine model `gpumodel`: the objective of a tuner where there is no GPU.

`gpumodel` times launches that it is given; here are the calls, the configs they get, and how large calls are continued
from small ones.  Both `gpumodel` and the emulator `ptxsim`, which it records, are packages of their own: `require`
says how to install them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from cute_ssm import arch as archs
from cute_ssm import runtime, tuning, workloads
from cute_ssm.errors import describe
from cute_ssm.runtime.companions import require

if TYPE_CHECKING:
    from gpumodel import Machine, Modelled

EXACT_BYTES = 1 << 20  # that an SM moves and that are replayed; more are extrapolated
EXACT_TOKENS = 256  # of a sequence that are replayed, for operators that take long ones
SMALL = 1 << 24  # bytes of arguments that get values


def arguments(op: str, keys: Mapping[str, int | str], seed: int = 0) -> workloads.Call:
    """Return a declared call whose small inputs are random; states, histories and large inputs are zero.

    No floating-point tensor is left uninitialised: kernels take a longer path where a value is not finite.
    """
    call = workloads.build(op, keys, fill=False, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, value in call.arguments.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        stored = value.as_strided([n if s else 1 for n, s in zip(value.shape, value.stride())], value.stride())
        if name in call.written or value.itemsize == 1 or value.numel() * value.itemsize >= SMALL:
            stored.zero_()
        else:
            values = torch.randn(stored.shape, generator=generator)
            stored.copy_(-values.abs() if name == "A" else values)
    return call


def time_call(
    call: workloads.Call, machine: str | Machine, fields: Mapping[str, int | str], timeline: bool = False
) -> Modelled:
    """Model a call as it is, with ``fields`` of its configs overridden; see ``gpumodel.time_call``."""
    model = require("gpumodel")
    with tuning.override(**fields):
        return model.time_call(call.run, machine, call.floor_bytes, timeline)


def chosen(op: str, keys: Mapping[str, int | str], machine: Machine) -> dict[str, Any]:
    """Fields of the configs that a call would get on a machine."""
    call = workloads.build(op, keys, fill=False)
    with runtime.planned(archs.by_name(machine.arch), machine.sms) as plan:
        call.run()
    return {name: value for _, config, _ in plan.kernels for name, value in dataclasses.asdict(config).items()}


def replayed(
    op: str, keys: Mapping[str, int | str], machine: Machine, config: Mapping[str, int | str], exact: int = EXACT_BYTES
) -> tuple[workloads.Call, dict[str, Any]]:
    """A declared call, or the largest that is replayed whole, and the config fields that the declared one would get."""
    key, batch = requests(op, keys)
    large = largest(op, keys, machine, exact)
    if batch <= large:
        return arguments(op, keys), dict(config)
    with tuning.override(**config):
        fields = chosen(op, keys, machine)
    return arguments(op, {**keys, key: large}), fields


def requests(op: str, keys: Mapping[str, int | str]) -> tuple[str, int]:
    """The parameter that holds a call's number of requests, and that number."""
    key = workloads.batch_key(op)
    value = keys.get(key, workloads.parameters(op)[key])
    try:
        return key, int(value)
    except ValueError:
        raise ValueError(describe(key, "a number of requests", repr(value))) from None


def largest(op: str, keys: Mapping[str, int | str], machine: Machine, exact: int = EXACT_BYTES) -> int:
    """Requests of the largest call that is replayed whole."""
    one, two = (floor_bytes(op, keys, size) for size in (1, 2))
    return max(2, int(exact * machine.sms / (two - one)))


def floor_bytes(op: str, keys: Mapping[str, int | str], size: int) -> int:
    """Bytes that a call with ``size`` requests must move."""
    return workloads.build(op, {**keys, workloads.batch_key(op): size}, fill=False).floor_bytes


def time_op(
    op: str,
    keys: Mapping[str, int | str],
    machine: str | Machine = "H200",
    config: Mapping[str, int | str] | None = None,
    exact: int = EXACT_BYTES,
) -> Modelled:
    """Model a declared call of any size.

    Parameters
    ----------
    op, keys
        As for `cute_ssm.workloads.build`.
    machine : str or Machine
        A name of ``gpumodel.MACHINES``, such as ``"H200"``, or a target.
    config : mapping, optional
        Fields of the config to override.
    exact : int
        Bytes per SM up to which a call is replayed whole.  A larger one is in its steady state: with its config, calls
        with as many requests as make ``exact`` bytes per SM and half of them are replayed, and their times continued in
        a straight line, though never faster than memory.  ``exact`` is doubled until both fill the GPU.
        Of operators on long sequences, `EXACT_TOKENS` tokens and half of them are replayed, likewise.
    """
    machine = require("gpumodel").machine_of(machine)
    long = int(keys.get("length", workloads.parameters(op).get("length", 0)))
    if long > EXACT_TOKENS:
        return _continued(op, keys, machine, config or {}, exact, long)

    def at(size: int | None, limit: int) -> Modelled:
        call, fields = replayed(op, keys, machine, config or {}, limit)
        if size is not None:
            call = arguments(op, {**keys, workloads.batch_key(op): size})
        return time_call(call, machine, fields)

    return scaled(at, op, keys, machine, exact)


def _continued(
    op: str, keys: Mapping[str, int | str], machine: Machine, config: Mapping[str, int | str], exact: int, long: int
) -> Modelled:
    """Model a call on long sequences from shorter ones: tokens are a loop."""
    with tuning.override(**config):
        fields = chosen(op, keys, machine)
    half, whole = (
        time_op(op, {**keys, "length": length}, machine, fields, exact) for length in (EXACT_TOKENS // 2, EXACT_TOKENS)
    )
    total = floor_bytes(op, keys, requests(op, keys)[1])
    roof = machine.microseconds(total / machine.dram_rate)
    us = whole.us + (whole.us - half.us) / (EXACT_TOKENS // 2) * (long - EXACT_TOKENS)
    least = machine.microseconds(total / machine.dram_peak)
    return dataclasses.replace(whole, us=max(us, least), bytes=total, roof_us=roof, exact=False)


def scaled(
    at: Callable[[int | None, int], Modelled], op: str, keys: Mapping[str, int | str], machine: Machine,
    exact: int = EXACT_BYTES,
) -> Modelled:  # fmt: skip
    """Model a call of any size from calls that are replayed whole.

    ``at(size, limit)`` models the call with ``size`` requests; or, if that is None, as many as it has or make ``limit``
    bytes per SM, whichever is less.
    """
    batch = requests(op, keys)[1]
    while True:
        large = largest(op, keys, machine, exact)
        second = at(None, exact)
        if batch <= large:
            return second
        small = large // 2
        first = at(small, exact)
        if require("gpumodel").is_steady(first, second, machine):
            break
        exact *= 2
    total = floor_bytes(op, keys, batch)
    roof = machine.microseconds(total / machine.dram_rate)
    least = machine.microseconds(total / machine.dram_peak)
    moved = least * (batch - large) / batch
    us = second.us + max((second.us - first.us) / (large - small) * (batch - large), moved)
    return dataclasses.replace(second, us=max(us, least), bytes=total, roof_us=roof, exact=False)
