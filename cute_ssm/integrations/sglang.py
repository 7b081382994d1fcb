"""Run the decode steps of SGLang's Mamba and gated delta layers with this package's operators."""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from cute_ssm import env
from cute_ssm.compat import sglang as compat
from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.integrations import _engines
from cute_ssm.integrations._engines import Call, EngineError, Hook

NAME = "cute_ssm"  # of the backends, in SGLang's options
DISPATCH = "sglang.kernels.ops.mamba.triton_ops.ssu_dispatch"
LINEAR = "sglang.srt.layers.attention.linear"
STEP = (
    "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None, pad_slot_id=-1, "
    "out=None, disable_state_update=False, intermediate_states_buffer=None, cache_steps=None, "
    "retrieve_parent_token=None, intermediate_state_indices=None"
)
BACKEND_INIT = "self, *, enable_stochastic_rounding=False, cache_philox_rounds=0"
DECODE = "self, q, k, v, a, b, *, A_log, dt_bias, ssm_states, cache_indices, query_start_loc, **kwargs"
EXTEND = "self, q, k, v, g, beta, *, ssm_states, cache_indices, query_start_loc, **kwargs"
VERIFY = "self, A_log, dt_bias, q, k, v, a, b, *, ssm_states, cache_indices, query_start_loc, **kwargs"
PACKED = "self, mixed_qkv, a, b, *, A_log, dt_bias, scale, ssm_states, cache_indices, num_v_heads, head_v_dim, **kwargs"

# What is hooked into, as of SGLang 0.5.23.
SSU_HOOKS = (
    Hook(DISPATCH, "selective_state_update", STEP),
    Hook(DISPATCH, "MambaSSUBackend.__call__", f"self, {STEP}"),
    Hook(DISPATCH, "TritonSSUBackend.__init__", BACKEND_INIT),
)
CLI_HOOKS = (Hook("sglang.srt.server_args", "ServerArgs.add_cli_args", "parser"),)
LINEAR_HOOKS = (Hook(f"{LINEAR}.utils", "resolve_linear_attn_backends", "prefill_default=None"),)
GDN_HOOKS = (
    Hook(
        f"{LINEAR}.gdn_backend",
        "GDNKernelDispatcher.__init__",
        "self, decode_backend, prefill_backend, verify_backend=None",
    ),
    Hook(f"{LINEAR}.kernels.kernel_backend", "LinearAttnKernelBase.decode", DECODE),
    Hook(f"{LINEAR}.kernels.kernel_backend", "LinearAttnKernelBase.extend", EXTEND),
    Hook(f"{LINEAR}.kernels.kernel_backend", "LinearAttnKernelBase.target_verify", VERIFY),
    Hook(f"{LINEAR}.kernels.gdn_triton", "TritonGDNKernel.packed_decode", PACKED),
)
# SGLang's ring for decode steps: values after the delta rule's correction, keys after normalisation, decays.  That of
# `gated_delta_rule_replay` holds values and keys as they came, and its step decides when states are stored.
REPLAYSSM = ("replayssm_d", "replayssm_k", "replayssm_g", "replayssm_write_pos")


def plugin() -> None:
    """Entry point of the group ``sglang.srt.plugins``: add the backends ``cute_ssm`` to SGLang's options.

    SGLang calls it in every process.  Nothing else changes until an option selects such a backend.
    """
    try:
        strict = env.strict()
    except ValueError as error:
        env.logger().warning("cute_ssm is not used by SGLang: %s", error)
        return
    register(strict=strict)


