"""The workflow, the hooks before a commit and `.ci/run` check the versions that the packages declare."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
JOBS = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]


def commands(job: str) -> list[str]:
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


def minor(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def test_tests_run_on_every_python_version_that_is_declared():
    declared = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert JOBS["tests"]["strategy"]["matrix"]["python"] == declared
    assert PROJECT["requires-python"] == f">={declared[0]}"


def test_tests_run_with_the_oldest_and_the_newest_torch():
    (torch,) = [text for text in PROJECT["dependencies"] if text.startswith("torch")]
    oldest, above = map(minor, re.fullmatch(r"torch>=([\d.]+),<([\d.]+)", torch).groups())
    matrix = JOBS["tests"]["strategy"]["matrix"]
    (newest,) = map(minor, matrix["torch"])
    assert newest == (above[0], above[1] - 1)
    assert {"python": matrix["python"][0], "torch": "{}.{}.0".format(*oldest)} in matrix["include"]


def test_workflow_installs_and_tests_as_ci_run_does():
    local = (ROOT / ".ci" / "run").read_text()
    packages = re.search(r'pip install --quiet (\./tools.*)"\.\[test', local).group(1)
    assert f'python -m pip install {packages}".[test]"' in commands("tests")
    both = re.search(r'^pytest -n 2 -m "not slow"', local, re.M)
    assert commands("tests")[-1] == "pytest -n auto" and commands("wide")[-1] == 'pytest -n auto -m "wide and not slow"'
    assert both and "-m 'not slow and not wide'" in (ROOT / "pyproject.toml").read_text(), "the former two are this one"
    assert "mypy" in commands("lint") and re.search(r"^mypy$", local, re.M)
    assert {"ruff check .", "ruff format --check ."} <= {*commands("lint")} & {*local.splitlines()}
    assert "mkdocs build --strict" in commands("docs") and "mkdocs build --strict" in local


def test_workflow_runs_every_test_command_of_ci_run():
    local = re.findall(r"^pytest[^#\n]*", (ROOT / ".ci" / "run").read_text(), re.M)
    always = [command for job, steps in JOBS.items() if "if" not in steps for command in commands(job)]
    halves = {"pytest -n auto", 'pytest -n auto -m "wide and not slow"'}
    assert halves | {command.strip().replace("-n 2", "-n auto") for command in local} <= {
        *always,
        'pytest -n auto -m "not slow"',
    }


def test_packages_are_built_and_checked_as_for_a_release():
    local, release = ((ROOT / name).read_text() for name in (".ci/run", "docs/release.md"))
    sources = r"for \w+ in (\. tools/ptxsim [\w /]+); do\s+python -m build"
    folders = {re.search(sources, text).group(1) for text in (local, release, "\n".join(commands("packages")))}
    assert len(folders) == 1 and "twine check --strict" in local
    assert {f"{path.parent.relative_to(ROOT)}" for path in ROOT.glob("tools/*/pyproject.toml")} | {"."} == {
        *folders.pop().split()
    }
    extras = {re.match("[a-z-]+", text).group() for text in PROJECT["optional-dependencies"]["dev"]}
    assert {"build", "twine"} <= extras


def test_all_tests_of_kernels_run_under_hardware_arithmetic_nightly():
    nightly = [command for job, steps in JOBS.items() if "schedule" in steps.get("if", "") for command in commands(job)]
    assert 'pytest -n auto --arithmetic hardware -m "slow or not slow" tests' in nightly


def test_every_declared_kernel_is_compiled_nightly_to_see_that_none_spills():
    """The record in tools/digests, which CI goes by, knows spec, config and target, not the source of a kernel."""
    (found,) = [command for command in commands("slow") if command.startswith("python tools/spills.py ")]
    assert "digests" not in found, "a record that is there would be taken for the kernels"


def test_the_image_installs_and_runs_what_the_readme_does():
    image, workflow = (ROOT / "Dockerfile").read_text(), yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    readme = (ROOT / "README.md").read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(.+)$", image, re.M))
    assert arguments["TORCH"] == workflow["env"]["NEWEST_TORCH"]
    assert arguments["TORCH_INDEX"] == workflow["env"]["TORCH_INDEX"]
    packages = re.search(r'pip install (\./tools.*)"\.\[test\]"', readme).group(1)
    assert arguments["EXTRAS"] == "test" and f'RUN pip install {packages}".[$EXTRAS]"' in image
    (run,) = re.findall(r"^CMD (.+)$", image, re.M)
    assert " ".join(yaml.safe_load(run)) in readme
    (python,) = re.findall(r"^FROM python:([\d.]+)-slim$", image, re.M)
    assert python in JOBS["tests"]["strategy"]["matrix"]["python"]


def test_extras_for_cuda_take_the_bindings_and_libraries_of_their_version():
    cu12, cu13 = (PROJECT["optional-dependencies"][name] for name in ("cu12", "cu13"))
    assert cu12 == ["cuda-python>=12.8,<13"]
    (compiler,) = [text for text in PROJECT["dependencies"] if text.startswith("nvidia-cutlass-dsl")]
    assert cu13 == ["cuda-python>=13", compiler.replace("dsl", "dsl[cu13]")]


def test_hooks_use_the_formatter_of_the_extra_dev():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = [repo["rev"] for repo in hooks if repo["repo"].endswith("ruff-pre-commit")]
    assert f"ruff=={ruff.removeprefix('v')}" in PROJECT["optional-dependencies"]["dev"]


@pytest.mark.parametrize("form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*_*.yml")), ids=lambda path: path.stem)
def test_issue_forms_are_complete(form):
    body = yaml.safe_load(form.read_text())["body"]
    assert len({part["id"] for part in body}) == len(body)
    assert all(part["attributes"]["label"] for part in body)


def test_bug_reports_ask_for_the_environment_and_a_command_that_repeats():
    body = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug_report.yml").read_text())["body"]
    required = {part["attributes"]["label"] for part in body if part.get("validations", {}).get("required")}
    assert {"Output of `cute-ssm env`", "Command that repeats it"} <= required
