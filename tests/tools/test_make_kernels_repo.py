"""The repository for the package `kernels`: its layout, and that it runs without an installed cute_ssm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import make_kernels_repo
import pytest

import cute_ssm

PACKAGE = Path(cute_ssm.__file__).parent
# The part of `kernels` that imports a variant: a module whose name is the id, from a file.
IMPORT = """
import importlib.util, json, sys
from pathlib import Path
def load(folder):
    variant = Path(folder) / "build" / "torch-universal"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""
KERNELS = """
from pathlib import Path
from kernels import get_local_kernel
def load(folder):
    return get_local_kernel(Path(folder))
"""
RUN = """
import sys
loaded = load(sys.argv[1])
import torch
assert sys.modules["cute_ssm"].__file__.startswith(sys.argv[1]), sys.modules["cute_ssm"].__file__
state, x, out = torch.zeros(3, 2, 16, 16), torch.ones(3, 2, 16), torch.empty(3, 2, 16)
A, columns = -torch.ones(2, 16, 16), torch.ones(3, 1, 16)
loaded.selective_state_update(state, x, x, A, columns, columns, out=out)
assert (out == 16).all() and (state == 1).all()
assert loaded.compat.__name__ == "cute_ssm.compat"
assert "gated_delta_rule_mtp" in dir(loaded)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("kernels") / "repository"
    assert make_kernels_repo.main([str(out), "--version", "3"]) == 0
    return out


def run(code, repository, tmp_path):
    """Run code in a new process that finds no other cute_ssm first."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, str(repository)]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_layout(repository):
    variant = repository / "build" / "torch-universal"
    assert {path.name for path in repository.iterdir()} == {"README.md", "LICENSE", "NOTICE", "build"}
    assert {path.name for path in variant.iterdir()} == {"metadata.json", "__init__.py", "cute_ssm"}
    copied = {path.relative_to(variant / "cute_ssm") for path in make_kernels_repo.files(variant / "cute_ssm")}
    assert copied == {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.*") if "__pycache__" not in path.parts}
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["id"].isidentifier()
    assert (metadata["name"], metadata["version"]) == ("cute-ssm", 3)
    assert metadata["backend"] == {"type": "cuda", "archs": ["9.0a", "10.0a", "10.3a"]}
    card = (repository / "README.md").read_text()
    assert card.startswith("---\n") and "version=3" in card and "`selective_state_update`" in card


def test_an_id_belongs_to_contents(repository, tmp_path):
    variant = repository / "build" / "torch-universal"
    first = make_kernels_repo.metadata(variant, 1)["id"]
    assert first == make_kernels_repo.metadata(variant, 1)["id"] != make_kernels_repo.metadata(variant, 2)["id"]
    (tmp_path / "__init__.py").write_text("")
    assert make_kernels_repo.metadata(tmp_path, 1)["id"] != first


def test_it_runs_from_its_folder(repository, tmp_path):
    done = run(IMPORT + RUN, repository, tmp_path)
    assert done.returncode == 0, done.stderr


def test_another_version_in_the_process_is_refused(repository, tmp_path):
    other = "import sys, types\nother = sys.modules['cute_ssm'] = types.ModuleType('cute_ssm')\n"
    done = run(other + "other.__version__, other.__file__ = '0.0.1', 'there'\n" + IMPORT + RUN, repository, tmp_path)
    assert "ImportError: cute_ssm: expected version" in done.stderr
    assert "got 0.0.1, which this process has imported from there" in done.stderr


def test_a_folder_that_exists_is_not_written(tmp_path, capsys):
    assert make_kernels_repo.main([str(tmp_path)]) == 2
    assert "out: expected a folder that does not exist" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.peers
def test_kernels_loads_it(repository, tmp_path):
    pytest.importorskip("kernels", minversion="0.17")
    done = run(KERNELS + RUN, repository, tmp_path)
    assert done.returncode == 0, done.stderr
