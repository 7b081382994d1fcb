"""Small stand-ins of the modules of vLLM and SGLang that the integrations hook into, with the engines' signatures.

Their functions record what reaches the engine's own kernels; `Modules.drift` gives one of them other parameters.
"""

from __future__ import annotations

import enum
import importlib.machinery
import json
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import peer_doubles
import peer_signatures

TABLE = json.loads(peer_signatures.TABLE.read_text())
VLLM_DISPATCH = "vllm.model_executor.layers.mamba.ops.ssu_dispatch"
VLLM_FLA = "vllm.third_party.flash_linear_attention.ops"
SGLANG_DISPATCH = "sglang.kernels.ops.mamba.triton_ops.ssu_dispatch"
LINEAR = "sglang.srt.layers.attention.linear"


class Recorded(list):
    """The calls of an engine's own kernels: (name, arguments by name)."""

    def names(self) -> list[str]:
        return [name for name, _ in self]

    def __call__(self, name: str, result: Any = None) -> Callable[..., Any]:
        def kernel(**arguments: Any) -> Any:
            self.append((name, arguments))
            return result

        return kernel


def of(package: str, module: str, name: str, body: Callable[..., Any] | None = None) -> Callable[..., Any]:
    return peer_doubles.function(TABLE[package], f"{module.replace('.', '/')}.py::{name}", body)


