"""Importing does nothing: no compiler, no CUDA, no environment."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import importlib, os, sys, traceback
from collections.abc import MutableMapping

class Recorder(MutableMapping):
    reads = []
    def __init__(self, real): self.real = real
    def note(self, key): self.reads.append((key, [f.filename for f in traceback.extract_stack()]))
    def __getitem__(self, key): self.note(key); return self.real[key]
    def __iter__(self): self.note("*"); return iter(self.real)
    def __len__(self): self.note("*"); return len(self.real)
    def __setitem__(self, key, value): raise AssertionError(f"{key} is set during import")
    def __delitem__(self, key): raise AssertionError(f"{key} is deleted during import")
    def __getattr__(self, name): self.note(name); return getattr(self.real, name)

os.environ = Recorder(os.environ)
os.environb = Recorder(os.environb)
def own_module(name):
    __import__("importlib").import_module(name)

for name in sys.argv[2:]:
    own_module(name)
found = [key for key, stack in Recorder.reads]
assert found == [], (found, Recorder.reads[-1])
loaded = sorted({name.partition(".")[0] for name in sys.modules} & set(sys.argv[1].split(",")))
assert not loaded, loaded
"""

HEAVY = "cutlass,cuda,tvm_ffi,triton,ptxsim"


def run(script, *arguments):
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_loads_neither_torch_nor_compiler_and_reads_no_environment():
    run(SCRIPT, HEAVY + ",torch,numpy", "cute_ssm")


def test_the_package_loads_descriptors_of_operators_alone():
    run("import sys, cute_ssm; assert not {m for m in sys.modules if m.startswith('cute_ssm.') and m.count('.') > 2}")
    run("import sys, cute_ssm; assert not {'cute_ssm.spec', 'cute_ssm.env', 'dataclasses'} & set(sys.modules)")


def test_so_do_the_host_modules():
    modules = ("env", "arch", "spec", "errors", "ops", "runtime", "runtime.registry", "runtime.doctor", "__main__")
    run(SCRIPT, HEAVY + ",torch,numpy", *(f"cute_ssm.{name}" for name in modules))


def test_the_test_notices_a_read():
    done = subprocess.run([sys.executable, "-c", SCRIPT, "", "cute_ssm_no_such"], capture_output=True, text=True)
    assert done.returncode != 0
    reading = SCRIPT.replace("for name in sys.argv", "os.getenv('HOME')\nfor name in sys.argv", 1)
    done = subprocess.run([sys.executable, "-c", reading, ""], capture_output=True, text=True)
    assert "AssertionError: (['HOME']" in done.stderr


def test_operators_load_no_compiler():
    heavy = ("cutlass", "tvm_ffi", "ptxsim")
    run(f"import sys, cute_ssm; cute_ssm.selective_state_update; assert not set(sys.modules) & set({heavy})")


def test_asking_for_the_emulator_does_not_import_it():
    run("import sys; from cute_ssm import runtime; assert runtime.emulator() is None and 'ptxsim' not in sys.modules")
