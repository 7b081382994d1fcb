"""The kernels that published times are of: how a point's keys become a call.

A kernel is a function that takes the folder of packages and the keys of a point, and returns a `Call`.  The keys say
all that a recording depends on besides the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .packages import Absent, kernels_of

Keys = Mapping[str, Any]
VLLM_OPS = ("model_executor.layers.mamba.ops.", "model_executor.layers.fla.ops.")


class Call(NamedTuple):
    """A call that launches kernels.

    ``whole``: all CTAs of an SM are to be recorded, as they differ.  ``language``: "Triton" or "CuTe DSL"; a call of
    the latter compiles for the architecture of the open session.
    """

    run: Callable[[], object]
    whole: bool = False
    language: str = "Triton"


class Kernel(NamedTuple):
    """A kernel that points may name: the keys that they must give, with examples, and what makes a call of them."""

    keys: Mapping[str, Any]
    make: Callable[[Path, Keys], Call]


def folder_of(peers: Path, package: str) -> Path:
    """Return the folder of a package."""
    folder = peers / package
    if not folder.is_dir():
        name, _, version = package.rpartition("-")
        raise Absent(f"{folder} does not exist: pip install --no-deps --target {folder} {name}=={version}")
    return folder


def vllm_module(peers: Path, keys: Keys, name: str) -> Any:
    """Return a module of kernels of vLLM."""

    def wanted(module: str) -> bool:
        return module.removeprefix("vllm.").startswith(VLLM_OPS)

    return kernels_of(folder_of(peers, keys["package"]), f"vllm.{name}", wanted)


def vllm_state_update(peers: Path, keys: Keys) -> Call:
    """vLLM's Triton ``selective_state_update`` as its tuning script calls it: dense A and dt, no indices."""
    import torch

    ops = vllm_module(peers, keys, "model_executor.layers.mamba.ops.mamba_ssm")
    batch, nheads, dim, dstate, groups = (keys[n] for n in ("batch", "nheads", "headdim", "dstate", "ngroups"))
    state_dtype, dtype = getattr(torch, keys["state_dtype"]), torch.bfloat16
    state = torch.zeros(batch, nheads, dim, dstate, dtype=state_dtype)
    x, dt, out = (torch.zeros(batch, nheads, dim, dtype=dtype) for _ in range(3))
    decay = torch.zeros(nheads, dim, dstate)
    b, c = (torch.zeros(batch, groups, dstate, dtype=dtype) for _ in range(2))
    d, bias = (torch.zeros(nheads, dim, dtype=dtype) for _ in range(2))

    def run() -> None:
        with ops.override_ssm_config((keys["block_m"], keys["warps"])):
            ops.selective_state_update(state, x, dt, decay, b, c, D=d, dt_bias=bias, dt_softplus=True, out=out)

    return Call(run)


