"""What suites import from their packages: the functions of `cute_ssm.compat`, and what these packages say of a GPU."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from cute_ssm.arch import Arch


def module(name: str, **members: Any) -> ModuleType:
    """Return the module of a name in ``sys.modules``, made if there is none, with members."""
    if name not in sys.modules:
        sys.modules[name] = made = ModuleType(name)
        made.__path__ = []  # a package, whatever it is
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(module(parent), last, made)
    for key, value in members.items():
        setattr(sys.modules[name], key, value)
    return sys.modules[name]


def flashinfer(folder: Path, arch: Arch) -> None:
    """``flashinfer``: nothing of the package itself is needed."""
    from cute_ssm.compat.flashinfer import gdn_decode, mamba

    def public(of: ModuleType) -> dict[str, Any]:
        return {name: value for name, value in vars(of).items() if getattr(value, "__module__", "") == of.__name__}

    capability = (int(arch.name[3:-2]), int(arch.name[-2]))
    module(
        "flashinfer.utils",
        get_compute_capability=lambda device: capability,
        is_cvt_rs_supported=lambda *_: capability[0] == 10,
        is_sm100a_supported=lambda *_: capability[0] == 10,
    )
    module("flashinfer.cute_dsl.utils", is_cute_dsl_arch_supported=lambda *_: True)
    names = public(mamba)
    module("flashinfer.mamba.checkpointing_ssu", **names)
    module("flashinfer.mamba", **{name: value for name, value in names.items() if name != "checkpointing_ssu"})
    module("flashinfer.gdn_decode", **public(gdn_decode))


def bare(folder: Path, *names: str) -> None:
    """Make packages of a folder whose modules can be imported one by one, without what their ``__init__`` imports."""
    for name in names:
        module(name).__path__ = [str(folder.joinpath(*name.split(".")))]


def mamba_ssm(folder: Path, arch: Arch) -> None:
    """``mamba_ssm``: the module of the step's Triton kernel has the oracle too."""
    from cute_ssm.compat import mamba_ssm as ours

    bare(folder, "mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")
    theirs = importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
    theirs.own_selective_state_update = theirs.selective_state_update  # type: ignore[attr-defined]
    theirs.selective_state_update = ours.selective_state_update


def mamba_ssm_own() -> dict[str, Callable[..., Any]]:
    """Return the step of ``mamba_ssm`` itself: a Triton kernel."""
    theirs = sys.modules["mamba_ssm.ops.triton.selective_state_update"]
    return {"selective_state_update": theirs.own_selective_state_update}  # type: ignore[attr-defined]


def fla(folder: Path, arch: Arch) -> None:
    """``fla``: its oracles are modules of their own."""
    from cute_ssm.compat import fla as ours

    package = "fla.ops.gated_delta_rule"
    bare(folder, "fla", "fla.ops", package)
    module("fla", __version__="")
    module(f"{package}.wy_fast", prepare_wy_repr_bwd=None, recompute_w_u_fwd=None)  # of tests that are not run
    module(package, chunk_gated_delta_rule=None, fused_recurrent_gated_delta_rule=ours.fused_recurrent_gated_delta_rule)
    importlib.import_module("fla.utils").device = "cpu"


def vllm(folder: Path, arch: Arch) -> None:
    """``vllm``: its oracles are next to the tests; the schemas of its own operators are not checked."""
    from cute_ssm.compat import vllm as ours

    def yes(*_: Any) -> bool:
        return True

    def no(*_: Any) -> bool:
        return False

    def is_family(number: int) -> bool:
        return int(arch.name[3:-2]) * 10 == number

    platform = SimpleNamespace(
        device_type="cpu", is_cuda=yes, is_cuda_alike=yes, is_cpu=no, is_rocm=no, is_xpu=no,
        is_device_capability_family=is_family,
    )  # fmt: skip
    bare(folder, "tests", "tests.kernels", "tests.kernels.mamba")
    module("tests.kernels.utils", opcheck=lambda *_, **__: None)
    torch.ops._C = SimpleNamespace(selective_scan_fwd=None)  # type: ignore[assignment]
    module("vllm._custom_ops")
    module("vllm.platforms", current_platform=platform)
    module("vllm.utils.torch_utils", set_random_seed=torch.manual_seed)
    module("vllm.v1.attention.backends.utils", NULL_BLOCK_ID=ours.NULL_BLOCK_ID)
    package = "vllm.model_executor.layers.mamba.ops"
    name = "selective_state_update_replayssm_output_only"
    module(f"{package}.{name}", **{name: getattr(ours, name)})
    module(package).mamba_ssm = ours  # type: ignore[attr-defined]
    sys.modules[f"{package}.mamba_ssm"] = ours


_IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]


class OnTheCpu(TorchFunctionMode):
    """Take "cpu" for "cuda" in every call of PyTorch, and let a suite's own files see tensors on a GPU."""

    def __init__(self, suites: Path) -> None:
        super().__init__()
        self.suites = str(suites)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "cuda":
            return args[0]
        if func == _IS_CUDA and sys._getframe(1).f_code.co_filename.startswith(self.suites):
            return True
        if name in ("to", "device"):
            args = tuple(map(_here, args))
        kwargs = {key: _here(value) if key == "device" else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


class Generator(torch.Generator):
    """A generator of the CPU, whatever device is asked for."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, device=_here(device))


def _here(device: Any) -> Any:
    if isinstance(device, str) and device.startswith("cuda"):
        return "cpu"
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    return device


@contextlib.contextmanager
def pretended_gpu(arch: Arch, suites: Path) -> Iterator[None]:
    """Let ``torch.cuda`` speak of a GPU of a target, whose tensors are on the CPU, to files in the folder `suites`."""
    capability = arch.capability
    generator = torch.Generator
    name = f"CPU in place of {arch.name}"
    properties = SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], multi_processor_count=arch.sm_count
    )
    said: Mapping[str, Any] = {
        "is_available": lambda: True,
        "get_device_capability": lambda *_: capability,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "mem_get_info": lambda *_: (4 << 30, 4 << 30),
        "get_device_name": lambda *_: name,
        "get_device_properties": lambda *_: properties,
    }
    before = {name: getattr(torch.cuda, name) for name in said}
    for name, value in said.items():
        setattr(torch.cuda, name, value)
    torch.Generator = Generator  # type: ignore[misc]
    try:
        with OnTheCpu(suites):
            yield
    finally:
        torch.Generator = generator  # type: ignore[misc]
        for name, value in before.items():
            setattr(torch.cuda, name, value)
