"""Host cost of a cached call: ``python tools/bench/host.py`` prints microseconds, and writes them to ``--out FILE``.

The committed files are results/host.json and, of ``--gpu``, results/host-gpu.json.

On a GPU (``--gpu``), for every operator: what a call costs the host with its launch, the replay of a CUDA graph of one
call, and a call inside ``torch.compile``; the bits of all three are compared first.

Calls are made without grad mode, as engines make them; with it on, a look at each tensor's ``requires_grad`` is added.
Without a GPU, nothing is launched.  A call in steady state is the operator's Python, one look-up, and one call of a
compiled host function that takes the tensors through TVM-FFI and checks types, shapes and strides as the kernel's entry
does; here that function has the signature of the kernel and an empty body, so that it runs on CPU tensors.  What is
missing is the launch itself.
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
from cute_ssm import workloads
from cute_ssm.ops.selective_state_update import operator as module
from cute_ssm.ops.selective_state_update.arguments import TABLE

DTYPES = {
    torch.float32: cute.Float32,
    torch.float16: cute.Float16,
    torch.bfloat16: cute.BFloat16,
    torch.int8: cute.Int8,
    torch.int32: cute.Int32,
    torch.int64: cute.Int64,
}
QUEUED = 200  # calls between two waits for the GPU: fewer than a stream holds


Optional = cute.Tensor | None


@cute.jit
def entry(
    state: cute.Tensor, x: cute.Tensor, dt: cute.Tensor, A: cute.Tensor, B: cute.Tensor, C: cute.Tensor,
    D: Optional, z: Optional, dt_bias: Optional, out: cute.Tensor, state_scale: Optional, src: Optional, dst: Optional,
    accepted: Optional, cu_seqlens: Optional, saved: Optional, saved_rows: Optional, saved_scale: Optional,
    rand_seed: Optional, pad_slot_id: cute.Int64, max_tokens: cute.Int32, max_ctas: cute.Int32,
):  # fmt: skip
    """The kernel's arguments and nothing else."""


def one_token() -> dict:
    """A call of one token per sequence, with slots to read and slots to write."""
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


def speculative() -> dict:
    """A call with packed tokens, a table of slots, quantised states and stochastic rounding."""
    call, tokens, batch = one_token(), 12, 4
    for name in ("x", "dt", "B", "C", "z", "out"):
        call[name] = torch.zeros(tokens, *call[name].shape[1:], dtype=call[name].dtype)
    table = torch.zeros(batch, 4, dtype=torch.int32)
    return {
        **call,
        "state": call["state"].to(torch.int8),
        "state_scale": torch.zeros(call["state"].shape[:3]),
        "state_batch_indices": table,
        "dst_state_batch_indices": table,
        "num_accepted_tokens": torch.ones(batch, dtype=torch.int32),
        "cu_seqlens": torch.arange(batch + 1, dtype=torch.int32) * 3,
        "rand_seed": torch.zeros(1, dtype=torch.int64),
        "cache_steps": 4,
    }


def fake(tensor: torch.Tensor | None):
    """A tensor as the compiler sees it; None stays None."""
    if tensor is None:
        return None
    sizes = [cute.sym_int() for _ in tensor.shape]
    order = tuple(reversed(range(tensor.dim())))
    space = cute.AddressSpace.generic  # the host's memory
    return make_fake_compact_tensor(DTYPES[tensor.dtype], sizes, stride_order=order, memspace=space)


@torch.no_grad()
def measure(call: dict) -> tuple[int, float, float]:
    """(tensors, microseconds of the operator, microseconds of its compiled entry) of a call in steady state."""
    tensors = [call.get(name) for name in TABLE.tensors]
    scalars = (cute.Int64(0), cute.Int32(0), cute.Int32(0))
    function = cute.compile(entry, *map(fake, tensors), *scalars, options="--enable-tvm-ffi")
    raw = function.__tvm_ffi_object__()
    raw(*tensors, -1, 4, 528)  # raises if it would refuse, and calls then took the long way

    class Keys(dict):
        def get(self, key, default=None):
            self[key] = (raw, (4, 528))
            return self[key]

    memory, module._path.plans = module._path.plans, Keys()
    try:
        cute_ssm.selective_state_update(**call, dt_softplus=True)  # learn the key
        module._path.plans = dict(module._path.plans)
        cached = microseconds(lambda: cute_ssm.selective_state_update(**call, dt_softplus=True))
    finally:
        module._path.plans = memory
    given = sum(tensor is not None for tensor in tensors)
    return given, cached, microseconds(lambda: raw(*tensors, -1, 4, 528))


def microseconds(function, repeats=30, inner=2000) -> float:
    """Median over repeats of the mean time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            function()
        times.append((time.perf_counter() - start) / inner * 1e6)
    return statistics.median(times)


def restored(call: workloads.Call, before: dict[str, torch.Tensor], way) -> dict[str, torch.Tensor]:
    """What a call writes if it is made in some way, from the same state."""
    for name, value in call.results().items():
        value.copy_(before[name])
    way()
    torch.cuda.synchronize()
    return {name: value.clone() for name, value in call.results().items()}


def same_bits(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    """Whether two calls have written the same bytes."""
    return all(torch.equal(value.view(torch.uint8), others[name].view(torch.uint8)) for name, value in some.items())


def captured(call: workloads.Call) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call, which has run before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run()
    return graph


def compiled(call: workloads.Call):
    """The call inside a function that torch.compile has made, without graph breaks."""
    operator = workloads.function(call.op)
    function = torch.compile(lambda arguments: operator(**arguments), fullgraph=True)
    return lambda: function(call.arguments)


@torch.no_grad()
def on_gpu(op: str) -> dict[str, float]:
    """Microseconds of the host per call of an operator, by the ways to make it.

    Raises
    ------
    RuntimeError
        A way gives other bits than the plain call.
    """
    call = workloads.build(op, {workloads.batch_key(op): 1}, "cuda")
    before = {name: value.clone() for name, value in call.results().items()}
    want = restored(call, before, call.run)
    ways = {"cached call": call.run, "replay of a graph": captured(call).replay, "in torch.compile": compiled(call)}
    rows = {}
    for name, way in ways.items():
        if not same_bits(restored(call, before, way), want):
            raise RuntimeError(f"{op}, {name}: other bits than the plain call")
        rows[f"{op}, {name}"] = queued(way)
    return rows


def queued(function, repeats=30) -> float:
    """Median over repeats of the host's mean time of a call while the GPU is behind, not waited for."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(QUEUED):
            function()
        times.append((time.perf_counter() - start) / QUEUED * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="write results, e.g. to tools/bench/results/host.json")
    parser.add_argument("--gpu", action="store_true", help="calls on a GPU too")
    options = parser.parse_args(argv)
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu: there is no GPU here")
    rows = {}
    if options.gpu:
        for op in workloads.OPERATORS:
            rows |= on_gpu(op)
    for what, call in (("one token", one_token()), ("packed, tables, int8, stochastic", speculative())):
        given, cached, alone = measure(call)
        rows[f"selective_state_update, {what}: {given} tensors, cached"] = cached
        rows["  of which the compiled entry, without a launch" + f" ({what})"] = alone
    for name, value in rows.items():
        print(f"{value:6.2f} us  {name}")
    if options.out:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        results = {"microseconds": rows, "cpu": platform.processor(), "versions": versions}
        if options.gpu:
            results["device"] = torch.cuda.get_device_name()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