def register(*, strict: bool = False) -> tuple[str, ...]:
    """Add the backends ``cute_ssm`` to SGLang's options, as the plugin does in every process.

    Without the plugin, call it before the arguments of the server are parsed, and ``HookRegistry.apply_hooks()`` of
    ``sglang.srt.plugins.hook_registry`` after it.

    ``--mamba-backend cute_ssm`` selects `selective_state_update` for Mamba-1 and Mamba-2 layers.
    ``--linear-attn-decode-backend cute_ssm`` selects `gated_delta_rule_mtp` for gated delta layers: decode, and the
    verification of drafts unless ``--linear-attn-verify-backend`` selects another.  A call that an operator does not
    support runs by SGLang's Triton backend, and the first such call is logged with its reason.

    Parameters
    ----------
    strict : bool
        Raise the operator's error instead of running the Triton backend.

    Returns
    -------
    tuple of str
        ``"ssu"`` and ``"gdn"``, if they are registered.  Others are not, because the installed SGLang has other
        functions or parameters than 0.5.23: a warning says which, nothing of SGLang has been changed, and it does not
        start with the option.
    """
    parts = {"ssu": _register_ssu, "gdn": _register_gdn}
    return tuple(
        name
        for name, install in parts.items()
        if _engines.unless_other("sglang", name, functools.partial(install, strict))
    )


def _register_ssu(strict: bool) -> str:
    """Add the name to the choices, and the backend in processes that have the dispatch: its import initialises CUDA."""
    _engines.find_all("sglang", CLI_HOOKS)
    hooks = _hooks()
    if DISPATCH in sys.modules:
        dispatch: Any = _engines.find_all("sglang", SSU_HOOKS)[0].module
        registry = getattr(dispatch, "_BACKEND_REGISTRY", None)
        if not isinstance(registry, dict) or "triton" not in registry:
            raise EngineError(describe(f"{DISPATCH}._BACKEND_REGISTRY", "a dict with triton", type(registry).__name__))
        registry.setdefault(NAME, _backend(dispatch.MambaSSUBackend, registry["triton"], strict))
    if not getattr(hooks.HookRegistry, "cute_ssm", False):
        hooks.HookRegistry.cute_ssm = True
        hooks.HookRegistry.register(f"{CLI_HOOKS[0].module}.{CLI_HOOKS[0].name}", _add_choice, hooks.HookType.AFTER)
    return "SGLang has --mamba-backend cute_ssm"


def _hooks() -> Any:
    """Return SGLang's module of hooks."""
    name = "sglang.srt.plugins.hook_registry"
    try:
        module: Any = importlib.import_module(name)
    except ImportError as error:
        raise EngineError(
            describe(name, f"to be there in sglang {_engines.version('sglang')}", f"{error!r}")
        ) from error
    if not (hasattr(module, "HookRegistry") and hasattr(getattr(module, "HookType", None), "AFTER")):
        raise EngineError(describe(name, "HookRegistry and HookType.AFTER", "neither or one"))
    return module


def _add_choice(result: Any, parser: argparse.ArgumentParser) -> None:
    """After SGLang has added its options to a parser: add our name to the choices of one."""
    for action in parser._actions:
        if action.dest == "mamba_backend" and action.choices is not None and NAME not in action.choices:
            action.choices = [*action.choices, NAME]


def _backend(base: type[Any], triton: type[Any], strict: bool) -> type[Any]:
    """Return a backend of selective_state_update, on SGLang's base class; what it lacks runs by Triton."""

    step: Callable[..., None] = compat.selective_state_update

    class CuteSsmBackend(base):  # type: ignore[misc]
        def __init__(self, *, enable_stochastic_rounding: bool = False, cache_philox_rounds: int = 0) -> None:
            self._rounding: dict[str, Any] = {
                "enable_stochastic_rounding": enable_stochastic_rounding,
                "cache_philox_rounds": cache_philox_rounds,
            }
            self._triton = triton(**self._rounding)
            self.cute_ssm = Call("SGLang's selective_state_update", strict)

        @property
        def name(self) -> str:
            return NAME

        def __call__(self, *tensors: Any, **options: Any) -> None:
            def ours() -> None:
                if options.get("state_batch_indices") is not None and options.get("out") is not None:
                    options["out"].zero_()  # rows of padding, which the operator skips, must be finite
                step(*tensors, **options, **self._rounding, write_padded_rows=False)

            self.cute_ssm(ours, lambda: self._triton(*tensors, **options))

    return CuteSsmBackend