def vllm_gated_delta(peers: Path, keys: Keys) -> Call:
    """vLLM's Triton ``fused_recurrent_gated_delta_rule`` of one token a request, states in place by index.

    Tiles have 8 of ``value_dim`` columns in vLLM 0.13, and 32 in 0.14.
    """
    import torch

    ops = vllm_module(peers, keys, "model_executor.layers.fla.ops.fused_recurrent")
    batch, h, hv, k, v = (keys[n] for n in ("batch", "heads", "value_heads", "key_dim", "value_dim"))
    dtype, state_dtype = torch.bfloat16, getattr(torch, keys["state_dtype"])
    q, key = (torch.zeros(1, batch, h, k, dtype=dtype) for _ in range(2))
    value = torch.zeros(1, batch, hv, v, dtype=dtype)
    g, beta = torch.zeros(1, batch, hv), torch.zeros(1, batch, hv, dtype=dtype)
    state = torch.zeros(batch, hv, k, v, dtype=state_dtype)
    starts = torch.arange(batch + 1, dtype=torch.int32)
    slots = torch.arange(batch, dtype=torch.int32)

    def run() -> None:
        ops.fused_recurrent_gated_delta_rule_fwd(
            q, key, value, g, beta, k**-0.5, state, inplace_final_state=True, cu_seqlens=starts,
            ssm_state_indices=slots, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip

    return Call(run)


def flashinfer_gated_delta(peers: Path, keys: Keys) -> Call:
    """FlashInfer's CuTe DSL gated delta rule of one token a request: float32 states, V x K, in place by request.

    Sizes and strides are dynamic where FlashInfer's own call makes them so.
    """
    import cutlass
    import torch
    from cutlass import cute

    import ptxsim

    name = "flashinfer.gdn_kernels.gdn_decode_pretranspose"
    ops = kernels_of(folder_of(peers, keys["package"]), name, lambda module: module == name)
    batch, h, hv, k, v = (keys[n] for n in ("batch", "heads", "value_heads", "key_dim", "value_dim"))
    f32, bf16, i32 = torch.float32, torch.bfloat16, torch.int32
    types = {f32: cutlass.Float32, bf16: cutlass.BFloat16, i32: cutlass.Int32}
    shapes = {
        "h0_source": ((batch * hv, v, k), f32), "A_log": ((hv,), f32), "a": ((batch, 1, hv), bf16),
        "dt_bias": ((hv,), bf16), "q": ((batch, 1, h, k), bf16), "k": ((batch, 1, h, k), bf16),
        "v": ((batch, 1, hv, v), bf16), "b": ((batch, 1, hv), bf16), "o": ((batch, 1, hv, v), bf16),
        "h0_indices": ((batch,), i32), "h0_out_indices": ((batch,), i32), "cu_seqlens": ((batch + 1,), i32),
    }  # fmt: skip
    tensors = {n: torch.zeros(shape, dtype=dtype) for n, (shape, dtype) in shapes.items()}
    static = {"A_log": None, "dt_bias": None, "h0_source": 0}  # and which mode has a dynamic size

    def fake(name: str) -> Any:
        shape, strides = list(tensors[name].shape), list(tensors[name].stride())
        if name not in static:
            shape = [cute.sym_int() for _ in shape]
            strides = [*(cute.sym_int64() for _ in strides[1:]), 1]
        elif static[name] is not None:
            shape[static[name]] = cute.sym_int()
        align = None if name in ("A_log", "dt_bias", "a", "b") else 16
        return cute.runtime.make_fake_tensor(
            types[tensors[name].dtype], tuple(shape), stride=tuple(strides), assumed_align=align
        )

    def run() -> None:
        compiled = ptxsim.compile(
            ops.run_gdn_decode_kernel_small_batch_pretranspose, *(fake(name) for name in tensors),
            arch=ptxsim.current().arch, softplus_beta=1.0, softplus_threshold=20.0,
            scale=k**-0.5, HV=hv, T=1, H=h, K=k, V=v,
            use_initial_state=True, use_qk_l2norm=True, is_varlen=False,
            stream=cute.runtime.make_fake_stream(), source_lines=False,
        )  # fmt: skip
        compiled(*tensors.values())

    return Call(run, language="CuTe DSL")


STATE_UPDATE = {"package": "vllm-0.22.0", "batch": 1, "nheads": 8, "headdim": 64, "dstate": 128, "ngroups": 8,
    "state_dtype": "float16", "block_m": 4, "warps": 1}  # fmt: skip
GATED_DELTA = {"package": "vllm-0.14.0", "batch": 32, "heads": 8, "value_heads": 16, "key_dim": 128, "value_dim": 128,
    "state_dtype": "bfloat16"}  # fmt: skip
FLASHINFER_GATED_DELTA = {"package": "flashinfer_python-0.7.2.post1", "batch": 1, "heads": 16, "value_heads": 32,
    "key_dim": 128, "value_dim": 128}  # fmt: skip

KERNELS = {
    "vllm selective_state_update": Kernel(STATE_UPDATE, vllm_state_update),
    "vllm fused_recurrent_gated_delta_rule": Kernel(GATED_DELTA, vllm_gated_delta),
    "flashinfer gated_delta_rule_decode_pretranspose": Kernel(FLASHINFER_GATED_DELTA, flashinfer_gated_delta),
}
