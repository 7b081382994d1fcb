"""Run the decode steps of vLLM's Mamba and gated delta layers with this package's operators."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from cute_ssm import env
from cute_ssm.compat import vllm as compat
from cute_ssm.compat.flashinfer import mamba as flashinfer
from cute_ssm.compat.vllm import gated_delta
from cute_ssm.errors import describe
from cute_ssm.integrations import _engines
from cute_ssm.integrations._engines import Call, EngineError, Hook

OPS = "vllm.model_executor.layers.mamba.ops"
DISPATCH = f"{OPS}.ssu_dispatch"
OUTPUT_ONLY = "selective_state_update_replayssm_output_only"
FLA = "vllm.third_party.flash_linear_attention.ops"
STEP = (
    "state, x, dt, A, B, C, D, dt_bias, z=None, dt_softplus=False, state_batch_indices=None, "
    "dst_state_batch_indices=None, null_block_id=0, out=None, num_accepted_tokens=None, cu_seqlens=None, "
    "is_blackwell=False"
)

# What is hooked into, as of vLLM 0.33.
SSU_HOOKS = (
    Hook(DISPATCH, "selective_state_update", STEP),
    Hook(DISPATCH, "MambaSSUBackend.__init__", "self, mamba_config"),
    Hook(DISPATCH, "MambaSSUBackend.__call__", f"self, {STEP}"),
)
START = Hook(DISPATCH, "initialize_mamba_ssu_backend", "mamba_config, kv_cache_config, *, use_replayssm=False")
REPLAY_HOOKS = (
    START,
    Hook(
        DISPATCH,
        "selective_state_update_replayssm_flashinfer",
        "state, x, dt, A, B, C, out, x_cache, B_cache, dt_cache, ring_start, prev_num_accepted_tokens, prev_query_len, "
        "logical_window, D=None, dt_bias=None, dt_softplus=False, state_batch_indices=None, null_block_id=0, "
        "scratch=None, update_trackers=True, enable_stochastic_rounding=False, stochastic_rounding_philox_rounds=0, "
        "cu_seqlens=None, max_seqlen=None, enable_pdl=False",
    ),
    Hook(
        f"{OPS}.{OUTPUT_ONLY}",
        OUTPUT_ONLY,
        "state, x, dt, A, B, C, D=None, dt_bias=None, z=None, dt_softplus=False, x_cache=None, dt_cache=None, "
        "B_cache=None, bc_pre=None, write_pos=None, is_flush=None, max_cache_len=16, state_batch_indices=None, "
        "null_block_id=0, out=None, enable_stochastic_rounding=False, cache_philox_rounds=0",
    ),
)
GDN_HOOKS = (
    Hook(
        f"{FLA}.fused_recurrent",
        "fused_recurrent_gated_delta_rule_packed_decode",
        "mixed_qkv, a, b, A_log, dt_bias, scale, initial_state, out, ssm_state_indices, use_qk_l2norm_in_kernel=False",
    ),
    Hook(
        f"{FLA}.fused_sigmoid_gating",
        "fused_sigmoid_gating_delta_rule_update",
        "A_log, a, b, dt_bias, q, k, v, beta=1.0, threshold=20.0, scale=None, initial_state=None, "
        "inplace_final_state=True, cu_seqlens=None, ssm_state_indices=None, num_accepted_tokens=None, "
        "use_qk_l2norm_in_kernel=False, is_kda=False",
    ),
)

_undo: dict[str, list[Callable[[], object]]] = {}


def plugin() -> None:
    """Entry point of the group ``vllm.general_plugins``: `register` the parts that ``CUTE_SSM_VLLM`` names, or none.

    vLLM calls it in every process.  A value of the variable that is wrong is logged, and registers nothing.
    """
    try:
        parts, strict = env.vllm_parts(), env.strict()
    except ValueError as error:
        env.logger().warning("cute_ssm is not used by vLLM: %s", error)
        return
    if parts:
        register(*parts, strict=strict)


def register(*parts: str, strict: bool = False) -> tuple[str, ...]:
    """Make vLLM run decode steps through this package.  Call it before the engine is created, in every process.

    The engine's options stay as they are: the backends that vLLM selects are wrapped.  A call that an operator does not
    support runs by the wrapped backend, and the first such call is logged with its reason.

    Parameters
    ----------
    *parts : {"ssu", "replay", "gdn"}
        ``"ssu"``: `selective_state_update` of Mamba-1 and Mamba-2 layers, in the backends ``triton`` and
        ``flashinfer``.  ``"replay"``: what ``--use-replayssm`` runs, FlashInfer's ``checkpointing_ssu`` or vLLM's
        ``selective_state_update_replayssm_output_only``.  ``"gdn"``: the decode functions of gated delta
        layers.  Default: all.
    strict : bool
        Raise the operator's error instead of running the wrapped backend.

    Returns
    -------
    tuple of str
        The parts that are registered.  Others are not, because the installed vLLM has other functions or parameters
        than 0.33: a warning says which, and nothing of that part has been changed.  The functions of ``"gdn"`` are
        replaced, and compared first, when a worker starts.

    Raises
    ------
    ValueError
        A part is not one of those above.
    """
    for part in parts:
        if part not in _INSTALL:
            raise ValueError(describe("parts", f"some of {', '.join(_INSTALL)}", repr(part)))
    done = []
    for part in parts or tuple(_INSTALL):
        if part not in _undo:
            undo: list[Callable[[], object]] = []
            if not _engines.unless_other("vllm", part, functools.partial(_INSTALL[part], strict, undo)):
                continue
            _undo[part] = undo
        done.append(part)
    return tuple(done)


def unregister() -> None:
    """Undo every `register`.  Backends that vLLM has created already stay as they are."""
    while _undo:
        for undo in reversed(_undo.popitem()[1]):
            undo()


def _install_ssu(strict: bool, undo: list[Callable[[], object]]) -> str:
    dispatch: Any = _engines.find_all("vllm", SSU_HOOKS)[0].module
    registry = getattr(dispatch, "_BACKEND_REGISTRY", None)
    kinds = getattr(dispatch, "MambaBackendEnum", None)
    if not isinstance(registry, dict) or any(
        getattr(kinds, name, None) not in registry for name in ("TRITON", "FLASHINFER")
    ):
        raise EngineError(
            describe(f"{DISPATCH}._BACKEND_REGISTRY", "a class for TRITON and FLASHINFER", type(registry).__name__)
        )
    for name in ("TRITON", "FLASHINFER"):
        kind = getattr(kinds, name)
        undo.append(functools.partial(registry.__setitem__, kind, registry[kind]))
        registry[kind] = _backend(registry[kind], strict)
    return "vLLM's Mamba layers run selective_state_update by cute_ssm"


def _backend(wrapped: type[Any], strict: bool) -> type[Any]:
    """Return a backend of selective_state_update that goes before the wrapped class."""

    class CuteSsmBackend(wrapped):  # type: ignore[misc]
        def __init__(self, mamba_config: Any) -> None:
            super().__init__(mamba_config)
            self.cute_ssm = Call(f"vLLM's selective_state_update ({super().name})", strict)

        @property
        def name(self) -> str:
            return f"cute_ssm, else {super().name}"

        def __call__(
            self,
            state: Tensor,
            x: Tensor,
            dt: Tensor,
            A: Tensor,
            B: Tensor,
            C: Tensor,
            D: Tensor,
            dt_bias: Tensor,
            **options: Any,
        ) -> None:
            tensors = (state, x, dt, A, B, C, D, dt_bias)

            def ours() -> None:
                if options.get("state_batch_indices") is not None and options.get("out") is not None:
                    options["out"].zero_()  # rows of padding, which the operator skips, must be finite
                compat.selective_state_update(
                    *tensors,
                    **options,
                    enable_stochastic_rounding=self._mamba_config.enable_stochastic_rounding,
                    cache_philox_rounds=self._mamba_config.stochastic_rounding_philox_rounds,
                    write_padded_rows=False,
                )

            self.cute_ssm(ours, lambda: super(CuteSsmBackend, self).__call__(*tensors, **options))

    return CuteSsmBackend


def _install_replay(strict: bool, undo: list[Callable[[], object]]) -> str:
    (module, original), _, (_, output_only) = _engines.find_all("vllm", REPLAY_HOOKS)
    dispatch: Any = module
    if "_flashinfer_replayssm_kernel" not in vars(dispatch):
        raise EngineError(describe(f"{DISPATCH}._flashinfer_replayssm_kernel", "to be there", "no such variable"))
    ours = _engines.parameters(flashinfer.checkpointing_ssu)

    replaced: Callable[..., Any] | None = None

    def use_ring() -> None:
        nonlocal replaced
        kernel = dispatch._flashinfer_replayssm_kernel
        if kernel is None or kernel is replaced:  # a model without Mamba layers leaves it as it is
            return
        theirs = _engines.parameters(kernel)
        if theirs != ours:
            found = f"({theirs}) in flashinfer-python {_engines.version('flashinfer-python')}"
            reason = describe("flashinfer.mamba.checkpointing_ssu", f"({ours})", found)
            env.logger().warning("cute_ssm is not used by vLLM for replay: %s", reason)
            return
        call = Call("FlashInfer's checkpointing_ssu in vLLM", strict)
        dispatch._flashinfer_replayssm_kernel = replaced = _either(kernel, flashinfer.checkpointing_ssu, call)

    _after(original, use_ring, undo)
    step = compat.selective_state_update_replayssm_output_only
    _rebind(output_only, _either(output_only, step, Call(f"vLLM's {OUTPUT_ONLY}", strict)), undo)
    return "vLLM's ReplaySSM runs by cute_ssm"


def _install_gdn(strict: bool, undo: list[Callable[[], object]]) -> str:
    """Replace the functions when a worker starts: importing their modules initialises CUDA, too early for a plugin."""
    start = _engines.find("vllm", START).value
    installed = False

    def install() -> None:
        nonlocal installed
        if not installed:
            installed = _engines.unless_other("vllm", "gdn", functools.partial(_replace_gdn, strict, undo))

    _after(start, install, undo)
    return "vLLM's gated delta layers will decode by cute_ssm"


def _replace_gdn(strict: bool, undo: list[Callable[[], object]]) -> str:
    packed, gating = (hooked.value for hooked in _engines.find_all("vllm", GDN_HOOKS))
    call = functools.partial(Call, strict=strict)

    ours: Callable[..., Any] = gated_delta.fused_recurrent_gated_delta_rule_packed_decode

    def step(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["out"].zero_()  # rows of padding
        return ours(*bound.args, **bound.kwargs, write_padded_rows=False)

    signature = inspect.signature(packed)
    _rebind(packed, _either(packed, step, call(f"vLLM's {packed.__name__}")), undo)
    update = gated_delta.fused_sigmoid_gating_delta_rule_update
    _rebind(gating, _either(gating, update, call(f"vLLM's {gating.__name__}")), undo)
    return "vLLM's gated delta layers decode by cute_ssm"


def _after(start: Callable[..., Any], then: Callable[[], None], undo: list[Callable[[], object]]) -> None:
    """Run something after each time that a worker has chosen its SSU backend, which all do once they have a cache."""

    @functools.wraps(start)
    def initialize(*args: Any, **kwargs: Any) -> None:
        start(*args, **kwargs)
        then()

    _rebind(start, initialize, undo)


def _either(theirs: Callable[..., Any], ours: Callable[..., Any], call: Call) -> Callable[..., Any]:
    """Return a function that runs one of two with the same parameters."""

    @functools.wraps(theirs)
    def either(*args: Any, **kwargs: Any) -> Any:
        return call(lambda: ours(*args, **kwargs), lambda: theirs(*args, **kwargs))

    return either


def _rebind(original: Callable[..., Any], replacement: Callable[..., Any], undo: list[Callable[[], object]]) -> None:
    name = original.__name__
    _engines.rebind(name, original, replacement)
    undo.append(functools.partial(_engines.rebind, name, replacement, original))


_INSTALL: dict[str, Callable[[bool, list[Callable[[], object]]], str]] = {
    "ssu": _install_ssu,
    "replay": _install_replay,
    "gdn": _install_gdn,
}