def _register_gdn(strict: bool) -> str:
    """Add the name to the choices, and wrap the dispatcher in processes that resolve it: others do not load layers."""
    utils: Any = _engines.find_all("sglang", LINEAR_HOOKS)[0].module
    hooks = _hooks()
    try:
        choices = importlib.import_module("sglang.srt.arg_groups.choices")
        add, known = choices.add_linear_attn_kernel_backend_choices, choices.LINEAR_ATTN_KERNEL_BACKEND_CHOICES
        custom = utils.LinearAttnKernelBackend(NAME).is_custom()
    except (ImportError, AttributeError, ValueError) as error:
        place = f"sglang {_engines.version('sglang')}"
        raise EngineError(describe(place, "backends of linear attention that plugins add", f"{error!r}")) from error
    if not custom:
        raise EngineError(describe(f"{LINEAR}.utils.LinearAttnKernelBackend", "CUSTOM for other names", "none"))
    if NAME not in known:
        add([NAME])
        after = functools.partial(_resolved, strict, utils)
        hooks.HookRegistry.register(f"{LINEAR}.utils.resolve_linear_attn_backends", after, hooks.HookType.AFTER)
    return "SGLang has --linear-attn-decode-backend cute_ssm"


class _Selected(NamedTuple):
    """Which calls the options select our backend for; verification follows decode by default."""

    decode: bool
    verify: bool
    follows: bool


def _selected(utils: Any) -> _Selected:
    mamba = utils.get_exec().mamba
    decode = (mamba.linear_attn_decode_backend or mamba.linear_attn_backend) == NAME
    verify = mamba.linear_attn_verify_backend
    return _Selected(decode, verify == NAME, verify is None and decode)


def _resolved(strict: bool, utils: Any, backends: Any, *args: Any, **kwargs: Any) -> None:
    """After SGLang has resolved the backends of a runner: wrap the dispatcher, if ours is among them.

    Raises
    ------
    EngineError
        The dispatcher is another one than expected.
    """
    selected = _selected(utils)
    if not (selected.decode or selected.verify):
        return
    if backends.prefill.is_custom():
        fix = "pass --linear-attn-decode-backend cute_ssm, and leave --linear-attn-backend as it is"
        raise ValueError(describe("--linear-attn-backend", "a backend with prefill", NAME, fix))
    module = importlib.import_module(f"{LINEAR}.gdn_backend")
    if hasattr(getattr(module, "GDNKernelDispatcher", None), "cute_ssm_init"):
        return
    base = _engines.find_all("sglang", GDN_HOOKS)[1].module.LinearAttnKernelBase
    dispatcher = module.GDNKernelDispatcher
    dispatcher.cute_ssm_init = dispatcher.__init__
    dispatcher.__init__ = functools.partialmethod(_init_dispatcher, strict, utils, base)


def _init_dispatcher(
    self: Any,
    strict: bool,
    utils: Any,
    base: type[Any],
    decode_backend: Any,
    prefill_backend: Any,
    verify_backend: Any = None,
) -> None:
    """``GDNKernelDispatcher.__init__`` that knows our name; SGLang's own refuses it."""
    selected = _selected(utils)
    triton = utils.LinearAttnKernelBackend("triton")
    self.cute_ssm_init(triton if selected.decode else decode_backend, prefill_backend, verify_backend)
    kernel = _kernel(base, self.tree_verify_kernel, strict)  # Triton's, whatever is selected
    if selected.decode:
        self.decode_kernel, self.supports_packed_decode = kernel, True
    if selected.verify or (selected.follows and not self.verify_kernel_is_flashinfer):
        self.verify_kernel, self.verify_kernel_is_flashinfer = kernel, False


