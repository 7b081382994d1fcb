"""Other projects' kernels for the same calls, if they can be imported.

A peer is a function that takes the arguments of one of our calls and returns a function without arguments that makes
the peer's call on the same tensors; it raises `Absent` if the peer is not installed or has no such mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module, util
from pathlib import Path
from typing import Any

Arguments = Mapping[str, Any]
FLASHINFER_STEP = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "out", "state_batch_indices", "state_scale",
    "intermediate_states_buffer", "intermediate_state_indices", "intermediate_state_scales", "cu_seqlens", "rand_seed",
    "dt_softplus", "disable_state_update")  # fmt: skip
VLLM_STEP = "vllm.model_executor.layers.mamba.ops.mamba_ssm"


class Absent(Exception):
    """A peer that cannot take part, and why."""


def _import(module: str, name: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # Triton, say, raises RuntimeError where it finds no C compiler
        raise Absent(f"{module}.{name}: {type(error).__name__}: {error}") from None


def _require(condition: bool, why: str) -> None:
    if not condition:
        raise Absent(why)


def flashinfer_step(arguments: Arguments) -> Callable[[], object]:
    """``flashinfer.mamba.selective_state_update``."""
    function = _import("flashinfer.mamba", "selective_state_update")
    state = str(arguments["state"].dtype).removeprefix("torch.")
    _require(arguments["A"].stride()[-1] == 0, "FlashInfer takes one decay per head")
    _require(state in ("float32", "bfloat16", "float16", "int16"), f"FlashInfer has no {state} states here")
    given = {name: arguments[name] for name in FLASHINFER_STEP if arguments.get(name) is not None}
    if arguments.get("intermediate_states_buffer") is not None:
        given["cache_steps"] = arguments["intermediate_states_buffer"].shape[1]
    return lambda: function(**given)


def mamba_ssm_step(arguments: Arguments) -> Callable[[], object]:
    """``mamba_ssm.ops.triton.selective_state_update``: one token, states of floats."""
    function = _import("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
    x = arguments["x"]
    _require(x.dim() == 3, "mamba_ssm takes one token")
    _require(arguments.get("state_scale") is None, "mamba_ssm has no quantised states")
    _require(arguments.get("rand_seed") is None, "mamba_ssm has no stochastic rounding")
    _require(not arguments["disable_state_update"], "mamba_ssm always writes the state")
    given = {name: arguments[name] for name in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus")}
    return lambda: function(**given, state_batch_indices=arguments["state_batch_indices"])


def vllm_kernels(device: str) -> Any | None:
    """Return vLLM's file of the kernel, loaded without the rest of vLLM, with the tables for a device of that name.

    None where vLLM is not installed.
    """
    found = util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return None
    from gpumodel.validate.packages import kernels_of

    ops = VLLM_STEP.rpartition(".")[0]
    module = kernels_of(Path(found.submodule_search_locations[0]).parent, VLLM_STEP, lambda n: n.startswith(ops))
    module.get_ssm_device_name = lambda: device
    for kept in (module.get_ssm_configs, module._try_get_optimal_ssm_config_cached):
        kept.cache_clear()
    return module


def _vllm_function() -> Any:
    """Return vLLM's function; of a kit, which has the kernel's files alone, that of these files."""
    import torch

    try:
        return _import(VLLM_STEP, "selective_state_update")
    except Absent:
        module = vllm_kernels(torch.cuda.get_device_name().replace(" ", "_")) if torch.cuda.is_available() else None
        if module is None:
            raise
        return module.selective_state_update


def vllm_step(arguments: Arguments) -> Callable[[], object]:
    """vLLM's Triton ``selective_state_update``: one token, states of floats.

    It launches what the tables that vLLM ships say for the GPU, as in a vLLM server, or vLLM's own default.
    """
    import torch

    function = _vllm_function()
    x, bias = arguments["x"], arguments["dt_bias"]
    _require(x.dim() == 3, "vLLM takes one token")
    _require(arguments.get("state_scale") is None, "vLLM has no quantised states")
    _require(arguments.get("rand_seed") is None, "vLLM's stochastic rounding is another one")
    _require(not arguments["disable_state_update"], "vLLM always writes the state")
    _require(arguments.get("D") is not None and bias is not None, "vLLM needs D and dt_bias")
    given = {name: arguments[name] for name in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus")}
    blackwell = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 10
    none = {"null_block_id": -1, "is_blackwell": blackwell}
    indices = arguments["state_batch_indices"]
    return lambda: function(**given, out=arguments["out"], state_batch_indices=indices, **none)


def flashinfer_checkpointing(arguments: Arguments) -> Callable[[], object]:
    """``flashinfer.mamba.checkpointing_ssu`` of FlashInfer 0.6, of the double buffer."""
    function = _import("flashinfer.mamba", "checkpointing_ssu")
    window = arguments["old_x"].shape[-3]
    _require(window <= 16, "FlashInfer takes windows up to 16")
    _require(arguments["x"].shape[1] <= window, "FlashInfer takes no more tokens than the window has rows")
    _require(arguments["old_x"].dim() == 4, "FlashInfer has one buffer of x")
    unknown = ("work_items", "num_writes")
    given = {k: v for k, v in arguments.items() if v is not None and k not in unknown}
    return lambda: function(**given)


def flashinfer_gdn(arguments: Arguments) -> Callable[[], object]:
    """``flashinfer.gdn_decode.gated_delta_rule_mtp``."""
    function = _import("flashinfer.gdn_decode", "gated_delta_rule_mtp")
    _require("float32" in str(arguments["initial_state"].dtype), "FlashInfer's MTP form takes float32 states")
    _require(arguments["q"].shape[1] > 1, "FlashInfer's MTP form takes more than one token")
    return lambda: function(**arguments)


def fla_gdn(arguments: Arguments) -> Callable[[], object]:
    """fla's ``fused_recurrent_gated_delta_rule``: Triton; gathered states are given to it, as it has no pool."""
    import torch

    function = _import("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule")
    pool, index = arguments["initial_state"], arguments["initial_state_indices"].long()
    state = pool[index].transpose(-1, -2).float().contiguous()
    dt = torch.nn.functional.softplus(arguments["a"].float() + arguments["dt_bias"])
    g = -arguments["A_log"].exp() * dt
    given = {name: arguments[name] for name in ("q", "k", "v")}
    given |= {"g": g, "beta": arguments["b"].float().sigmoid(), "initial_state": state}
    return lambda: function(**given, output_final_state=True, use_qk_l2norm_in_kernel=True)


