"""What the documents say is so: examples run, tables and lists agree with the code, files exist."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

import cute_ssm
from cute_ssm import arch, env, spec
from cute_ssm.__main__ import main
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.runtime import doctor, toolchain

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tools/ptxsim/README.md", "tools/gpumodel/README.md")


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S).group(1)


def region(name: str) -> str:
    return re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", README, re.S).group(1)


def test_python_examples_run(capsys):
    """The blocks are one program: the second runs the compiled kernel in the emulator, the others the reference."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert len(blocks) == 3
    torch.manual_seed(0)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["out"].shape == (4, 8, 64)
    assert not names["out"][3].any(), "padding"
    assert names["state"][[0, 3, 7]].any()
    assert names["pool"].prev_num_accepted_tokens.tolist()[:2] == [8, 6] and names["pool"].state[:, :2].any()
    assert len(names["session"].launches) == 1
    assert capsys.readouterr().out


def test_environment_table_is_that_of_the_code():
    rows = [f"| `{row.name}` | {row.default} | {row.meaning} |" for row in env.VARIABLES]
    assert region("environment").splitlines() == ["| variable | default | meaning |", "| --- | --- | --- |", *rows]


def test_support_table_names_operators_types_and_targets_of_the_code():
    rows = [line for line in section("Support").splitlines() if line.startswith("| `")]
    operators = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(operators) == sorted(set(cute_ssm.__all__) - {"__version__"})
    for row in rows:
        assert re.findall(r"\bsm_\w+", row) == list(arch.ARCHS)
    types = re.findall(r"\b(?:b?float\d+(?:_e4m3fn)?|int\d+)\b", rows[0])
    assert sorted(types) == sorted((*3 * spec.FLOATS, *spec.QUANTISED))


def test_table_of_counters_is_that_of_the_results():
    script = ROOT / "tools" / "bench" / "counters.py"
    module = importlib.util.module_from_spec(found := importlib.util.spec_from_file_location("bench_counters", script))
    found.loader.exec_module(module)
    if not module.RESULTS.exists():
        assert not region("counters").strip(), "figures without results"
        return
    assert region("counters").strip() == module.table(json.loads(module.RESULTS.read_text())).strip()


@pytest.mark.parametrize(
    ("dim", "dstate", "state"), [(12, 64, "float16"), (64, 8, "float16"), (64, 300, "float16"), (64, 100, "int8")]
)
def test_what_is_refused_is_what_not_yet_says(dim, dstate, state):
    assert "dims that are no multiple of 8, dstate outside 16 to 256" in " ".join(section("Not yet").split())
    one = torch.zeros(1, 1, dim)
    column = torch.zeros(1, 1, dstate)
    pool = torch.zeros(1, 1, dim, dstate, dtype=getattr(torch, state))
    scale = torch.ones(1, 1, dim) if state == "int8" else None
    with pytest.raises(UnsupportedSpecError):
        cute_ssm.selective_state_update(pool, one, one, -torch.ones(1, dim, dstate), column, column, state_scale=scale)


def test_versions_that_the_package_checks_are_those_it_declares():
    """And no later minor of the compiler is let in by accident: the contributors' notes are about this one."""
    declared = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[0]
    for name, accepted in ((toolchain.DSL, toolchain.DSL_RANGE), (toolchain.TVM_FFI, toolchain.TVM_FFI_RANGE)):
        assert f'"{toolchain.requirement(name, accepted)}"' in declared
    assert f'"{toolchain.requirement("torch", doctor.TORCH_RANGE)}"' in declared
    assert f"nvidia-cutlass-dsl {'.'.join(map(str, toolchain.DSL_RANGE[0]))}," in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("command", ["env", "cache", "warmup", "tune", "demo"])
def test_options_of_the_command_line_exist(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    words = set(re.findall(r"--[\w-]+", capsys.readouterr().out)) - {"--help"}
    rows = "\n".join(line for line in section("Command line").splitlines() if f"cute_ssm {command}" in line)
    assert words == set(re.findall(r"--[\w-]+", rows))


def test_ci_installs_and_tests_as_the_readme_says():
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    packages, extra, test = re.search(r'pip install (.*)"\.\[(\w+)\]" && (pytest.*)', section("Two commands")).groups()
    assert commands[-1] == test
    assert f'python -m pip install --quiet {packages}".[{extra},dev]"' in commands


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_named_in_documents_exist(document):
    path = ROOT / document
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    links = [path.parent / link for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    named = {name for name in re.findall(r"`((?:cute_ssm|tools|tests|\.ci)/[\w./]*)`", text)}
    if not region("counters").strip():
        named.discard("tools/bench/results/")  # the table has no rows yet
    missing = [str(p) for p in (*links, *(ROOT / name for name in named)) if not p.exists()]
    assert not missing


def test_no_tracked_file_names_a_place_of_one_machine():
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    place = re.compile(r"(?<![\w.~}/-])/(?:work|root|opt|workspace|Users|mnt|tmp/\w+)/[\w.-]")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".safetensors", ".png") or not path.is_file() or path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if place.search(line):
                found.append(f"{name}:{number}: {line.strip()}")
    assert not found
