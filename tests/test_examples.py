"""The examples run, check their own results and print their summaries."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
# file -> its last or first words of the summary
SUMMARIES = {
    "decode": "8 steps of 3 sequences and 1 padding row",
    "speculate": "same outputs and final states",
    "preempt": "outputs equal those of a run without preemption bit for bit",
    "gated_delta_net": "both ways equal decoding token by token",
    "dlpack": "NumPy arrays in and out without a copy",
}
OTHERS = {"cuda_graph", "emulate", "jax_step", "without_torch"}


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example in this process, as ``python examples/NAME.py OPTIONS`` would; returns what it printed."""

    def main(name, *options):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return main


def test_every_example_is_tested_and_listed():
    files = {path.stem for path in EXAMPLES.glob("*.py")} - {"backends"}
    assert files == {*SUMMARIES, *OTHERS}
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"[{name}.py]({name}.py)" in readme for name in (*files, "backends"))


@pytest.mark.parametrize("name", SUMMARIES)
def test_examples_pass_with_the_reference(run, name):
    assert SUMMARIES[name] in run(name, "--backend", "reference")


@pytest.mark.slow
@pytest.mark.parametrize("name", SUMMARIES)
def test_examples_pass_in_the_emulator(run, name):
    assert SUMMARIES[name] in run(name, "--backend", "emulate")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in SUMMARIES if name != "dlpack"])
def test_examples_pass_on_a_gpu(run, name):
    assert SUMMARIES[name] in run(name, "--backend", "cuda")


def test_emulate_prints_counters_and_the_race_of_a_missing_barrier(run):
    printed = run("emulate")
    assert "warp instructions" in printed
    finding = printed.partition("RaceError: ")[2]
    assert "write-read race on shared byte" in finding and "emulate.py:" in finding


@pytest.mark.slow
def test_the_step_of_the_cuda_graph_passes_uncaptured_in_the_emulator(run):
    assert "8 steps run in the emulator, not captured" in run("cuda_graph", "--emulate")


def test_an_operator_runs_in_jax_and_updates_its_state_in_place(run):
    pytest.importorskip("jax", reason="needs the extra 'jax'")
    assert "3 tokens of 2 requests in jax.jit, state updated in place" in run("jax_step")


def test_without_jax_its_example_says_so(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    assert run("jax_step") == "jax is not installed: nothing was run\n"


@pytest.mark.gpu
def test_the_cuda_graph_replays(run):
    assert "8 steps replayed from one CUDA graph" in run("cuda_graph")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_the_cuda_graph_example_without_a_gpu_says_that_it_needs_one(run):
    with pytest.raises(SystemExit, match=r"CUDA graphs need a GPU.*--emulate"):
        run("cuda_graph")


def test_an_example_runs_as_a_command():
    command = [sys.executable, str(EXAMPLES / "decode.py"), "--backend", "reference"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("decode (reference): ")