def mamba_ssm_scan(arguments: Arguments) -> Callable[[], object]:
    """``mamba_ssm.ops.selective_scan_interface.selective_scan_fn``: CUDA; not for packed sequences."""
    function = _import("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    _require(arguments.get("query_start_loc") is None, "mamba_ssm takes no packed sequences")
    given = {name: arguments[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus")}
    return lambda: function(**given, return_last_state=True)


PEERS: dict[str, dict[str, Callable[[Arguments], Callable[[], object]]]] = {
    "selective_state_update": {"flashinfer": flashinfer_step, "mamba_ssm": mamba_ssm_step, "vllm": vllm_step},
    "checkpointing_ssu": {"flashinfer": flashinfer_checkpointing},
    "gated_delta_rule_mtp": {"flashinfer": flashinfer_gdn, "fla": fla_gdn},
    "selective_scan": {"mamba_ssm": mamba_ssm_scan},
}


def of(op: str, sets: list[Arguments]) -> tuple[dict[str, list[Callable[[], object]]], dict[str, str]]:
    """Return the calls of every peer on all sets of arguments, and the absent ones with their reasons."""
    present: dict[str, list[Callable[[], object]]] = {}
    absent: dict[str, str] = {}
    for name, make in PEERS.get(op, {}).items():
        try:
            present[name] = [make(arguments) for arguments in sets]
        except Absent as reason:
            absent[name] = str(reason)
        except Exception as error:  # what a peer makes of its arguments costs only itself
            absent[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return present, absent
