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


def flashinfer_gated_delta_bf16(peers: Path, keys: Keys) -> Call:
    """FlashInfer's CuTe DSL gated delta rule with bfloat16 states: kernel and tiles are FlashInfer's choice.

    One token updates its slot of the pool; of several, the state after each is written to a buffer and the pool stays.
    """
    import torch

    from . import hosted

    name = "flashinfer.gdn_kernels.gdn_decode_bf16_state"
    wanted = (name, "flashinfer.gdn_kernels.dtype_compat")
    ops = kernels_of(folder_of(peers, keys["package"]), name, wanted.__contains__)
    batch, tokens, h, hv, k, v = (keys[n] for n in ("batch", "tokens", "heads", "value_heads", "key_dim", "value_dim"))
    bf16 = torch.bfloat16
    q, key = (torch.zeros(batch, tokens, h, k, dtype=bf16) for _ in range(2))
    value, out = (torch.zeros(batch, tokens, hv, v, dtype=bf16) for _ in range(2))
    a, b = (torch.zeros(batch, tokens, hv, dtype=bf16) for _ in range(2))
    decay, bias = torch.zeros(hv), torch.zeros(hv)
    pool, slots = torch.zeros(batch, hv, v, k, dtype=bf16), torch.arange(batch, dtype=torch.int32)
    several: dict[str, Any] = {}
    if tokens > 1:
        buffer = torch.zeros(batch, tokens, hv, v, k, dtype=bf16)
        several = {"intermediate_states_buffer": buffer, "disable_state_update": True}

    def run() -> None:
        with hosted.on_emulator(keys["sms"], ops):
            (ops.gated_delta_rule_mtp if tokens > 1 else ops.gated_delta_rule)(
                decay, a, bias, q=q, k=key, v=value, b=b, initial_state_source=pool, initial_state_indices=slots,
                output=out, **several,
            )  # fmt: skip

    return Call(run, language="CuTe DSL")


def kda_tensors(keys: Keys) -> dict[str, Any]:
    """Tensors of a Kimi delta attention with gates that are given, K x V heads of one size, in bfloat16."""
    import torch

    batch, tokens, h, d = (keys[n] for n in ("batch", "tokens", "heads", "dim"))
    names, bf16 = ("q", "k", "v", "g"), torch.bfloat16
    return {
        **{name: torch.zeros(batch, tokens, h, d, dtype=bf16) for name in names},
        "beta": torch.zeros(batch, tokens, h, dtype=bf16),
        "output": torch.zeros(batch, tokens, h, d, dtype=bf16),
    }


def flashinfer_kda(peers: Path, keys: Keys) -> Call:
    """FlashInfer's recurrent KDA: every token's state is written, to a slot of its own if there are several.

    ``source``: the state before the first token lies in a pool of its own.
    """
    import torch

    from . import hosted

    folder = "flashinfer.kda_kernels."
    names = (folder + "recurrent_kda", folder + "packed_kda_decode_cute")
    ops = kernels_of(folder_of(peers, keys["package"]), names[0], names.__contains__)
    batch, tokens, h, d = (keys[n] for n in ("batch", "tokens", "heads", "dim"))
    given = kda_tensors(keys)
    pool = torch.zeros(batch * tokens, h, d, d, dtype=torch.bfloat16)
    slots = torch.arange(batch * tokens, dtype=torch.int32)
    given = {name: tensor.view(1, batch * tokens, *tensor.shape[2:]) for name, tensor in given.items()}
    given["cu_seqlens"] = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32)
    if keys["source"]:
        given["initial_state_source"] = torch.zeros(max(batch, 2), h, d, d, dtype=torch.bfloat16)
        given["initial_state_indices"] = torch.arange(batch, dtype=torch.int32)
    if tokens > 1:
        given["num_spec_tokens"] = tokens - 1
        slots = slots.view(batch, tokens)

    def run() -> None:
        with hosted.on_emulator(keys["sms"], ops):
            ops.run_recurrent_kda(**given, initial_state=pool, ssm_state_indices=slots)

    return Call(run, language="CuTe DSL")


