"""Traces for flashinfer-bench: references say what operators do, and files have the form that it reads."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import make_traces
import pytest
import torch
import trace_references
from safetensors import safe_open

from cute_ssm import workloads

CALLS = {
    "step": ("selective_state_update", {"nheads": 4, "ngroups": 2}),
    "tokens": ("selective_state_update", {"nheads": 4, "T": 3, "state_dtype": "bfloat16", "z": 1}),
    "mamba-1": ("selective_state_update", {"nheads": 1, "layout": "dense", "dstate": 16, "state_dtype": "float32"}),
    "verify": ("selective_state_update", {"nheads": 4, "T": 2, "update": 0}),
    "scan": ("selective_scan", {"dim": 64, "length": 9, "ngroups": 2}),
    "packed scan": ("selective_scan", {"dim": 64, "length": 9, "varlen": 1, "z": 0, "state_dtype": "bfloat16"}),
    "gated delta": ("gated_delta_rule_mtp", {"H": 2, "HV": 4, "K": 32, "V": 16, "verify": 0}),
    "gated delta verify": ("gated_delta_rule_mtp", {"H": 2, "HV": 4, "K": 32, "V": 16, "T": 1}),
    "replay": ("gated_delta_rule_replay", {"H": 2, "HV": 4, "K": 32, "V": 16}),
    "full replay": ("gated_delta_rule_replay", {"H": 2, "HV": 4, "K": 32, "V": 16, "pnat": "14"}),
    "checkpointing": ("checkpointing_ssu", {"nheads": 4, "ngroups": 2, "pnat": "8"}),
    "replay decode": ("replay_decode", {"nheads": 4, "ngroups": 2, "cached": "3", "W": 8}),
    "full replay decode": ("replay_decode", {"nheads": 4, "cached": "7", "W": 8, "state_dtype": "float32", "z": 1}),
    "full checkpointing": ("checkpointing_ssu", {"nheads": 4, "pnat": "12", "state_dtype": "bfloat16"}),
}
BATCH = 3
each = pytest.mark.parametrize("name", CALLS)


def function(source):
    namespace = {"__name__": "traced"}
    exec(compile(source, "main.py", "exec"), namespace)
    return namespace["run"]


def inputs(trace):
    """Arguments with values, as a definition has them."""
    op, keys = trace.op, {**trace.keys, workloads.batch_key(trace.op): BATCH}
    return {given.name: given.stored.contiguous() for given in trace._given(workloads.build(op, keys))}


def check_structure(definition):
    """What flashinfer-bench checks of a definition."""
    tensors = {**definition["inputs"], **definition["outputs"]}
    assert len(tensors) == len(definition["inputs"]) + len(definition["outputs"]), "names do not overlap"
    axes = definition["axes"]
    assert {axis for tensor in tensors.values() for axis in tensor["shape"]} == axes.keys()
    variable = {axis for axis, value in axes.items() if value["type"] == "var"}
    assert variable <= {axis for tensor in definition["inputs"].values() for axis in tensor["shape"]}
    assert {"batch", "slots"} <= variable
    for tensor in tensors.values():
        assert isinstance(getattr(torch, tensor["dtype"]), torch.dtype)
    check_run(definition["reference"], definition["inputs"])
    imported = {node.module for node in ast.walk(ast.parse(definition["reference"])) if type(node) is ast.ImportFrom}
    assert imported <= {"__future__", "collections.abc", "typing", "torch"}, "a reference needs PyTorch alone"


def check_run(source, names):
    (run,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "run")
    assert [argument.arg for argument in run.args.args] == list(names)


@each
def test_a_reference_does_what_the_operator_does(name):
    op, keys = CALLS[name]
    trace = make_traces.Trace(op, keys)
    definition, solution = trace.definition([]), trace.solution()
    check_structure(definition)
    given = inputs(trace)
    assert list(given) == list(definition["inputs"])
    before = {key: tensor.clone() for key, tensor in given.items()}
    want = function(definition["reference"])(*given.values())
    for key, tensor in given.items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, msg=f"the reference modifies {key}")
    (source,) = solution["sources"]
    check_run(source["content"], definition["inputs"])
    got = function(source["content"])(*given.values())
    if len(definition["outputs"]) == 1:
        got, want = [got], [want]
    for (key, spec), mine, theirs in zip(definition["outputs"].items(), got, want):
        sizes = trace._sizes(BATCH)
        assert mine.shape == theirs.shape == tuple(sizes[axis] for axis in spec["shape"]), key
        assert str(mine.dtype) == str(theirs.dtype) == f"torch.{spec['dtype']}", key
        torch.testing.assert_close(mine, theirs, msg=lambda text, key=key: f"{key}: {text}")
    changed = [key for key, tensor in given.items() if not torch.equal(tensor, before[key])]
    assert {f"new_{key}" for key in changed} <= definition["outputs"].keys(), "results are all that is updated"
    assert bool(changed) == (not name.endswith("verify"))


def test_every_operator_with_declared_calls_has_a_reference():
    assert set(make_traces.OP_TYPES) == set(trace_references.EMBEDDED) == set(workloads.OPERATORS)
    assert {op for op, _ in make_traces.declared()} == set(workloads.OPERATORS)


def test_files_of_a_model(tmp_path, capsys):
    out = tmp_path / "traces"
    assert make_traces.main([str(out), "--model", "codestral-mamba", "--batches", "1,5"]) == 0
    assert "4 definitions, each with 2 workloads" in capsys.readouterr().out
    names = sorted(path.stem for path in out.glob("definitions/*/*.json"))
    assert len(names) == 4
    assert names[0] == "checkpointing_ssu_T6_W16_dim64_dstate128_ngroups8_nheads128_bfloat16"
    for path in out.glob("definitions/*/*.json"):
        definition = json.loads(path.read_text())
        check_structure(definition)
        assert definition["name"] == path.stem and definition["op_type"] == path.parent.name
        solution = json.loads((out / "solutions" / path.parent.name / f"{path.stem}_cute_ssm.json").read_text())
        assert solution["definition"] == path.stem
        assert solution["spec"]["entry_point"] == f"{solution['sources'][0]['path']}::run"
        lines = (out / "workloads" / path.parent.name / f"{path.stem}.jsonl").read_text().splitlines()
        found = [json.loads(line)["workload"] for line in lines]
        assert [workload["axes"]["batch"] for workload in found] == [1, 5]
        assert len({workload["uuid"] for workload in found}) == 2
        for workload in found:
            check_workload(out, definition, workload)


def test_the_command_of_the_guide(tmp_path, capsys, monkeypatch):
    guide = (Path(make_traces.__file__).parents[1] / "docs" / "guides" / "kernels-and-traces.md").read_text()
    (command,) = re.findall(r"^python tools/make_traces.py (.*)$", guide, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    assert make_traces.main(command.split()) == 0
    assert f"It prints `{capsys.readouterr().out.strip()}`" in guide


def check_workload(out, definition, workload):
    sizes = {axis: value.get("value") for axis, value in definition["axes"].items()} | workload["axes"]
    assert all(sizes.values()) and workload["inputs"].keys() == definition["inputs"].keys()
    for name, spec in definition["inputs"].items():
        given = workload["inputs"][name]
        if given["type"] == "random":
            assert spec["dtype"].partition("float")[1], "integers are given"
            continue
        with safe_open(out / given["path"], "pt") as file:
            tensor = file.get_tensor(given["tensor_key"])
        assert list(tensor.shape) == [sizes[axis] for axis in spec["shape"]]
        assert str(tensor.dtype) == f"torch.{spec['dtype']}"
        if name == "A":
            assert (tensor < 0).all()


def test_bad_arguments(tmp_path, capsys):
    out = tmp_path / "traces"
    assert make_traces.main([str(out), "--batches", "1,many"]) == 2
    assert "'many'" in capsys.readouterr().err and not out.exists()
    with pytest.raises(SystemExit, match="2"):
        make_traces.main([str(out), "--model", "no-model"])
    out.mkdir()
    assert make_traces.main([str(out)]) == 2
    assert "out: expected a folder that does not exist" in capsys.readouterr().err and not list(out.iterdir())


@pytest.mark.peers
def test_flashinfer_bench_reads_and_runs_them(tmp_path, monkeypatch):
    bench = pytest.importorskip("flashinfer_bench")
    from flashinfer_bench.bench.utils import gen_inputs, load_safetensors
    from flashinfer_bench.compile import BuilderRegistry

    monkeypatch.setenv("FIB_CACHE_PATH", str(tmp_path / "cache"))
    out = tmp_path / "traces"
    calls = [CALLS[name] for name in ("step", "packed scan", "gated delta", "replay", "replay decode", "checkpointing")]
    for op, keys in calls:
        make_traces.write(out, op, keys, ["a-model"], (BATCH,))
    found = bench.TraceSet.from_path(str(out))
    assert len(found.definitions) == len(calls)
    builders = BuilderRegistry.get_instance()
    for name, definition in found.definitions.items():
        (solution,), (trace,) = found.solutions[name], found.workloads[name]
        loaded = load_safetensors(definition, trace.workload, out)
        given = gen_inputs(definition, trace.workload, "cpu", loaded)
        want = builders.build_reference(definition)(*given)
        got = builders.build(definition, solution)(*given)
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs)
