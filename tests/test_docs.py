"""What the documents say is so: examples run, tables and lists agree with the code, files exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bits import equal

import cute_ssm
from cute_ssm import __main__ as cli
from cute_ssm import arch, env, serving, spec
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.runtime import doctor, toolchain

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
SITE = sorted(DOCS.rglob("*.md"))
OTHERS = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "examples/README.md",
    *(f"tools/{name}/README.md" for name in ("ptxsim", "gpumodel", "gpushim")),
)
DOCUMENTS = [README, *(ROOT / name for name in OTHERS), *SITE]
SOURCES = "https://github.com/cute-ssm/cute_ssm/"


def section(path: Path, title: str) -> str:
    """The text below a heading of the second level, up to the next."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", path.read_text(), re.M | re.S).group(1)


def region(path: Path, name: str) -> str:
    return re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", path.read_text(), re.S).group(1)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path) -> list[str]:
    """Python that a document shows; blocks that need a GPU, or a download, have the class no-run."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)


def run(path: Path) -> dict:
    """Run the blocks of a document as one program."""
    torch.manual_seed(0)
    names: dict = {}
    for block in blocks(path):
        exec(compile(block, relative(path), "exec"), names)
    return names


def test_example_of_the_readme_runs():
    names = run(README)
    assert names["out"].shape == (4, 8, 64)
    assert not names["out"][3].any(), "padding"
    assert names["out"][:3].any() and names["state"][[0, 3, 7]].any()


@pytest.mark.parametrize("page", [page for page in SITE if blocks(page)], ids=relative)
def test_examples_of_a_page_run(page, capsys):
    names = run(page)
    if page.name == "emulator.md":
        assert len(names["session"].launches) == 1
        assert capsys.readouterr().out
    if page == DOCS / "guides" / "serving.md":
        assert names["pool"].prev_num_accepted_tokens.tolist()[:2] == [8, 6] and names["pool"].state[:, :2].any()
    if page.name == "preemption.md":
        equal(names["same"].state, names["pool"].state)
        assert names["same"].available == 15


def test_pages_with_examples_are_found():
    assert {"serving.md", "preemption.md", "gated-delta-nets.md", "tuning.md", "emulator.md"} <= {
        page.name for page in SITE if blocks(page)
    }


def test_readme_fits_120_to_150_lines():
    assert 120 <= len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("document", [README, ROOT / "CONTRIBUTING.md", *SITE], ids=relative)
def test_lines_fit_120_columns(document):
    """But for tables, links that are longer, and what results generate."""
    text = re.sub(r"<!-- (\S+):begin -->.*?<!-- \1:end -->", "", document.read_text(), flags=re.S)
    long = [line for line in text.splitlines() if len(line) > 120 and not re.match(r"\s*(\||!?\[|https?:)", line)]
    assert not long


@pytest.mark.wide
def test_site_builds_and_has_every_public_function(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    operators = (tmp_path / "api" / "operators" / "index.html").read_text()
    assert all(f'id="cute_ssm.{name}"' in operators for name in cute_ssm.__all__ if name != "__version__")
    functions = (tmp_path / "api" / "serving" / "index.html").read_text()
    assert all(f'id="cute_ssm.serving.{name}"' in functions for name in serving.__all__)
    words = re.sub(r"<[^>]+>|\s", "", operators.partition('id="cute_ssm.checkpointing_ssu_ring"')[2])
    assert "dt_softplus(bool,default:False)" in words, "each of the names that share a text has its own type"


def test_environment_table_is_that_of_the_code():
    rows = [f"| `{row.name}` | {row.default} | {row.meaning} |" for row in env.VARIABLES]
    shown = region(DOCS / "environment.md", "environment").splitlines()
    assert shown == ["| variable | default | meaning |", "| --- | --- | --- |", *rows]


def operators_of(table: str) -> list[str]:
    """Names in the first column of a table."""
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]


def test_support_table_names_operators_types_and_targets_of_the_code():
    table = section(DOCS / "support.md", "Operators")
    assert sorted(operators_of(table)) == sorted(set(cute_ssm.__all__) - {"__version__"})
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    for row in rows:
        assert re.findall(r"\bsm_\w+", row) == list(arch.ARCHS)
    types = re.findall(r"\b(?:b?float\d+(?:_e4m3fn)?|int\d+)\b", rows[0])
    assert sorted(types) == sorted((*3 * spec.FLOATS, *spec.QUANTISED))


def test_support_table_of_the_readme_names_operators_types_and_targets_of_the_code():
    text = section(README, "Support")
    assert sorted(operators_of(text)) == sorted(set(cute_ssm.__all__) - {"__version__"})
    first = next(line for line in text.splitlines() if line.startswith("| `"))
    types = re.findall(r"\b(?:b?float\d+(?:_e4m3fn)?|int\d+)\b", first)
    assert sorted(types) == sorted((*spec.FLOATS, *spec.QUANTISED))
    assert re.findall(r"\bsm_\w+", text) == list(arch.ARCHS)


def test_targets_are_those_of_the_code():
    rows = re.findall(r"^\| (sm_\w+) \| (\d+)\.(\d+) \|", section(DOCS / "support.md", "GPUs"), re.M)
    assert [(name, (int(major), int(minor))) for name, major, minor in rows] == [
        (each.name, each.capability) for each in arch.ARCHS.values()
    ]


def test_table_of_counters_is_that_of_the_results():
    script = ROOT / "tools" / "bench" / "counters.py"
    module = importlib.util.module_from_spec(found := importlib.util.spec_from_file_location("bench_counters", script))
    found.loader.exec_module(module)
    results = json.loads(module.RESULTS.read_text())
    shown = region(DOCS / "performance" / "counters.md", "counters")
    assert shown.strip() == module.page(results)


def test_what_the_documents_say_of_the_counters_holds():
    """At most 0.3 % above the least bytes, but for a scan in parts; no spills."""
    for path in (README, DOCS / "performance" / "index.md"):
        said = " ".join(path.read_text().split())
        assert re.search(r"0\.3 % (more DRAM bytes|above the floor)", said) and re.search(
            r"no kernel of the declared workloads spills", said
        )
    rows = json.loads((ROOT / "tools" / "bench" / "results" / "counters.json").read_text())["rows"]
    whole = [row["dram_over_floor"] for row in rows if row["launches"] == 1]
    assert len(whole) > 100 and max(whole) <= 1.003
    assert all(row["op"] == "selective_scan" for row in rows if row["launches"] > 1)
    assert not any(kernel["spill_bytes"] for row in rows for kernel in row["kernels"])
    declared = json.loads((ROOT / "tools" / "digests" / "spills.json").read_text()).values()
    assert len(declared) > 300 and not any(spilled for *_, spilled in declared)


@pytest.mark.parametrize(
    ("dim", "dstate", "state"), [(12, 64, "float16"), (64, 7, "float16"), (64, 300, "float16"), (64, 100, "int8")]
)
def test_what_is_refused_is_what_the_limitations_say(dim, dstate, state):
    said = " ".join(section(DOCS / "support.md", "Limitations").split())
    assert "dims that are no multiple of 8, dstate outside 8 to 256" in said
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
    assert f"nvidia-cutlass-dsl {'.'.join(map(str, toolchain.DSL_RANGE[0]))}," in (DOCS / "cute-dsl.md").read_text()


@pytest.mark.parametrize("command", ["env", "cache", "warmup", "tune", "demo"])
def test_documented_options_of_a_command_are_those_of_its_parser(command, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"])
    assert done.value.code == 0
    words = set(re.findall(r"--[\w-]+", capsys.readouterr().out)) - {"--help"}
    rows = re.findall(r"^\| `(--[\w-]+)` \|", section(DOCS / "cli.md", command), re.M)
    assert sorted(words) == sorted(rows)


def test_documented_commands_are_those_of_the_parser(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    commands = re.findall(r"^    (\w+)  ", capsys.readouterr().out, re.M)
    assert re.findall(r"^\| \[`(\w+)`\]", (DOCS / "cli.md").read_text(), re.M) == commands


def test_documented_tools_exist():
    named = re.findall(r"`(?:python )?(tools/[\w/.]+)", section(DOCS / "cli.md", "Tools of the repository"))
    assert len(named) >= 10 and all((ROOT / name).exists() for name in named)


def shell_lines(path: Path) -> list[str]:
    """Lines of shell blocks, and commands in tables and text, without comments."""
    text = path.read_text()
    found = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)).splitlines()
    found += re.findall(r"`((?:python|cute-ssm) [^`]+)`", re.sub(r"\n *", " ", text))
    return [re.sub(r"\s#.*", "", line).strip() for line in found]


def test_commands_of_the_documents_parse():
    shown = [line for path in DOCUMENTS for line in shell_lines(path)]
    calls = [
        found[1] for line in shown if (found := re.search(r"^(?:.*&& )?(?:python -m cute_ssm|cute-ssm) (.+)", line))
    ]
    checked = 0
    for call in calls:
        words = shlex.split(call)
        if len(words) > 1 and words[0] != "COMMAND":  # a bare name is not a call
            assert callable(cli._parser().parse_args(words).run), call
            checked += 1
    assert checked >= 5


def test_options_of_tools_in_the_documents_exist():
    shown = [line for path in DOCUMENTS for line in shell_lines(path)]
    calls = [found for line in shown for found in re.findall(r"python (tools/[\w/]+\.py)(.*)", line)]
    shared = (ROOT / "cute_ssm" / "workloads" / "cli.py").read_text()  # of tools/build_aot.py
    for tool, rest in calls:
        source = (ROOT / tool).read_text() + shared
        for option in re.findall(r"--[\w-]+", rest):
            assert f'"{option}"' in source, f"{tool} {option}"
    assert len(calls) >= 10


def test_ci_installs_and_tests_as_the_readme_says():
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    start = section(README, "Quick start")
    packages, extra, test = re.search(r'pip install (.*)"\.\[(\w+)\]" && (pytest.*)', start).groups()
    (first,) = (i for i, line in enumerate(commands) if line.startswith(f'{test} -m "not slow" #'))  # and what is wide
    assert commands[first + 1] == f"{test} --arithmetic hardware tests"
    assert f'python -m pip install --quiet {packages}".[{extra},dev]"' in commands


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_files_named_in_documents_exist(document):
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S)
    links = [document.parent / link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
    links += [ROOT / path for path in re.findall(rf"\]\({SOURCES}(?:blob|tree)/main/([^)#]+)", text)]
    named = [ROOT / name for name in re.findall(r"`((?:cute_ssm|tools|tests|docs|examples|\.ci)/[\w./]*)`", text)]
    missing = [str(path) for path in (*links, *named) if not path.exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_names_of_the_package_in_documents_exist(document):
    """Names like `cute_ssm.tuning.override`, and those of device code like `memory.pinned`."""
    code = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S))
    for name in {found for text in code for found in re.findall(r"\bcute_ssm(?:\.\w+)+", text)}:
        assert pkgutil.resolve_name(name) is not None
    if document.parent not in (ROOT, DOCS):
        return  # the device code of this package is not theirs
    modules = {path.stem: path.read_text() for path in (ROOT / "cute_ssm" / "device").glob("*.py")}
    for module, name in re.findall(r"^(?:device\.)?(\w+)\.(\w+)$", "\n".join(code), re.M):
        if module in modules and name != "py":
            assert re.search(rf"^(?:def|class) {name}\b", modules[module], re.M), f"{module}.{name}"


def test_controls_that_contributing_lists_exist():
    _, _, text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Controls")
    listed = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    assert len(listed) > 10
    kept = ""  # of the row before: "the same file"
    for line in listed[2:]:
        kept = "".join((ROOT / f).read_text() for f in re.findall(r"\]\(([^)]*\.py)\)", line)) or kept
        for name in re.findall(r"`(test_\w+)`", line):
            assert f"def {name}(" in kept, (name, line)


def test_no_tracked_file_names_a_path_of_one_machine():
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    place = re.compile(r"(?<![\w.~}/-])/(?:work|root|opt|workspace|Users|mnt|tmp/\w+)/[\w.-]")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".safetensors", ".png", ".svg") or not path.is_file() or path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if place.search(line):
                found.append(f"{name}:{number}: {line.strip()}")
    assert not found


@pytest.mark.parametrize("file", sorted((ROOT / "cute_ssm").rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_files_and_functions_are_no_longer_than_the_rules_allow(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            assert lines <= 150, node.name