def add(monkeypatch, name: str, **members: Any) -> types.ModuleType:
    """A module, and the packages above it, for the length of a test."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        if path not in sys.modules:
            module = types.ModuleType(path)
            module.__path__ = []
            module.__spec__ = importlib.machinery.ModuleSpec(path, None, is_package=True)
            monkeypatch.setitem(sys.modules, path, module)
            if depth > 1:
                setattr(sys.modules[".".join(parts[: depth - 1])], parts[depth - 1], module)
    vars(sys.modules[name]).update(members)
    return sys.modules[name]


class Engine(NamedTuple):
    """What a test of a stand-in touches."""

    dispatch: types.ModuleType
    own: Recorded
    layer: types.ModuleType  # imported its functions before the integration came


def vllm(monkeypatch) -> Engine:
    """vLLM 0.33: the dispatch of SSU backends, ReplaySSM of FlashInfer, and the functions of gated delta layers."""
    own = Recorded()
    dispatch = add(monkeypatch, VLLM_DISPATCH)
    kinds = enum.Enum("MambaBackendEnum", {"TRITON": "triton", "FLASHINFER": "flashinfer", "CPU": "cpu"})

    class MambaSSUBackend:
        def __init__(self, mamba_config):
            self._mamba_config = mamba_config

        __call__ = of("vllm", VLLM_DISPATCH, "MambaSSUBackend.__call__")

    def backend(name):
        call = of("vllm", VLLM_DISPATCH, "MambaSSUBackend.__call__", own(name))
        members = {"name": property(lambda self: name), "__call__": lambda self, *args, **kw: call(self, *args, **kw)}
        return type(name, (MambaSSUBackend,), members)

    def initialized(mamba_config, kv_cache_config, use_replayssm):
        dispatch._mamba_ssu_backend = dispatch._BACKEND_REGISTRY[mamba_config.backend](mamba_config)
        dispatch._flashinfer_replayssm_kernel = dispatch.theirs if use_replayssm else None

    initialize = of("vllm", VLLM_DISPATCH, "initialize_mamba_ssu_backend", initialized)
    replay = of(
        "flashinfer-python", "flashinfer.mamba.checkpointing_ssu", "checkpointing_ssu", own("checkpointing_ssu")
    )
    vars(dispatch).update(
        MambaBackendEnum=kinds,
        MambaSSUBackend=MambaSSUBackend,
        _BACKEND_REGISTRY={kind: backend(kind.value) for kind in kinds},
        _mamba_ssu_backend=None,
        _flashinfer_replayssm_kernel=None,
        theirs=replay,
        initialize_mamba_ssu_backend=initialize,
        selective_state_update=of(
            "vllm", VLLM_DISPATCH, "selective_state_update", lambda **kw: dispatch._mamba_ssu_backend(**kw)
        ),
        selective_state_update_replayssm_flashinfer=of(
            "vllm", VLLM_DISPATCH, "selective_state_update_replayssm_flashinfer"
        ),
    )
    functions = {}
    for module, name in (
        ("fused_recurrent", "fused_recurrent_gated_delta_rule_packed_decode"),
        ("fused_sigmoid_gating", "fused_sigmoid_gating_delta_rule_update"),
    ):
        functions[name] = of("vllm", f"{VLLM_FLA}.{module}", name, own(name, ("out", "state")))
        add(monkeypatch, f"{VLLM_FLA}.{module}", **{name: functions[name]})
    name = "selective_state_update_replayssm_output_only"
    module = VLLM_DISPATCH.replace("ssu_dispatch", name)
    functions[name] = of("vllm", module, name, own(name, "out"))
    add(monkeypatch, module, **{name: functions[name]})
    layer = add(monkeypatch, "vllm.layer", initialize_mamba_ssu_backend=initialize, **functions)
    return Engine(dispatch, own, layer)


def sglang(monkeypatch) -> Engine:
    """SGLang 0.5.23: the dispatch of SSU backends, choices of options, hooks, and the kernels of gated delta layers."""
    own = Recorded()
    dispatch = add(monkeypatch, SGLANG_DISPATCH)

    class MambaSSUBackend:
        __call__ = of("sglang", SGLANG_DISPATCH, "MambaSSUBackend.__call__")

    class TritonSSUBackend(MambaSSUBackend):
        def __init__(self, *, enable_stochastic_rounding=False, cache_philox_rounds=0):
            pass

        def __call__(self, *args, **kwargs):
            of("sglang", SGLANG_DISPATCH, "MambaSSUBackend.__call__", own("triton"))(self, *args, **kwargs)

    vars(dispatch).update(
        MambaSSUBackend=MambaSSUBackend,
        TritonSSUBackend=TritonSSUBackend,
        _BACKEND_REGISTRY={"triton": TritonSSUBackend},
        _mamba_ssu_backend=None,
        selective_state_update=of(
            "sglang", SGLANG_DISPATCH, "selective_state_update", lambda **kw: dispatch._mamba_ssu_backend(**kw)
        ),
    )

    def options(parser):
        parser.add_argument("--mamba-backend", choices=["triton", "flashinfer"], default="triton")

    add_cli_args = staticmethod(of("sglang", "sglang.srt.server_args", "ServerArgs.add_cli_args", options))
    arguments = type("ServerArgs", (), {"add_cli_args": add_cli_args})
    add(monkeypatch, "sglang.srt.server_args", ServerArgs=arguments)
    known = ["triton", "flashinfer"]
    add(
        monkeypatch,
        "sglang.srt.arg_groups.choices",
        LINEAR_ATTN_KERNEL_BACKEND_CHOICES=known,
        add_linear_attn_kernel_backend_choices=known.extend,
    )

    class LinearAttnKernelBackend(enum.Enum):
        TRITON, CUSTOM = "triton", "custom"

        @classmethod
        def _missing_(cls, value):
            return cls.CUSTOM

        def is_custom(self):
            return self is LinearAttnKernelBackend.CUSTOM

    mamba = types.SimpleNamespace(
        linear_attn_backend="triton", linear_attn_decode_backend=None, linear_attn_verify_backend=None
    )

    def resolve(prefill_default=None):
        decode = LinearAttnKernelBackend(mamba.linear_attn_decode_backend or mamba.linear_attn_backend)
        prefill = LinearAttnKernelBackend(mamba.linear_attn_backend)
        return types.SimpleNamespace(decode=decode, prefill=prefill)

    utils = add(
        monkeypatch,
        f"{LINEAR}.utils",
        LinearAttnKernelBackend=LinearAttnKernelBackend,
        resolve_linear_attn_backends=resolve,
        get_exec=lambda: types.SimpleNamespace(mamba=mamba),
    )
    hooks: list[tuple[str, Callable[..., Any], str]] = []
    registry = types.SimpleNamespace(register=lambda *hook: hooks.append(hook))
    add(
        monkeypatch,
        "sglang.srt.plugins.hook_registry",
        HookRegistry=registry,
        HookType=enum.Enum("HookType", {"AFTER": "after"}),
    )
    base = f"{LINEAR}.kernels.kernel_backend"
    methods = {
        name: of("sglang", base, f"LinearAttnKernelBase.{name}") for name in ("decode", "extend", "target_verify")
    }
    LinearAttnKernelBase = type("LinearAttnKernelBase", (), methods)
    add(monkeypatch, base, LinearAttnKernelBase=LinearAttnKernelBase)
    packed = of("sglang", f"{LINEAR}.kernels.gdn_triton", "TritonGDNKernel.packed_decode")
    add(monkeypatch, f"{LINEAR}.kernels.gdn_triton", TritonGDNKernel=type("Triton", (), {"packed_decode": packed}))
    triton = types.SimpleNamespace(
        **{name: lambda *args, name=name, **kw: own(name, name)(**kw) for name in (*methods, "packed_decode")}
    )

    class GDNKernelDispatcher:
        def __init__(self, decode_backend, prefill_backend, verify_backend=None):
            if decode_backend.is_custom():
                raise ValueError("Unsupported GDN decode backend")
            self.decode_kernel = self.verify_kernel = self.tree_verify_kernel = triton
            self.verify_kernel_is_flashinfer, self.supports_packed_decode = False, True

    gdn = add(monkeypatch, f"{LINEAR}.gdn_backend", GDNKernelDispatcher=GDNKernelDispatcher)
    gdn.utils, gdn.mamba, gdn.hooks, gdn.known, gdn.arguments = utils, mamba, hooks, known, arguments
    return Engine(dispatch, own, gdn)
