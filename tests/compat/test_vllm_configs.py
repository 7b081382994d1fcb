"""vLLM's tuned-config files: names, search, selection, override, and what they become here."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os

import pytest
import torch

from cute_ssm import arch
from cute_ssm.compat import vllm
from cute_ssm.compat.vllm import configs as vllm_configs
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.ops.selective_state_update import config as selective_step

DEVICE = "NVIDIA_H200"
TABLE = {"8192": (8, 2), "12288": (16, 1), "64": (4, 1)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of configs that the variable names: ``folder(text, headdim=64)`` writes a file."""
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    monkeypatch.setattr(vllm, "get_ssm_device_name", lambda: DEVICE)
    vllm.clear_ssm_config_caches()

    def write(content, headdim=64, dstate=128, dtype="float32", into=tmp_path):
        path = into / vllm.get_ssm_config_file_name(headdim, dstate, dtype, DEVICE)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        vllm.clear_ssm_config_caches()
        return path

    yield write
    vllm.clear_ssm_config_caches()


def entries(table):
    return {key: {"BLOCK_SIZE_M": m, "num_warps": w} for key, (m, w) in table.items()}


def optimal(batch, dtype="float32"):
    return vllm.try_get_optimal_ssm_config(64, 128, batch, 1, dtype, False)


def test_calls_by_position_are_those_of_vllm():
    assert vllm._CONFIGS_DIR.endswith(os.path.join("configs", "selective_state_update"))
    vllm.clear_ssm_config_caches()
    assert vllm.try_get_optimal_ssm_config(64, 128, 4, 8, "float32", False) == (4, 4)
    with pytest.raises(TypeError):
        vllm.try_get_optimal_ssm_config(64, 128, 32, "float32")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "NVIDIA_H200"),
        ("NVIDIA H20-3e", "NVIDIA_H20-3e"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "NVIDIA_RTX_PRO_6000_Blackwell_Server_Edition"),
        ("AMD Instinct MI350 / OAM", "AMD_Instinct_MI350_OAM"),
        ("Intel(R) Arc(TM) Pro B60 Graphics", "Intel(R)_Arc(TM)_Pro_B60_Graphics"),
    ],
)
def test_device_name(device, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: device)
    assert vllm.get_ssm_device_name() == name


def test_file_name():
    want = "headdim=64,dstate=128,device_name=NVIDIA_H200,cache_dtype=float32.json"
    assert vllm.get_ssm_config_file_name(64, 128, "float32", "NVIDIA_H200") == want


def test_a_file_is_read(folder, monkeypatch):
    folder({"triton_version": "3.6.0", "note": {"BLOCK_SIZE_M": 1}, **entries(TABLE)})
    assert vllm.get_ssm_configs(64, 128, "float32") == {int(k): v for k, v in entries(TABLE).items()}
    assert vllm.get_ssm_configs(64, 64, "float32") is None
    monkeypatch.setattr(vllm, "get_ssm_device_name", lambda: "NVIDIA_B200")
    vllm.get_ssm_configs.cache_clear()
    assert vllm.get_ssm_configs(64, 128, "float32") is None


def test_the_variable_goes_before_the_folder_of_the_package(folder, tmp_path, monkeypatch):
    bundled = tmp_path / "bundled"
    bundled.mkdir()
    monkeypatch.setattr(vllm, "_CONFIGS_DIR", str(bundled))
    folder(entries({"1": (32, 2)}), into=bundled)
    assert optimal(7) == (32, 2)
    folder("[no object]")
    assert optimal(7) == (32, 2), "a file that holds no object is passed by"
    folder(entries({"1": (8, 1)}))
    assert optimal(7) == (8, 1)


def test_batch_times_heads_chooses(folder):
    folder(entries(TABLE))
    assert vllm.try_get_optimal_ssm_config(64, 128, 128, 64, "float32", False) == (8, 2)
    assert vllm.try_get_optimal_ssm_config(64, 128, 64, 1, "float32", True) == (4, 1)


@pytest.mark.parametrize(
    ("batch", "config"),
    [(1, (4, 1)), (64, (4, 1)), (4127, (4, 1)), (4128, (8, 2)), (10200, (8, 2)), (10240, (8, 2)), (10300, (16, 1))],
)
def test_the_nearest_key_by_linear_distance_and_the_first_of_two(folder, batch, config):
    folder(entries(TABLE))
    assert optimal(batch) == config


def test_bfloat16_takes_the_file_of_float16(folder):
    folder(entries({"1": (32, 2)}), dtype="float16")
    assert optimal(7, "bfloat16") == optimal(7, "torch.float16") == (32, 2)
    assert optimal(7, "float32") == (4, 4)


def test_what_vllm_falls_back_to(folder):
    want = {16: (32, 4), 32: (16, 4), 64: (8, 4), 128: (4, 4), 256: (4, 8)}
    for dstate, config in want.items():
        assert vllm.try_get_optimal_ssm_config(64, dstate, 8, 1, "float32", False) == config
        assert vllm._get_default_ssm_launch_config(dstate, False) == config
    assert vllm.try_get_optimal_ssm_config(64, 128, 8, 1, "float32", True) == (32, 8)
    assert vllm._try_get_optimal_ssm_config_cached(64, 256, 8, 1, "float32", True) == (32, 8)


