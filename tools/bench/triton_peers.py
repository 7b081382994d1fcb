"""Peers' Triton kernels by the machine model: compiled here, run in the emulator, replayed like ours.

Needs Triton and the peer's package, not a GPU.  A peer's wrapper is called as it is, on CPU tensors, and launches what
its heuristics choose.  Kernels in CUDA C++ take no part.
"""

from __future__ import annotations

from bench import peers
from cute_ssm.runtime.companions import require
from cute_ssm.tuner import modelled as by_model

TRITON = {("selective_state_update", "mamba_ssm"), ("gated_delta_rule_mtp", "fla")}


def modelled(op: str, keys: dict[str, int | str], gpu: str) -> tuple[dict[str, float], dict[str, str]]:
    """Return the modelled microseconds of a call by peers, and why others are absent."""
    gpumodel = require("gpumodel")
    machine = gpumodel.machine_of(gpu)
    found, absent = {}, {}
    for name, make in peers.PEERS.get(op, {}).items():
        if (op, name) not in TRITON:
            absent[name] = "no Triton kernel: not modelled"
            continue

        def at(size: int | None, limit: int, make=make) -> gpumodel.Modelled:
            from ptxsim.triton_hook import emulate_triton

            if size is None:
                size = min(by_model.requests(op, keys)[1], by_model.largest(op, keys, machine, limit))
            call = by_model.arguments(op, {**keys, by_model.requests(op, keys)[0]: size})
            run = make(call.arguments)
            digits = int("".join(c for c in machine.arch if c.isdigit()))
            with emulate_triton(arch=digits, **gpumodel.sampling(machine)) as session:
                run()
            return gpumodel.time_session(session, machine, call.floor_bytes)

        try:
            found[name] = by_model.scaled(at, op, keys, machine).us
        except (peers.Absent, ImportError) as reason:
            absent[name] = str(reason)
        except Exception as error:  # a peer that the emulator cannot run costs only itself
            absent[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return found, absent