def _kernel(base: type[Any], triton: Any, strict: bool) -> Any:
    """Return a kernel of gated delta layers, on SGLang's base class; what it lacks runs by Triton."""

    class CuteSsmGDNKernel(base):  # type: ignore[misc]
        supports_packed_decode = True
        supports_strided_target_verify_qkv = True

        def __init__(self) -> None:
            self.cute_ssm = Call("SGLang's gated delta rule", strict)

        def packed_decode(
            self,
            mixed_qkv: Tensor,
            a: Tensor,
            b: Tensor,
            *,
            A_log: Tensor,
            dt_bias: Tensor,
            scale: float,
            ssm_states: Tensor,
            cache_indices: Tensor,
            num_v_heads: int,
            head_v_dim: int,
            **kwargs: Any,
        ) -> Any:
            def theirs() -> Any:
                return triton.packed_decode(
                    mixed_qkv, a, b, A_log=A_log, dt_bias=dt_bias, scale=scale, ssm_states=ssm_states,
                    cache_indices=cache_indices, num_v_heads=num_v_heads, head_v_dim=head_v_dim, **kwargs,
                )  # fmt: skip

            def ours() -> Tensor:
                if all(kwargs.get(name) is not None for name in REPLAYSSM):
                    fix = "no operator reads or writes rings of corrected values"
                    raise UnsupportedSpecError(describe("--enable-linear-replayssm", "not to be set", "rings", fix))
                out = mixed_qkv.new_zeros(len(mixed_qkv), 1, num_v_heads, head_v_dim)  # rows of padding stay zero
                compat.fused_recurrent_gated_delta_rule_packed_decode(
                    mixed_qkv, a, b, A_log, dt_bias, scale, ssm_states, out, cache_indices, True,
                    write_padded_rows=False,
                )  # fmt: skip
                return out.transpose(0, 1)

            return self.cute_ssm(ours, theirs)

        def decode(
            self,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            a: Tensor,
            b: Tensor,
            *,
            A_log: Tensor,
            dt_bias: Tensor,
            ssm_states: Tensor,
            cache_indices: Tensor,
            query_start_loc: Tensor,
            **kwargs: Any,
        ) -> Any:
            def ours() -> Tensor:
                return compat.fused_sigmoid_gating_delta_rule_update(
                    A_log, a, dt_bias, 1.0, 20.0, q, k, v, b, ssm_states, cache_indices, None, True, query_start_loc,
                    max_seqlen=1,
                )  # fmt: skip

            def theirs() -> Any:
                return triton.decode(
                    q, k, v, a, b, A_log=A_log, dt_bias=dt_bias, ssm_states=ssm_states, cache_indices=cache_indices,
                    query_start_loc=query_start_loc, **kwargs,
                )  # fmt: skip

            return self.cute_ssm(ours, theirs)

        def extend(self, *args: Any, **kwargs: Any) -> Any:
            return triton.extend(*args, **kwargs)

        def target_verify(
            self,
            A_log: Tensor,
            dt_bias: Tensor,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            a: Tensor,
            b: Tensor,
            *,
            ssm_states: Tensor,
            cache_indices: Tensor,
            query_start_loc: Tensor,
            intermediate_states_buffer: Tensor,
            intermediate_state_indices: Tensor,
            cache_steps: int,
            retrieve_parent_token: Tensor | None,
            **kwargs: Any,
        ) -> Any:
            verify: dict[str, Any] = {
                "intermediate_states_buffer": intermediate_states_buffer, "cache_steps": cache_steps,
                "intermediate_state_indices": intermediate_state_indices,
                "retrieve_parent_token": retrieve_parent_token,
            }  # fmt: skip

            def ours() -> Tensor:
                return compat.fused_sigmoid_gating_delta_rule_update(
                    A_log, a, dt_bias, 1.0, 20.0, q, k, v, b, ssm_states, cache_indices, None, True, query_start_loc,
                    disable_state_update=True, positional_rows=not kwargs.get("stable_rows", False), **verify,
                )  # fmt: skip

            def theirs() -> Any:
                return triton.target_verify(
                    A_log, dt_bias, q, k, v, a, b, ssm_states=ssm_states, cache_indices=cache_indices,
                    query_start_loc=query_start_loc, **verify, **kwargs,
                )  # fmt: skip

            return self.cute_ssm(ours, theirs)

    return CuteSsmGDNKernel()
