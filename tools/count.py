"""Count what one call of an operator costs, on the emulator: issue slots, bytes, shared-memory wavefronts, registers.

    python tools/count.py selective_state_update batch=8 nheads=16 dim=64 dstate=128 state_dtype=float16 --json

Keys are the shape names of the operator, ``state_dtype``, ``input_dtype``, ``arch`` and ``config.FIELD``; each
operator's function below lists its own with their defaults, and says what a *unit* is; arguments are random.
Instructions are warp instructions of the PTX; on one large kernel the machine code had 8 % fewer.  ``floor_bytes`` are
the bytes that the call must read once and write once; ``dram_bytes`` the distinct 32-byte sectors read plus those
written, summed over launches: what a cold cache would move; ``l2_bytes`` all sectors moved, repeats included.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

import cute_ssm
import ptxsim
from cute_ssm import tuning

LARGEST = {"int16": 32767, "int8": 127, "float8_e4m3fn": 448}


@dataclass
class Call:
    """A call to count: ``run`` makes it, on arguments that exist already."""

    run: Callable[[], object]
    units: float
    floor_bytes: int


def selective_state_update(
    batch=8, T=1, nheads=16, dim=64, dstate=128, ngroups=1, state_dtype="float16", input_dtype="bfloat16",
    dt_dtype="float32", layout="tied", z=0, update=1, varlen=0, rounding="nearest", intermediates=0,
):  # fmt: skip
    """T tokens for each sequence; slots are a random permutation of a pool.  A unit is one (sequence, head).

    layout: tied (Mamba-2: A, D, dt and dt_bias per head) or dense (Mamba-1).  z: gate by silu(z).  update: write
    states.  varlen: tokens are packed, with cu_seqlens.  rounding: nearest or stochastic (10 rounds of Philox).
    intermediates: the state after every token goes to a buffer.
    """
    inputs, weights, states = getattr(torch, input_dtype), torch.float32, getattr(torch, state_dtype)
    slots, tied, scaled = 2 * batch, layout == "tied", state_dtype in LARGEST
    tokens = (batch * T,) if varlen else (batch, T) if T > 1 else (batch,)

    def per_head(*shape, dtype):
        values = torch.randn(*shape, *(() if tied else (dim,))).to(dtype)
        return values[..., None].expand(*shape, dim) if tied else values

    A = -torch.rand(nheads, *((1, 1) if tied else (dim, dstate)))
    arguments = {
        "x": torch.randn(*tokens, nheads, dim).to(inputs),
        "dt": per_head(*tokens, nheads, dtype=getattr(torch, dt_dtype)),
        "A": A.expand(nheads, dim, dstate),
        "B": torch.randn(*tokens, ngroups, dstate).to(inputs),
        "C": torch.randn(*tokens, ngroups, dstate).to(inputs),
        "D": per_head(nheads, dtype=weights),
        "z": torch.randn(*tokens, nheads, dim).to(inputs) if z else None,
        "dt_bias": per_head(nheads, dtype=weights),
        "out": torch.empty(*tokens, nheads, dim, dtype=inputs),
        "state_batch_indices": torch.randperm(slots)[:batch].int(),
        "cu_seqlens": torch.arange(batch + 1, dtype=torch.int32) * T if varlen else None,
        "intermediate_state_indices": torch.randperm(batch).int() if intermediates else None,
        "rand_seed": torch.tensor([2**40 + 1]) if rounding == "stochastic" else None,
    }
    floor = sum(stored_bytes(t) for t in arguments.values() if t is not None)
    pool = torch.randn(slots, nheads, dim, dstate)
    scale = pool.abs().amax(-1) / LARGEST[state_dtype] if scaled else None
    arguments |= {"state": (pool if scale is None else pool / scale[..., None]).to(states), "state_scale": scale}
    state_bytes = nheads * dim * (dstate * arguments["state"].element_size() + 4 * scaled)  # of one sequence
    floor += batch * state_bytes * (2 if update else 1)
    if intermediates:
        saved = torch.zeros(batch, T, nheads, dim, dstate, dtype=states)
        arguments |= {"intermediate_states_buffer": saved}
        arguments |= {"intermediate_state_scales": torch.zeros(batch, T, nheads, dim) if scaled else None}
        floor += batch * T * state_bytes
    return Call(
        lambda: cute_ssm.selective_state_update(**arguments, dt_softplus=True, disable_state_update=not update),
        units=batch * nheads,
        floor_bytes=floor,
    )


def gated_delta_rule_mtp(
    B=16, T=4, H=16, HV=32, K=128, V=128, state_dtype="float32", input_dtype="bfloat16", verify=1, buffer=0,
):  # fmt: skip
    """T tokens for each request; slots are a random permutation of a pool.  A unit is one (request, value head).

    verify: leave the states as they are.  buffer: the state after every token goes to a buffer.
    """
    inputs, states = getattr(torch, input_dtype), getattr(torch, state_dtype)
    slots = 2 * B
    arguments = {
        "q": torch.randn(B, T, H, K).to(inputs),
        "k": torch.randn(B, T, H, K).to(inputs),
        "v": torch.randn(B, T, HV, V).to(inputs),
        "initial_state": torch.randn(slots, HV, V, K).to(states),
        "initial_state_indices": torch.randperm(slots)[:B].int(),
        "A_log": torch.randn(HV),
        "a": torch.randn(B, T, HV).to(inputs),
        "dt_bias": torch.randn(HV),
        "b": torch.randn(B, T, HV).to(inputs),
        "output": torch.empty(B, T, HV, V, dtype=inputs),
    }
    if buffer:
        arguments["intermediate_states_buffer"] = torch.empty(B, T, HV, V, K, dtype=states)
    images = 1 + (not verify) + (T if buffer else 0)
    floor_bytes = images * B * HV * V * K * states.itemsize
    floor_bytes += sum(stored_bytes(t) for name, t in arguments.items() if not name.startswith(("init", "inter")))
    return Call(
        lambda: cute_ssm.gated_delta_rule_mtp(**arguments, disable_state_update=bool(verify)),
        units=B * HV,
        floor_bytes=floor_bytes + stored_bytes(arguments["initial_state_indices"]),
    )


def selective_scan(
    batch=1, dim=128, length=1024, dstate=16, ngroups=1, state_dtype="float32", input_dtype="bfloat16", z=1, varlen=0,
):  # fmt: skip
    """Sequences of `length` tokens from initial states; slots are a random permutation of a pool.

    A unit is 32 (token, channel, state) steps: an issue slot per unit is one instruction per step.  varlen: sequences
    are packed.
    """
    inputs, slots = getattr(torch, input_dtype), 1 + 2 * batch

    def tokens(*shape):
        sizes = (*shape, batch * length) if varlen else (batch, *shape, length)
        return torch.randn(*sizes).to(inputs)

    states = torch.randn(slots, dim, dstate).to(getattr(torch, state_dtype))
    arguments = {
        "u": tokens(dim),
        "delta": tokens(dim),
        "A": -(0.5 + torch.rand(dim, dstate)),
        "B": tokens(ngroups, dstate),
        "C": tokens(ngroups, dstate),
        "D": torch.randn(dim),
        "z": tokens(dim) if z else None,
        "delta_bias": torch.randn(dim) - 2.0,
        "query_start_loc": torch.arange(batch + 1, dtype=torch.int32) * length if varlen else None,
        "cache_indices": (1 + torch.randperm(slots - 1)[:batch]).int(),
        "has_initial_state": torch.ones(batch, dtype=torch.bool),
        "out": tokens(dim),
    }
    floor = sum(stored_bytes(t) for t in arguments.values() if t is not None)
    return Call(
        lambda: cute_ssm.selective_scan(ssm_states=states, **arguments, delta_softplus=True),
        units=batch * length * dim * dstate / 32,
        floor_bytes=floor + 2 * batch * dim * dstate * states.itemsize,
    )


FUNCTIONS = (selective_state_update, gated_delta_rule_mtp, selective_scan)
OPERATORS = {function.__name__: function for function in FUNCTIONS}


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's distinct elements: dimensions of stride 0 count once."""
    size = tensor.element_size()
    for extent, stride in zip(tensor.shape, tensor.stride()):
        size *= extent if stride else 1
    return size


