"""What a bundle's manifest and header say of its kernels is what the kernels take."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path

import build_aot
import pytest

from cute_ssm import arch, workloads
from cute_ssm.ops import operators
from cute_ssm.runtime import interface, registry
from cute_ssm.runtime.store import Key
from cute_ssm.workloads import plan

ROOT = Path(__file__).parents[2]
SMALL = {"op": "selective_state_update", "keys": {"nheads": 4, "state_dtype": "float32", "input_dtype": "float16"}}
compiler = pytest.mark.skipif(not (shutil.which("cc") and shutil.which("g++")), reason="needs a C and a C++ compiler")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "specs.json").write_text(json.dumps([{**SMALL, "batches": [2]}]))
    out = folder / "kernels"
    options = ["--specs", str(folder / "specs.json"), "--arch", "sm_90a", "--jobs", "1", "--with-runtime"]
    assert build_aot.main([*options, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("op", workloads.OPERATORS)
def test_arguments_are_those_of_the_operators_table(op):
    """Names, in order; what is written; sizes that are equal have one name, which is that of the first."""
    (operator,) = [found for found in operators() if found.name == op]
    table = operator.module("arguments").TABLE
    for kernel in plan.of_call(op, workloads.small(op), arch.SM_90A):
        found = interface.entry(Key(*kernel))
        assert found["symbol"] == Key(*kernel).function
        arguments = {one["name"]: one for one in found["arguments"]}
        assert list(arguments)[: len(table.tensors)] == list(table.tensors)
        fakes = registry.kernel_class(kernel[0])(*kernel).fakes()
        assert len(arguments) == len(fakes) - 1, "all but the stream, which comes from the environment"
        for (name, one), fake in zip(arguments.items(), fakes):
            if one["kind"] == "tensor":
                assert one["written"] == (name in table.written or name not in table.tensors)
                assert len(one["shape"]) == len(one["strides"]) == len(fake.shape)
                for size in one["shape"]:
                    owner, _, axis = str(size).partition(".")
                    assert isinstance(size, int) or arguments[owner]["shape"][int(axis)] == size
            else:
                assert (one["kind"] == "none") == (fake is None)


@compiler
def test_the_header_compiles_and_declares_the_functions_of_the_libraries(bundle, tmp_path):
    manifest = json.loads((bundle / "manifest.json").read_text())
    (kernel,) = [one for one in manifest if one["spec"]["type"] == "SelectiveStateUpdateSpec"]
    assert [one["name"] for one in kernel["arguments"] if one.get("written")] == ["state", "out"]
    ctypes.CDLL(str(bundle / "libcute_dsl_runtime.so"), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(bundle / kernel["file"]))
    assert getattr(library, f"__tvm_ffi_{kernel['symbol']}")
    includes = subprocess.check_output([sys.executable, "-m", "tvm_ffi.config", "--cflags"], text=True).split()
    for language, suffix in (("c", "c"), ("c++", "cpp")):
        source = tmp_path / f"use.{suffix}"
        source.write_text(
            '#include "cute_ssm_kernels.h"\n'
            f"int use(void) {{ return {kernel['symbol'].upper()}_NUM_ARGS + !__tvm_ffi_{kernel['symbol']}; }}\n"
        )
        command = ["cc" if language == "c" else "g++", "-Wall", "-Werror", "-Wno-address", "-c", str(source)]
        subprocess.run([*command, "-I", str(bundle), *includes, "-o", str(tmp_path / "use.o")], check=True)


BLOCKED = """
import runpy, sys
for name in ("torch", "cutlass", "cute_ssm"):
    sys.modules[name] = None
sys.argv = ["without_torch.py", {bundle!r}]
runpy.run_path({example!r}, run_name="__main__")
"""


@compiler
def test_a_kernel_is_loaded_without_torch_compiler_and_package(bundle):
    program = BLOCKED.format(bundle=str(bundle), example=str(ROOT / "examples" / "without_torch.py"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "refused: expected device_type=cuda" in done.stdout
    assert done.stdout.endswith("is loaded; it runs on a GPU, with CuPy's arrays\n")


@compiler
def test_a_kernel_is_called_from_cpp(bundle, tmp_path):
    manifest = json.loads((bundle / "manifest.json").read_text())
    (kernel,) = [one for one in manifest if one["spec"]["type"] == "SelectiveStateUpdateSpec"]
    config = [sys.executable, "-m", "tvm_ffi.config"]
    flags = subprocess.check_output([*config, "--cxxflags", "--ldflags", "--libs"], text=True).split()
    folder = subprocess.check_output([*config, "--libdir"], text=True).strip()
    program = tmp_path / "without_torch"
    source = ROOT / "examples" / "without_torch.cpp"
    subprocess.run(["g++", source, *flags, "-ldl", f"-Wl,-rpath,{folder}", "-o", program], check=True)
    command = [program, bundle / "libcute_dsl_runtime.so", bundle / kernel["file"], kernel["symbol"]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"refused: expected device_type=cuda\n{kernel['symbol']} is loaded\n", done.stderr
