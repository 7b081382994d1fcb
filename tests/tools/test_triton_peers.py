"""tools/bench/triton_peers.py: a Triton kernel goes through the same model, by whatever wrapper launches it."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from cute_ssm import workloads

pytest.importorskip("bench", reason="tools/ is not on the path")
gpumodel = pytest.importorskip("gpumodel")
from bench import peers, triton_peers  # noqa: E402


def test_peers_without_a_triton_kernel_are_absent():
    found, absent = triton_peers.modelled("checkpointing_ssu", {"batch": 1}, "H200")
    assert not found
    assert "no Triton kernel" in absent["flashinfer"]


def test_peers_that_are_not_installed_are_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, peers.VLLM_STEP, None)
    monkeypatch.setattr(peers.util, "find_spec", lambda name: None)
    found, absent = triton_peers.modelled("selective_state_update", {"batch": 1}, "H200")
    assert not found
    assert peers.VLLM_STEP in absent["vllm"]
    assert "tuned" in absent["mamba_ssm"]


@pytest.mark.peers
@pytest.mark.parametrize("gpu", ["H200", "B200"])
def test_a_triton_kernel_has_a_modelled_time(gpu, monkeypatch):
    pytest.importorskip("triton")
    from triton_step import step

    def without_more(*args, out, null_block_id, is_blackwell, **kwargs):
        return step(*args, **kwargs)

    fake = types.ModuleType("step")
    fake.selective_state_update = without_more
    monkeypatch.setitem(sys.modules, peers.VLLM_STEP, fake)
    monkeypatch.setattr(peers.util, "find_spec", lambda name: None)
    keys = {"nheads": 4, "state_dtype": "float32"}
    few, many = (
        triton_peers.modelled("selective_state_update", {**keys, "batch": batch}, gpu)[0]["vllm"] for batch in (8, 256)
    )
    assert 1.6 < few < many
    moved = workloads.build("selective_state_update", {**keys, "batch": 256}, fill=False).floor_bytes
    assert many >= 0.5 * moved / 6e6  # microseconds: it copies the states, through a memory of a few TB/s


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """A package with a wrapper that notes what it would launch, and vLLM's way of choosing it."""
    folder = tmp_path.joinpath(*peers.VLLM_STEP.split(".")[:-1])
    folder.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('needs a GPU')")
    (folder / "mamba_ssm.py").write_text(WRAPPER)
    monkeypatch.syspath_prepend(tmp_path)


WRAPPER = """
import contextlib, functools
from vllm.platforms import current_platform  # not there without a GPU

pinned, launched = [], []

def get_ssm_device_name():
    return current_platform.get_device_name()

@functools.cache
def get_ssm_configs(headdim, dstate, dtype):
    return {8: (8, 1), 4096: (16, 2)} if get_ssm_device_name() == "NVIDIA_H200" else {}

@functools.cache
def _try_get_optimal_ssm_config_cached(*a):
    pass

def try_get_optimal_ssm_config(headdim, dstate, batch, nheads, dtype, is_blackwell):
    table = get_ssm_configs(headdim, dstate, dtype)
    return table[min(table, key=lambda k: abs(k - batch * nheads))] if table else (32, 8) if is_blackwell else (4, 4)

@contextlib.contextmanager
def override_ssm_config(config):
    pinned.append(config)
    yield
    pinned.pop()

def selective_state_update(state, **more):
    launched.append((state.shape[0], pinned[-1] if pinned else get_ssm_device_name()))
"""


@pytest.mark.parametrize("gpu,batch,want", [("H200", 2, (8, 1)), ("H200", 2048, (16, 2)), ("B200", 8, (32, 8))])
def test_vllm_launches_what_its_tables_say_for_the_whole_call(vllm, gpu, batch, want):
    machine = gpumodel.machine_of(gpu)
    call = workloads.build("selective_state_update", {"batch": 2, "nheads": 4}, fill=False)
    with triton_peers.tuned(machine, batch, call.arguments["state"]):
        peers.vllm_step(call.arguments)()
        module = sys.modules[peers.VLLM_STEP]
    assert module.launched[-1][1] == want
    assert peers.VLLM_STEP not in sys.modules


def test_on_a_gpu_the_kernels_files_alone_are_enough(vllm, monkeypatch):
    """A kit has no more of vLLM; the tables are those for the GPU."""
    call = workloads.build("selective_state_update", {"batch": 2, "nheads": 4}, fill=False)
    _, absent = peers.of("selective_state_update", [call.arguments])
    assert "needs a GPU" in absent["vllm"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    present, absent = peers.of("selective_state_update", [call.arguments])
    assert "vllm" in present, absent
    (run,) = present["vllm"]
    run()
    assert peers.vllm_kernels("NVIDIA_H200").launched == [(call.arguments["state"].shape[0], "NVIDIA_H200")]
    assert peers.VLLM_STEP not in sys.modules