def count(op: str, keys: dict[str, str], arch: str = "sm_90a") -> dict:
    """Run one call of an operator in the emulator and return what it cost.

    Parameters
    ----------
    op : str
        Name of an operator in ``OPERATORS``.
    keys : dict of str to str
        Shapes and types of the call, and ``config.FIELD`` for overrides of its config.
    arch : str
        Compile target.

    Raises
    ------
    ValueError
        If the operator, or a key, does not exist.
    """
    if op not in OPERATORS:
        raise ValueError(f"op: expected one of {', '.join(OPERATORS)}, got {op!r}")
    function = OPERATORS[op]
    parameters = inspect.signature(function).parameters
    config = {k.removeprefix("config."): int(v) for k, v in keys.items() if k.startswith("config.")}
    shapes = {k: v for k, v in keys.items() if not k.startswith("config.")}
    for key in shapes:
        if key not in parameters:
            raise ValueError(f"{key}: expected one of {', '.join(parameters)}, arch or config.FIELD")
    torch.manual_seed(0)
    call = function(**{k: type(parameters[k].default)(v) for k, v in shapes.items()})
    with ptxsim.emulate(arch=arch, counters=True) as session, tuning.override(**config):
        call.run()
    counters = [launch.counters.as_dict() for launch in session.launches]

    def total(name: str) -> int:
        return sum(c[name] for c in counters)

    classes = {name for c in counters for name in c["instructions"]}
    instructions = {name: sum(c["instructions"].get(name, 0) for c in counters) for name in sorted(classes)}
    slots = instructions.pop("total")
    dram = total("dram_read_bytes") + total("dram_write_bytes")
    l2 = total("l2_read_bytes") + total("l2_write_bytes")
    names = sorted({name for c in counters for name in c["tensors"]})
    wavefronts, excess = total("smem_wavefronts"), total("smem_excess")
    return {
        "op": op,
        "arch": arch,
        "keys": {**{k: p.default for k, p in parameters.items()}, **keys},
        "kernels": [
            {
                "name": kernel.name,
                "registers": kernel.registers,
                "spill_bytes": kernel.spill_bytes,
                "shared_bytes": max(
                    launch.smem_total for launch in session.launches if launch.program.kernel.name == kernel.name
                ),
            }
            for function in session.functions
            for kernel in function.kernels
        ],
        "launches": len(session.launches),
        "grids": [list(launch.grid) for launch in session.launches],
        "units": call.units,
        "issue_slots": slots,
        "issue_slots_per_unit": round(slots / call.units, 2),
        "instructions_per_unit": {name: round(n / call.units, 2) for name, n in instructions.items()},
        "floor_bytes": call.floor_bytes,
        "dram_bytes": dram,
        "l2_bytes": l2,
        "dram_over_floor": round(dram / call.floor_bytes, 4),
        "l2_over_floor": round(l2 / call.floor_bytes, 4),
        "smem_wavefronts": wavefronts,
        "smem_excess_fraction": round(excess / wavefronts, 4) if wavefronts else 0.0,
        "tensors": {
            name: {
                key: sum(c["tensors"][name][key] for c in counters if name in c["tensors"])
                for key in ("dram_read_bytes", "dram_write_bytes", "l2_read_bytes", "l2_write_bytes")
            }
            for name in names
        },
    }


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, count, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("op", choices=OPERATORS)
    parser.add_argument("keys", nargs="*", metavar="key=value")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    keys = dict(item.partition("=")[::2] for item in options.keys)
    arch = keys.pop("arch", "sm_90a")
    try:
        result = count(options.op, keys, arch)
    except ValueError as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:22} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
