"""The emulator and the machine model are packages of their own: what is said where they are not installed."""

from __future__ import annotations

import sys

import pytest

from cute_ssm.demo import cli
from cute_ssm.runtime import companions, doctor
from cute_ssm.tuner import objectives

BOTH = "pip install ./tools/ptxsim ./tools/gpumodel"


@pytest.fixture
def absent(monkeypatch):
    """``absent(name)``: make a package look as if it were not installed."""

    def hide(name):
        for known in [known for known in sys.modules if known.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, known)
        monkeypatch.setitem(sys.modules, name, None)

    return hide


@pytest.mark.parametrize(("gone", "name"), [("ptxsim", "ptxsim"), ("gpumodel", "gpumodel"), ("ptxsim", "gpumodel")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(absent, gone, name):
    absent(gone)
    with pytest.raises(ImportError, match=rf"not installed: {gone}; .*pip install .*\./tools/{name}$"):
        companions.require(name)


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "ptxsim").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "ptxsim", raising=False)
    assert companions.missing("ptxsim") == ["ptxsim"]


def test_installed_packages_are_returned():
    assert companions.require("gpumodel").__name__ == "gpumodel"
    assert companions.missing("gpumodel") == []


@pytest.mark.parametrize("name", ["ptxsim", "gpumodel"])
def test_objective_that_needs_a_missing_package_says_how_to_get_it(absent, name):
    absent(name)
    with pytest.raises(ValueError, match=f"--objective: expected model, which needs {name}, got none; .*{BOTH}"):
        objectives.create("model")


def test_auto_objective_counts_where_the_machine_model_is_missing(absent, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert isinstance(objectives.create("auto"), objectives.Model)
    absent("gpumodel")
    assert isinstance(objectives.create("auto"), objectives.Counters)


def test_demo_says_how_to_get_the_emulator(absent):
    absent("ptxsim")
    with pytest.raises(ImportError, match=r"backend: .*pip install ./tools/ptxsim"), cli._backend("emulate"):
        pass


def test_doctor_says_how_to_get_the_emulator(absent):
    absent("ptxsim")
    (problem,) = [p for p in doctor.problems(doctor.gather()) if "ptxsim" in p.what]
    assert not problem.broken
    assert "pip install ./tools/ptxsim" in problem.fix


def test_doctor_finds_nothing_broken_where_bundles_stand_for_the_compiler():
    gpu = doctor.Gpu("NVIDIA H200", "9.0", "sm_90a")
    known = {"torch": "2.11.0", "tvm_ffi": "0.1.15", "torch_cuda": "13.0", "gpus": [gpu], "driver_cuda": "13.0"}
    facts = doctor.Facts(**known, ptxsim=True, compiler_error="no module", bundles={"kit": 3})
    assert [problem.what for problem in doctor.problems(facts) if problem.broken] == []
    assert doctor.backends(facts)["cuda"] == "yes: cuda:0 (sm_90a), kernels of bundles only: there is no compiler"
    facts.dsl = {"nvidia-cutlass-dsl-libs-cu12": "4.8.1"}  # the runtime library alone
    assert [problem.what for problem in doctor.problems(facts) if problem.broken] == []
    facts.bundles = {"kit": 0}
    assert [problem.what for problem in doctor.problems(facts) if problem.broken] == [
        "nvidia-cutlass-dsl is not installed"
    ]
    assert doctor.backends(facts)["cuda"] == "no: the compiler does not work"
