"""Every operator is a folder with a descriptor, and is named nowhere else but where a reader looks for it."""

from __future__ import annotations

import ast
import functools
import re
import subprocess

import pytest
from paths import ROOT

import cute_ssm
from cute_ssm import ops, serving
from cute_ssm.compat import vllm
from cute_ssm.runtime import registry

# Where operators may be named: the list, the names that type checkers see, documents, other projects' signatures and
# kernels, and what is built on operators.
ALLOWED = (
    "cute_ssm/ops/__init__.py", "cute_ssm/__init__.py", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/",
    "examples/", "cute_ssm/compat/", "cute_ssm/serving/", "cute_ssm/integrations/", "cute_ssm/demo/", "tests/",
    "tools/bench/peers.py", "tools/bench/triton_peers.py", "tools/bench/results/", "tools/digests/",
    "cute_ssm/tuning/tables.json", "mkdocs.yml", "tools/ptxsim/README.md",
    "tools/gpumodel/", "tools/bench/host.py", "tools/make_traces.py", "tools/trace_references.py",
    "tools/peer_suites/", "cute_ssm/ops/materialize_layers/", "cute_ssm/__main__.py", "cute_ssm/tuner/cli.py",
)  # fmt: skip


@pytest.mark.parametrize("operator", ops.operators(), ids=lambda operator: operator.name)
def test_a_folder_holds_the_whole_operator(operator):
    folder = ROOT / "cute_ssm" / "ops" / operator.name
    assert operator.package == f"cute_ssm.ops.{operator.name}"
    assert operator.spec_class.__module__.startswith("cute_ssm.ops.")
    for module in ("spec", "reference", "kernel", "operator", *["workload"] * operator.workload):
        assert (folder / f"{module}.py").exists(), module
    assert registry.KERNELS[operator.spec_class] == operator.kernel_path
    home = {"cute_ssm": cute_ssm, "cute_ssm.serving": serving, "cute_ssm.compat.vllm": vllm}[operator.home]
    for name in operator.functions:
        assert getattr(home, name) is operator.function(name)
        assert name in home.__all__


def test_type_checkers_see_the_public_functions():
    tree = ast.parse((ROOT / "cute_ssm" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {(node.module, alias.name) for node in block.body for alias in node.names}
    public = [operator for operator in ops.operators() if operator.home == "cute_ssm"]
    assert seen == {(f"{op.package}.operator", name) for op in public for name in op.functions}


def test_the_list_and_the_folders_are_the_same():
    folders = {path.parent.name for path in (ROOT / "cute_ssm" / "ops").glob("*/operator.py")}
    assert folders == set(ops.OPERATORS)
    assert len(ops.OPERATORS) == len(set(ops.OPERATORS))


def tracked() -> list[str]:
    """Files of the repository, or of the folder where there is no repository."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return listed.stdout.split("\n")[:-1] if listed.returncode == 0 else []


@functools.cache
def text_of(file: str) -> str:
    """The text of a file; of Python without comments and docstrings, where operators may refer to each other."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if not file.endswith(".py"):
        return text
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


@pytest.mark.parametrize("name", [name for name in ops.OPERATORS if name != "commit"])  # git has commits too
def test_an_operator_is_named_in_its_folder_and_where_readers_look(name):
    files = tracked()
    if not files:
        pytest.skip("not a repository")
    elsewhere = []
    for file in files:
        if file.startswith((f"cute_ssm/ops/{name}/", *ALLOWED)) or not file.endswith((".py", ".toml", ".md", ".json")):
            continue
        if re.search(rf"(?<![\w.]){name}(?!\w)|cute_ssm\.ops\.{name}\b", text_of(file)):
            elsewhere.append(file)
    assert not elsewhere, f"{name} is named outside of its folder"