def flashinfer_kda_output_only(peers: Path, keys: Keys) -> Call:
    """FlashInfer's KDA that only reads states, by matrices (WY)."""
    import torch

    from . import hosted

    names = (
        "flashinfer.kda_kernels.kda_decode_wy_output_only", "flashinfer.gdn_kernels.gdn_decode_bf16_wy_output_only"
    )  # fmt: skip
    ops = kernels_of(folder_of(peers, keys["package"]), names[0], names.__contains__)
    h, d = keys["heads"], keys["dim"]
    given = kda_tensors(keys)
    pool = torch.zeros(max(keys["batch"], 2), h, d, d, dtype=torch.bfloat16)

    def run() -> None:
        with hosted.on_emulator(keys["sms"], ops):
            ops.kda_wy_output_only(**given, initial_state_source=pool, backend="wy")

    return Call(run, language="CuTe DSL")


def fla_kda(peers: Path, keys: Keys) -> Call:
    """fla's Triton ``fused_recurrent_kda`` with states K x V by slot, as FlashInfer's benchmark calls it."""
    import torch

    wanted = ("fla.ops.kda.fused_recurrent", "fla.ops.utils.op", "fla.ops.utils.softplus")
    ops = kernels_of(folder_of(peers, keys["package"]), wanted[0], wanted.__contains__)
    batch, tokens, h, d = (keys[n] for n in ("batch", "tokens", "heads", "dim"))
    given = {name: tensor.view(1, batch * tokens, *tensor.shape[2:]) for name, tensor in kda_tensors(keys).items()}
    given["out"] = given.pop("output")
    pool = torch.zeros(batch * tokens, h, d, d, dtype=torch.bfloat16)
    starts = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32)
    slots = torch.arange(batch * tokens, dtype=torch.int32).view(batch, tokens)
    accepted = torch.ones(batch, dtype=torch.int32) if tokens > 1 else None

    def run() -> None:
        ops.fused_recurrent_kda_fwd(
            **given, initial_state=pool, cu_seqlens=starts, ssm_state_indices=slots if tokens > 1 else slots[:, 0],
            num_accepted_tokens=accepted, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip

    return Call(run)


STATE_UPDATE = {"package": "vllm-0.22.0", "batch": 1, "nheads": 8, "headdim": 64, "dstate": 128, "ngroups": 8,
    "state_dtype": "float16", "block_m": 4, "warps": 1}  # fmt: skip
GATED_DELTA = {"package": "vllm-0.14.0", "batch": 32, "heads": 8, "value_heads": 16, "key_dim": 128, "value_dim": 128,
    "state_dtype": "bfloat16"}  # fmt: skip
FLASHINFER_GATED_DELTA = {"package": "flashinfer_python-0.7.2.post1", "batch": 1, "heads": 16, "value_heads": 32,
    "key_dim": 128, "value_dim": 128}  # fmt: skip
FLASHINFER_GATED_DELTA_BF16 = {**FLASHINFER_GATED_DELTA, "tokens": 1, "value_heads": 64, "sms": 148}
KDA = {"package": "flashinfer_python-0.7.2.post1", "batch": 1, "tokens": 1, "heads": 8, "dim": 64,
    "source": False, "sms": 148}  # fmt: skip
FLA_KDA = {**KDA, "package": "fla-core-0.6.0"}

KERNELS = {
    "vllm selective_state_update": Kernel(STATE_UPDATE, vllm_state_update),
    "vllm fused_recurrent_gated_delta_rule": Kernel(GATED_DELTA, vllm_gated_delta),
    "flashinfer gated_delta_rule_decode_pretranspose": Kernel(FLASHINFER_GATED_DELTA, flashinfer_gated_delta),
    "flashinfer gated_delta_rule_mtp bfloat16 states": Kernel(FLASHINFER_GATED_DELTA_BF16, flashinfer_gated_delta_bf16),
    "flashinfer recurrent_kda": Kernel(KDA, flashinfer_kda),
    "flashinfer kda_wy_output_only": Kernel(KDA, flashinfer_kda_output_only),
    "fla fused_recurrent_kda": Kernel(FLA_KDA, fla_kda),
}
