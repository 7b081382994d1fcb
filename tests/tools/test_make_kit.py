"""tools/make_kit.sh: what its archive holds, from wheels and a bundle that are given, and how it is entered."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from paths import ROOT

pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists() or None in map(shutil.which, ("git", "xz", "bash")), reason="needs a clone, git and xz"
)
TOOLS = ("", "/tools", "/tools/ptxsim", "/tools/gpumodel", "/tools/gpushim")


def wheel(folder, name, *files):
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for file in files:
            archive.writestr(file, "")


def make(folder, *options, path="", **variables):
    path = os.pathsep.join([str(path or os.path.dirname(sys.executable)), os.environ["PATH"]])
    command = ["bash", ROOT / "tools" / "make_kit.sh", *options, folder / "out"]
    return subprocess.run(
        command, env={**os.environ, **variables, "PATH": path}, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The process that made the archive, and the unpacked kit."""
    folder = tmp_path_factory.mktemp("kit")
    for name in ("wheels", "bundle/0.1.0", "peers/mamba_ssm/ops/triton", "peers/mamba_ssm-2.3.dist-info"):
        (folder / name).mkdir(parents=True)
    wheel(folder / "wheels", "pure", "pure/__init__.py")
    wheel(folder / "wheels", "nvidia_cutlass_dsl_libs_cu13", "cutlass/__init__.py")
    wheel(folder / "wheels", "numpy", "numpy/__init__.py")
    (folder / "bundle" / "0.1.0" / "kernel.so").write_bytes(b"kernel")
    (folder / "bundle" / "libcute_dsl_runtime.so").write_bytes(b"runtime")
    ops = folder / "peers" / "vllm" / "model_executor" / "layers" / "mamba" / "ops"
    (ops / "configs").mkdir(parents=True)
    for file in ("mamba_ssm.py", "triton_helpers.py", "other.py"):
        (ops / file).touch()
    (folder / "peers" / "mamba_ssm" / "__init__.py").touch()
    (folder / "peers" / "mamba_ssm" / "ops" / "triton" / "step.py").touch()
    (folder / "peers" / "mamba_ssm-2.3.dist-info" / "LICENSE").touch()
    (folder / "peers" / "vllm-0.1.dist-info" / "licenses").mkdir(parents=True)
    (folder / "peers" / "vllm-0.1.dist-info" / "licenses" / "LICENSE").touch()
    (folder / "emulated").write_bytes(b"results")
    given = {name.upper(): str(folder / name) for name in ("wheels", "bundle", "peers", "emulated")}
    done = make(folder, **given, LIMIT_MIB="1", PYTHON=f"{sys.version_info.major}.{sys.version_info.minor}")
    with tarfile.open(folder / "out" / "kit.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return done, folder / "kit"


def test_it_holds_the_checkout_as_it_is_committed(made):
    _, kit = made
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    packed = {path.relative_to(kit / "cute_ssm").as_posix() for path in (kit / "cute_ssm").rglob("*") if path.is_file()}
    assert set(listed.splitlines()) - packed <= {".gitattributes"}
    assert packed - set(listed.splitlines()) == {"COMMIT", "tools/gpu_pass/emulated.npz"}
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert (kit / "cute_ssm" / "COMMIT").read_text().split()[0] == head.strip()


def test_it_holds_kernels_and_wheels_but_no_compiler(made):
    done, kit = made
    assert (kit / "bundle" / "0.1.0" / "kernel.so").read_bytes() == b"kernel"
    assert (kit / "bundle" / "libcute_dsl_runtime.so").is_file() and "1 kernels for sm_90a" in done.stdout
    assert [path.name for path in (kit / "site").iterdir()] == ["pure"]
    assert [path.name for path in (kit / "spare").iterdir()] == ["numpy"], "of use only where PyTorch has brought none"
    assert not list(kit.rglob("cutlass")) and not list(kit.rglob("__pycache__"))


def test_of_peers_it_holds_triton_files_with_their_licences(made):
    _, kit = made
    files = {path.relative_to(kit / "peers").as_posix() for path in (kit / "peers").rglob("*") if path.is_file()}
    ops = "vllm/model_executor/layers/mamba/ops"
    assert files == {
        *("mamba_ssm/ops/triton/step.py", "licence-mamba_ssm/LICENSE", "licence-vllm/LICENSE"),
        *(f"{ops}/mamba_ssm.py", f"{ops}/triton_helpers.py"),
    }


def test_too_large_an_archive_is_refused_and_its_size_and_checksum_told(made):
    done, kit = made
    archive = kit.parent / "out" / "kit.tar.xz"
    assert done.returncode == 1, done.stderr
    assert done.stderr.endswith("make_kit: the archive is larger than 1 MiB\n")
    assert f"kit.tar.xz: {archive.stat().st_size} bytes" in done.stdout
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert archive.with_name("kit.tar.xz.sha256").read_text() == f"{digest}  kit.tar.xz\n"


SHOW = """
import os, sys, pathlib
import cute_ssm, gpumodel, gpushim, ptxsim
assert all(module.__file__ for module in (gpumodel, gpushim, ptxsim)), "a folder of tools is no package"
from bench import outputs
from cute_ssm import env
print(pathlib.Path(cute_ssm.__file__).parents[1], pathlib.Path.cwd(), *env.settings().aot_dirs, outputs.commit())
"""


def test_a_command_runs_in_it_from_anywhere(made, tmp_path):
    _, kit = made
    own = kit / "cute_ssm"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CUTE_SSM", "PYTHON"))}
    environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    command = [kit / "enter", sys.executable, "-c", SHOW]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [str(own), str(own), str(kit / "bundle"), (own / "COMMIT").read_text().split()[0]], (
        done.stderr
    )


def test_another_python_than_that_of_the_kit_is_refused(made, tmp_path):
    """The binding of the kernels' libraries is for one version."""
    _, kit = made
    (tmp_path / "python3").write_text("#!/bin/sh\necho 3.4\n")
    (tmp_path / "python3").chmod(0o755)
    command = [kit / "enter", "python3", "-c", "pass"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"kit/enter: expected python3 to be Python {own}, for which the kit was made, got Python 3.4\n"
    )


STUB = """#!/bin/sh
echo "$@" >>"$SAID"
case $1 in
-c) echo 0123456789abcdef ;;
tools/build_aot.py) while [ "$1" != --out ]; do shift; done; mkdir -p "$2"; touch "$2/kernel.so" ;;
-m) mkdir -p "$5/nvidia_cutlass_dsl/cu13/lib"; touch "$5/nvidia_cutlass_dsl/cu13/lib/libcute_dsl_runtime.so" ;;
esac
"""


@pytest.mark.parametrize(
    ("options", "kernels", "results"), [((), "", ""), (("--sms", "132,114"), " --sms 132 114", " --sms 132")]
)
def test_kernels_and_results_are_those_of_the_gpus_sms(tmp_path, options, kernels, results):
    for folder in ("bin", "wheels"):
        (tmp_path / folder).mkdir()
    wheel(tmp_path / "wheels", "nvidia_cutlass_dsl_libs_cu13", "cutlass/__init__.py")
    (tmp_path / "bin" / "python3").write_text(STUB)
    (tmp_path / "bin" / "python3").chmod(0o755)
    said = tmp_path / "said"
    done = make(tmp_path, *options, path=tmp_path / "bin", SAID=str(said), WHEELS=str(tmp_path / "wheels"))
    assert done.returncode == 0, done.stderr
    lines = [line for line in said.read_text().splitlines() if line.startswith("tools/")]
    assert lines[0].endswith(f"kernels.json --arch sm_90a --tests{kernels}")
    assert lines[1].startswith("tools/build_aot.py") and "kernels.json --register gpu_pass.probes:register" in lines[1]
    assert lines[2] == f"tools/gpu_check.py emulate --arch sm_90a{results}"


def test_a_bundle_of_other_sources_is_refused(tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "meta.json").write_text('{"sources": "0123"}')
    done = make(tmp_path, BUNDLE=str(tmp_path / "bundle"))
    assert done.returncode == 1
    assert re.search(r"the commit's sources are [0-9a-f]{16}, not those of .*meta.json", done.stderr)
    assert not (tmp_path / "out" / "kit.tar.xz").exists()
