"""Peers' Triton kernels by the machine model: compiled here, run in the emulator, replayed like ours.

Needs Triton and the peer's package, not a GPU.  A peer's wrapper is called as it is, on CPU tensors, and launches what
it would on the GPU: vLLM's, the configuration of the tables that vLLM ships for that GPU.  Of `selective_state_update`,
vLLM's form stands for mamba_ssm's, which is the same kernel without tables.  Kernels in CUDA C++ take no part.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bench import peers
from cute_ssm.runtime.companions import require
from cute_ssm.tuner import modelled as by_model

if TYPE_CHECKING:
    import gpumodel

TRITON = {("selective_state_update", "vllm"), ("gated_delta_rule_mtp", "fla")}
TUNED = {"mamba_ssm": "not modelled: vllm's is this kernel, tuned"}
DEVICES = {"H100": "NVIDIA_H100_80GB_HBM3", "H200": "NVIDIA_H200", "B200": "NVIDIA_B200"}  # in the names of tables


@contextlib.contextmanager
def tuned(gpu: gpumodel.Machine, batch: int, state: Any) -> Iterator[None]:
    """Let `peers.vllm_step` find vLLM's kernel, alone, with what its tables say for a GPU and ``batch`` requests.

    A call of fewer requests that stands for a larger one has the configuration of that.
    """
    module = peers.vllm_kernels(DEVICES.get(gpu.name, gpu.name))
    if module is None:
        yield
        return
    from gpumodel.validate.packages import on_cpu

    _, nheads, headdim, dstate = state.shape
    dtype = str(state.dtype).removeprefix("torch.")
    chosen = module.try_get_optimal_ssm_config(headdim, dstate, batch, nheads, dtype, gpu.arch.startswith("sm_10"))
    before = sys.modules.get(peers.VLLM_STEP)
    sys.modules[peers.VLLM_STEP] = module
    try:
        with on_cpu(), module.override_ssm_config(chosen):
            yield
    finally:
        del sys.modules[peers.VLLM_STEP]
        if before is not None:
            sys.modules[peers.VLLM_STEP] = before


def modelled(op: str, keys: dict[str, int | str], gpu: str) -> tuple[dict[str, float], dict[str, str]]:
    """Return the modelled microseconds of a call by peers, and why others are absent."""
    gpumodel = require("gpumodel")
    machine = gpumodel.machine_of(gpu)
    found, absent = {}, {}
    for name, make in peers.PEERS.get(op, {}).items():
        if (op, name) not in TRITON:
            absent[name] = TUNED.get(name, "no Triton kernel: not modelled")
            continue

        def at(size: int | None, limit: int, name=name, make=make) -> gpumodel.Modelled:
            from ptxsim.triton_hook import emulate_triton

            batch = by_model.requests(op, keys)[1]
            if size is None:
                size = min(batch, by_model.largest(op, keys, machine, limit))
            call = by_model.arguments(op, {**keys, by_model.requests(op, keys)[0]: size})
            digits = int("".join(c for c in machine.arch if c.isdigit()))
            vllm = tuned(machine, batch, call.arguments["state"]) if name == "vllm" else contextlib.nullcontext()
            with vllm:
                run = make(call.arguments)
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
