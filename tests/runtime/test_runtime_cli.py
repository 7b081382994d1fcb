"""``python -m cute_ssm env | cache``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tiny_spec import TinySpec

import cute_ssm
from cute_ssm import arch, env, runtime
from cute_ssm.__main__ import main
from cute_ssm.runtime import doctor, toolchain

GOOD = doctor.Facts(
    python="3.12.1",
    torch="2.13.0",
    torch_cuda="12.9",
    dsl={"nvidia-cutlass-dsl": "4.8.1", "nvidia-cutlass-dsl-libs-cu12": "4.8.1"},
    cuda_python="12.9.4",
    cuda_bindings="12.9.4",
    tvm_ffi="0.1.15.post2",
    compiler_cuda="cu12",
    driver_cuda="12.9",
    gpus=[doctor.Gpu("H200", "9.0", "sm_90a")],
    ptxsim=True,
    cache_dir=Path("/cache"),
    cache_writable=True,
)


def test_a_good_installation_has_no_problems():
    assert doctor.problems(GOOD) == []
    assert doctor.backends(GOOD)["cuda"] == "yes: cuda:0 (sm_90a)"


def test_bindings_for_cuda_13_run_beside_a_compiler_for_cuda_12_if_the_driver_is_for_cuda_13():
    assert doctor.problems(dataclasses.replace(GOOD, cuda_bindings="13.4.4", driver_cuda="13.0")) == []


def test_without_a_driver_no_version_is_too_new_for_it():
    no_gpu = dataclasses.replace(GOOD, driver_cuda=None, gpus=[], torch_cuda=None)
    assert doctor.problems(dataclasses.replace(no_gpu, cuda_bindings="13.4.4", compiler_cuda="cu13")) == []


@pytest.mark.parametrize(
    ("change", "broken", "what", "fix"),
    [
        ({"python": "3.9.2"}, True, "older than 3.10", "newer Python"),
        ({"torch": None, "torch_cuda": None, "gpus": []}, True, "torch is not installed", "'torch>=2.11,<2.14'"),
        ({"torch": "2.9.0"}, False, "outside the tested", "'torch>=2.11,<2.14'"),
        ({"torch_cuda": None, "gpus": []}, False, "built for the CPU only", "--force-reinstall"),
        ({"torch_cuda": "13.0"}, False, "libraries for CUDA 12", "'cute-ssm[cu13]'"),
        ({"cuda_bindings": "13.4.4"}, True, "needs a driver for CUDA 13", "'cuda-python>=12.8,<13'"),
        ({"compiler_cuda": "cu13"}, True, "the driver is for CUDA 12.9", "uninstall nvidia-cutlass-dsl-libs-cu13"),
        ({"dsl": {}}, True, "nvidia-cutlass-dsl is not installed", "'nvidia-cutlass-dsl>=4.8.0,<4.9'"),
        ({"dsl": {"nvidia-cutlass-dsl": "4.9.0"}}, True, "4.9.0 is not", "'nvidia-cutlass-dsl>=4.8.0,<4.9'"),
        (
            {"dsl": {"nvidia-cutlass-dsl": "4.8.1", "nvidia-cutlass-dsl-libs-cu12": "4.8.2"}},
            *(True, "parts of the compiler have different versions", "--force-reinstall"),
        ),
        ({"tvm_ffi": "0.2.0"}, True, "apache-tvm-ffi 0.2.0 is not", "'apache-tvm-ffi>=0.1.11,<0.2'"),
        ({"compiler_error": "ImportError: no"}, True, "the compiler fails: ImportError: no", "--force-reinstall"),
        ({"gpus": [doctor.Gpu("RTX", "8.9", None)]}, False, "cannot run the kernels", "reference"),
        ({"ptxsim": False}, False, "ptxsim is not importable", "pip install"),
        ({"cache_writable": False}, False, "cannot be written", "CUTE_SSM_CACHE_DIR"),
        ({"settings_error": "CUTE_SSM_LOG: expected"}, True, "CUTE_SSM_LOG: expected", "unset CUTE_SSM_LOG"),
        ({"variables": {"CUTE_SSM_CAHCE": "0"}}, False, "CUTE_SSM_CAHCE is not a variable", "unset CUTE_SSM_CAHCE"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_each_problem_comes_with_its_fix(change, broken, what, fix):
    (problem,) = doctor.problems(dataclasses.replace(GOOD, **change))
    assert problem.broken is broken
    assert what in problem.what
    assert fix in problem.fix


def test_env(settings, tmp_path, capsys):
    settings(CACHE_DIR=tmp_path / "new")
    code = main(["env", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == int(any(problem["broken"] for problem in report["problems"]))
    assert report["versions"]["cute_ssm"] == cute_ssm.__version__
    assert report["cache"] == {"folder": str(tmp_path / "new"), "writable": True, "objects": 0, "bytes": 0}
    assert report["environment"] == {"CUTE_SSM_CACHE_DIR": str(tmp_path / "new")}
    assert not (tmp_path / "new").exists(), "looking changes nothing"
    assert main(["env"]) == code
    text = capsys.readouterr().out
    for row in env.VARIABLES:
        assert row.name in text


def test_a_bad_variable_is_reported(settings, capsys):
    settings(LOG="loud")
    assert main(["env"]) == 1
    assert "BROKEN: CUTE_SSM_LOG: expected one of off, compile, calls, got 'loud'" in capsys.readouterr().out
    assert main(["cache", "ls"]) == 2
    assert "CUTE_SSM_LOG: expected" in capsys.readouterr().err


def test_cache(settings, tmp_path, capsys, monkeypatch):
    settings(CACHE_DIR=tmp_path)
    monkeypatch.setattr(toolchain, "sources_changed", lambda: False)
    (tmp_path / "precious.o").write_text("not ours")
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c" / "meta.json").write_text("not ours either")
    runtime.get(TinySpec(), arch=arch.SM_90A)
    with monkeypatch.context() as context:
        context.setattr(cute_ssm, "__version__", "0.0.1")
        runtime.forget()
        runtime.get(TinySpec(), arch=arch.SM_100A)

    main(["cache", "ls"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "sm_90a" in lines[0]
    assert "tiny-float32-" in lines[0]
    main(["cache", "ls", "--all"])
    assert len(capsys.readouterr().out.splitlines()) == 3

    assert main(["cache", "clear"]) == 0
    assert not (tmp_path / cute_ssm.__version__).exists()
    assert len(list(tmp_path.rglob("tiny*.o"))) == 1
    assert main(["cache", "clear", "--all"]) == 0
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["a/b/c/meta.json", "precious.o"]


def test_the_cache_can_be_off_or_absent(settings, tmp_path, capsys):
    settings(CACHE="0")
    assert main(["cache", "clear"]) == 0
    assert "off" in capsys.readouterr().out
    settings(CACHE="1", CACHE_DIR=tmp_path / "absent")
    assert main(["cache", "ls"]) == main(["cache", "clear", "--all"]) == 0