def test_no_variable_no_file(folder, monkeypatch):
    folder(entries(TABLE))
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER")
    assert optimal(8192) == (4, 4)


def test_choices_are_memorised_until_cleared(folder):
    path = folder(entries({"1": (32, 2)}))
    assert optimal(7) == (32, 2)
    path.unlink()
    assert optimal(7) == (32, 2)
    vllm.clear_ssm_config_caches()
    assert optimal(7) == (4, 4)


def test_found_and_not_found_are_logged_once(folder, caplog):
    path = folder(entries(TABLE))
    caplog.set_level(logging.INFO, logger="cute_ssm")
    for batch in range(5):
        optimal(batch)
        vllm.try_get_optimal_ssm_config(80, 128, batch, 1, "float32", False)
    found = [m for m in caplog.messages if str(path) in m]
    missing = [m for m in caplog.messages if "headdim=80" in m]
    assert (len(found), len(missing)) == (1, 1)


@pytest.mark.parametrize("content", ["[1, 2]", "3", "{", ""])
def test_a_file_that_holds_no_object_is_ignored_and_logged(folder, caplog, content):
    path = folder(content)
    caplog.set_level(logging.WARNING, logger="cute_ssm")
    assert vllm.get_ssm_configs(64, 128, "float32") is None
    assert len(caplog.messages) == 1
    assert str(path) in caplog.messages[0]


def test_an_empty_table_means_that_no_config_is_wanted(folder):
    folder({"triton_version": "3.6.0"})
    assert vllm.get_ssm_configs(64, 128, "float32") == {}
    state = torch.zeros(2, 8, 64, 128)
    assert vllm._tuned(state, state[..., 0], 2, False) is None
    assert optimal(8) == (4, 4)


@pytest.mark.parametrize(
    "entry",
    [
        {"BLOCK_SIZE_M": 8},
        {"BLOCK_SIZE_M": 8, "num_warps": 0},
        {"BLOCK_SIZE_M": 8.5, "num_warps": 1},
        {"BLOCK_SIZE_M": 8, "num_warps": True},
        [8, 1],
        None,
    ],
)
def test_a_broken_entry_is_left_out_and_logged(folder, caplog, entry):
    folder({"8": entry, **entries({"64": (4, 1)})})
    caplog.set_level(logging.WARNING, logger="cute_ssm")
    assert optimal(8) == (4, 1)
    assert "key 8 is ignored" in caplog.text


def test_the_override_wins_and_nests(folder):
    folder(entries(TABLE))
    with vllm.override_ssm_config((128, 8)):
        assert optimal(8192) == (128, 8)
        with vllm.override_ssm_config((1, 1)):
            assert optimal(8192) == (1, 1)
        with vllm.override_ssm_config(None):
            assert optimal(8192) == (8, 2)
        assert optimal(8192) == (128, 8)
    with pytest.raises(KeyError), vllm.override_ssm_config((1, 1)):
        raise KeyError
    assert optimal(8192) == (8, 2)


@pytest.mark.parametrize("config", [(4,), (4, 0), ("4", 1), 8, (4.0, 1), (True, 1)])
def test_an_override_that_is_no_pair(config):
    with pytest.raises(ValueError, match=r"config: expected \(BLOCK_SIZE_M, num_warps\), two positive integers, got"):
        with vllm.override_ssm_config(config):
            pass


@pytest.mark.parametrize("dim", [8, 24, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "torch.float16"])
def test_every_config_becomes_one_that_the_kernel_can_run(dim, dtype):
    for dstate, packed, rows, warps in itertools.product(
        (16, 100, 128, 256), (False, True), (1, 4, 64, 256), (1, 4, 8, 32)
    ):
        fields = vllm_configs.as_override(dim, dstate, dtype, packed, (rows, warps))
        spec = vllm_configs._spec(dim, dstate, dtype.removeprefix("torch."), packed)
        for target, heads in itertools.product(arch.ARCHS.values(), (1, 100000)):
            chosen = selective_step.choose(spec, target, heads, 132)
            config = dataclasses.replace(chosen, **fields)
            try:
                config.check(spec, target)
            except UnsupportedSpecError as error:
                pytest.fail(str(error))
            assert config.ctas_per_sm * config.shared_bytes(spec) <= target.shared_bytes


def test_a_cta_gets_the_rows_of_one_program():
    for block, warps in ((32, 4), (64, 4), (64, 2), (16, 1), (64, 1)):
        fields = vllm_configs.as_override(64, 128, "float16", False, (block, warps))
        assert (fields["rows"] * fields["warps"], fields["warps"]) == (block, warps)


@pytest.mark.parametrize("call", [(64, 128, "float64"), (12, 128, "float32"), (64, 512, "float32")])
def test_what_no_kernel_computes_has_no_config(call):
    assert vllm_configs.as_override(*call, False, (4, 1)) is None
