"""`gpumodel.validate.hosted` and `packages`: host code of other projects runs on CPU tensors."""

from __future__ import annotations

import sys

import pytest

import gpumodel
import ptxsim
from gpumodel.validate import hosted, packages

HOST = """
import functools
import small_cute
import torch
from cuda.bindings import driver
from cutlass import Int32, cute
from cutlass.cute.runtime import from_dlpack
from .absent import dispatch, get_compute_capability

compiled_kernels = {}
asked = []
Either = get_compute_capability | None


@dispatch("name")
def double(x, waves):
    asked.append((get_compute_capability(x.device), torch.cuda.get_device_properties(0).multi_processor_count))
    ctas = waves * asked[-1][1]
    stream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
    if "double" not in compiled_kernels:
        given = from_dlpack(x, assumed_align=16).mark_layout_dynamic()
        compiled_kernels["double"] = cute.compile[()](
            small_cute.launch, given, Int32(1), stream, options="--enable-tvm-ffi"
        )
    compiled_kernels["double"](from_dlpack(x), ctas, stream)
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    (folder / "peer").mkdir()
    (folder / "peer" / "host.py").write_text(HOST)
    return packages.kernels_of(folder, "peer.host", lambda name: name == "peer.host")


@pytest.mark.parametrize("arch, capability", [("sm_100a", (10, 0)), ("sm_90a", (9, 0))])
def test_host_code_compiles_and_launches_as_on_its_gpu(module, arch, capability):
    import torch

    x = torch.ones(2 * 148 * 32)
    with ptxsim.emulate(arch=arch) as session, hosted.on_emulator(148, module):
        module.double(x, 1)
        module.double(x, 2)
    assert module.asked[-1] == (capability, 148)
    assert [launch.grid[0] for launch in session.launches] == [148, 296]
    assert (x[: 148 * 32] == 4).all() and (x[148 * 32 :] == 2).all()
    assert f".target {arch}" in session.functions[0].ptx, "what was compiled for another target is forgotten"


def test_names_are_given_back(module):
    from cutlass import cute

    before = cute.compile, vars(module)["from_dlpack"]
    with ptxsim.emulate(arch="sm_100a"), hosted.on_emulator(148, module):
        assert vars(module)["from_dlpack"] is hosted.handed and isinstance(cute.compile, hosted.Compiler)
    assert (cute.compile, vars(module)["from_dlpack"]) == before
    assert not any(name == "peer" or name.startswith("peer.") for name in sys.modules)


def test_marks_make_modes_dynamic():
    import torch

    tensor = torch.zeros(4, 8, 16, dtype=torch.bfloat16)
    assert hosted.handed(tensor).shape == [4, 8, 16]
    rows = hosted.handed(tensor).mark_compact_shape_dynamic(0, (0, 1, 2), 1)
    assert rows.shape[1:] == [8, 16] and rows.shape[0] != 4 and rows.strides == [128, 16, 1]
    free = hosted.handed(tensor).mark_layout_dynamic(leading_dim=1)
    assert free.strides[1] == 1 and all(isinstance(n, type(rows.shape[0])) for n in free.shape)
    with pytest.raises(ValueError, match="mode, divisibility: expected 0 and 1, got 1 and 1"):
        hosted.handed(tensor).mark_compact_shape_dynamic(1, (0, 1, 2), 1)


def test_the_machines_of_recordings_have_the_multiprocessors_of_their_keys():
    from gpumodel.validate import points

    found = [point for point in points.read()[0] if "sms" in point.keys]
    assert found and all(point.keys["sms"] == gpumodel.MACHINES[point.gpu].sms for point in found)
