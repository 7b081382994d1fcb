"""Host cost of a cached call: ``python tools/bench/host.py`` prints microseconds, ``--json`` writes results/host.json.

Nothing is launched.  A call in steady state is the operator's Python, one look-up, and one call of a compiled host
function that takes the tensors through TVM-FFI and checks types, shapes and strides as the kernel's entry does; here
that function has the signature of the kernel and an empty body, so that it runs on CPU tensors.  What is missing is the
launch itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import cutlass.cute as cute
import torch
from cutlass.cute.runtime import make_fake_compact_tensor

import cute_ssm
from cute_ssm.ops import selective_state_update as module

RESULTS = Path(__file__).with_name("results") / "host.json"


@cute.jit
def entry(
    state: cute.Tensor, x: cute.Tensor, dt: cute.Tensor, A: cute.Tensor, B: cute.Tensor, C: cute.Tensor,
    D: cute.Tensor, z: cute.Tensor, dt_bias: cute.Tensor, src: cute.Tensor, dst: cute.Tensor, out: cute.Tensor,
    pad_slot_id: cute.Int64, max_ctas: cute.Int32,
):  # fmt: skip
    """The kernel's arguments and nothing else."""


def call_arguments() -> dict:
    """A call with every tensor the operator takes."""
    batch, heads, dim, dstate = 4, 8, 64, 128
    return {
        "state": torch.zeros(8, heads, dim, dstate, dtype=torch.float16),
        "x": torch.zeros(batch, heads, dim, dtype=torch.bfloat16),
        "dt": torch.zeros(batch, heads, dim),
        "A": torch.zeros(heads, dim, dstate),
        "B": torch.zeros(batch, 1, dstate, dtype=torch.bfloat16),
        "C": torch.zeros(batch, 1, dstate, dtype=torch.bfloat16),
        "D": torch.zeros(heads, dim),
        "z": torch.zeros(batch, heads, dim, dtype=torch.bfloat16),
        "dt_bias": torch.zeros(heads, dim),
        "state_batch_indices": torch.arange(batch, dtype=torch.int32),
        "dst_state_batch_indices": torch.arange(batch, dtype=torch.int32),
        "out": torch.zeros(batch, heads, dim, dtype=torch.bfloat16),
    }


def microseconds(function, repeats=30, inner=2000) -> float:
    """Median over repeats of the mean time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            function()
        times.append((time.perf_counter() - start) / inner * 1e6)
    return statistics.median(times)


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args(argv)
    call = call_arguments()
    order = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state_batch_indices", "dst_state_batch_indices", "out")
    dtypes = {torch.float32: cute.Float32, torch.float16: cute.Float16, torch.bfloat16: cute.BFloat16, torch.int32: cute.Int32}
    fakes = [
        make_fake_compact_tensor(
            dtypes[t.dtype],
            [cute.sym_int() for _ in t.shape],
            stride_order=tuple(reversed(range(t.dim()))),
            memspace=cute.AddressSpace.generic,  # the host's memory
        )
        for t in (call[name] for name in order)
    ]
    function = cute.compile(entry, *fakes, cute.Int64(0), cute.Int32(0), options="--enable-tvm-ffi")
    raw = function.__tvm_ffi_object__()
    tensors = [call[name] for name in order]
    raw(*tensors, -1, 528)  # raises if it would refuse, and calls then took the long way

    class Keys(dict):
        def get(self, key, default=None):
            self[key] = (raw, 528)
            return None

    memory, module._plans = module._plans, Keys()
    try:
        cute_ssm.selective_state_update(**call, dt_softplus=True)  # learn the key
        module._plans = dict(module._plans)
        rows = {
            "selective_state_update, 12 tensors, cached": microseconds(
                lambda: cute_ssm.selective_state_update(**call, dt_softplus=True)
            ),
            "of which the compiled entry, without a launch": microseconds(lambda: raw(*tensors, -1, 528)),
        }
    finally:
        module._plans = memory
    for name, value in rows.items():
        print(f"{value:6.2f} us  {name}")
    if options.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        RESULTS.write_text(json.dumps({"microseconds": rows, "cpu": platform.processor(), "versions": versions}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
