"""The packages of this repository: what their wheels hold, and which of them may import which."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import cute_ssm

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
ROOT = Path(__file__).parents[2]
TOOLS = ("ptxsim", "gpumodel", "gpushim")
FOLDERS = {"cute-ssm": ROOT, **{name: ROOT / "tools" / name for name in TOOLS}}
OWN = {
    "ptxsim": {"numpy", "torch", "cutlass", "triton", "networkx", "scipy", "ptxsim"},
    "gpumodel": {"numpy", "ptxsim", "matplotlib", "gpumodel", "scipy", "cuda", "cutlass", "torch", "triton"},
    "gpushim": {"numpy", "torch", "cutlass", "ptxsim", "gpushim"},
}


def project(name: str) -> dict:
    return tomllib.loads((FOLDERS[name] / "pyproject.toml").read_text())


@pytest.mark.parametrize("name", FOLDERS)
def test_a_wheel_holds_its_own_package_alone(name):
    module = name.replace("-", "_")
    build = project(name)["tool"]["hatch"]["build"]
    assert build["targets"].keys() == {"wheel"} and build["targets"]["wheel"] == {"packages": [module]}
    assert (FOLDERS[name] / module / "__init__.py").is_file()


@pytest.mark.parametrize("name", FOLDERS)
def test_files_that_a_wheel_needs_exist(name):
    declared = project(name)["project"]
    assert "version" in declared["dynamic"]
    version = FOLDERS[name] / project(name)["tool"]["hatch"]["version"]["path"]
    assert re.search(r'^__version__ = "\d+\.\d+\.\d+', version.read_text(), re.M)
    for file in ("README.md", *declared["license-files"]):
        assert (FOLDERS[name] / file).is_file()
    assert (FOLDERS[name] / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("name", FOLDERS)
def test_long_description_has_absolute_links_to_files_that_exist(name):
    """As the hook of the build makes it; relative links lead nowhere on a package index."""
    hook = project(name)["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = "".join((FOLDERS[name] / fragment["path"]).read_text() for fragment in hook["fragments"])
    relative = re.findall(r"\]\((?!https?:|#|\.\.\.)", text)
    for change in hook["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert all(link.startswith(("https://", "#", "...")) for link in links)
    tag = re.escape(("" if name == "cute-ssm" else f"{name}-") + "v$HFPR_VERSION")  # docs/release.md
    own = re.compile(rf"https://(?:raw\.githubusercontent|github)\.com/cute-ssm/cute_ssm/(?:blob/)?{tag}/([^#]+)")
    files = [found.group(1) for found in map(own.match, links) if found]
    assert len(files) == len(relative)
    assert not [file for file in files if not (ROOT / file).exists()]


def test_installed_script_is_the_module():
    assert project("cute-ssm")["project"]["scripts"] == {"cute-ssm": "cute_ssm.__main__:main"}


@pytest.mark.parametrize("name", FOLDERS)
def test_project_has_the_usual_urls(name):
    urls = project(name)["project"]["urls"]
    assert {"Homepage", "Repository", "Changelog", "Issues"} <= urls.keys()
    assert all(url.startswith(("https://github.com/cute-ssm/cute_ssm", "https://cute-ssm.")) for url in urls.values())


@pytest.mark.parametrize("name", OWN)
def test_a_tool_imports_nothing_of_cute_ssm_and_nothing_undeclared(name):
    found = {}
    for path in sorted((FOLDERS[name] / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            tops = {module.partition(".")[0] for module in names}
            found |= {top: path.name for top in tops if not path.with_name(f"{top}.py").exists()}  # else a file beside
    assert len(found) > 5
    assert {k: v for k, v in found.items() if k not in sys.stdlib_module_names}.keys() <= OWN[name]


@pytest.mark.parametrize("name", OWN)
def test_tests_of_a_tool_need_no_cute_ssm(name):
    for path in (FOLDERS[name] / "tests").rglob("*.py"):
        assert "cute_ssm" not in path.read_text(), path


def test_cute_ssm_loads_the_tools_on_demand_alone():
    """An import statement would fail where they are not installed; `runtime.companions.require` says what to do."""
    for path in Path(cute_ssm.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = node.names[0].name if isinstance(node, ast.Import) else node.module or ""
                assert module.partition(".")[0] not in OWN, path
