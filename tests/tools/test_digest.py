"""tools/digest.py: what changes the digest of a kernel's PTX and what does not; recording and comparing."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
from paths import SUPPORT
from tiny_spec import TinyConfig, TinySpec

from cute_ssm import arch, workloads
from cute_ssm.workloads import plan

digest = pytest.importorskip("digest", reason="tools/ is not on the path")
ptxsim = pytest.importorskip("ptxsim", reason="tools/ is not on the path")

PTX = """
//
// Cuda compilation tools, release 13.4, V13.4.59
//
.version 8.8
.target sm_90a
.address_size 64
	// .globl	kernel_cutlass_step_0
.extern .func  (.param .b32 func_retval0) vprintf (.param .b64 vprintf_param_0);
.extern .shared .align 1024 .b8 __dynamic_shmem__0[];
.visible .entry kernel_cutlass_step_0(
	.param .u32 kernel_cutlass_step_0_param_0, /* the first
	of two */
	.param .u32 kernel_cutlass_step_0_param_1
)
{
	.reg .b32 	%r<4>;
	.loc	1 209 0
$L__func_begin0:
	ld.param.b32 	%r1, [kernel_cutlass_step_0_param_0];
	ld.param.b32 	%r2, [kernel_cutlass_step_0_param_1];
	// begin inline asm
	add.s32 	%r3, %r1, 16;
	// end inline asm
	.pragma "nounroll";
	ret;
}
.visible .entry kernel_cutlass_step_01(
	.param .u32 kernel_cutlass_step_01_param_0
)
{
	ret;
}
	.file	1 "/somewhere/kernel.py"
	.section	.debug_str
	{
$L__info_string0:
.b8 99
	}
"""
PLAIN = """.version 8.8
.target sm_90a
.address_size 64
.extern .func (.param .b32 func_retval0) vprintf (.param .b64 vprintf_param_0);
.extern .shared .align 1024 .b8 __dynamic_shmem__0[];
.visible .entry kernel_0(
.param .u32 kernel_0_param_0,
.param .u32 kernel_0_param_1
)
{
.reg .b32 %r<4>;
ld.param.b32 %r1, [kernel_0_param_0];
ld.param.b32 %r2, [kernel_0_param_1];
add.s32 %r3, %r1, 16;
.pragma "nounroll";
ret;
}
.visible .entry kernel_1(
.param .u32 kernel_1_param_0
)
{
ret;
}
"""


def test_normalised_ptx_has_no_comments_source_lines_and_names():
    assert digest.normalised(PTX) == PLAIN


def test_the_compiler_is_read_from_the_first_comment():
    assert digest.compiler_of(PTX) == "Cuda compilation tools, release 13.4, V13.4.59"
    assert digest.compiler_of(PLAIN) == "unknown"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("kernel_cutlass_step_0", "kernel_cutlass_another_module_Step_0"),
        (".loc	1 209 0", ".loc	1 17 4"),
        ("/somewhere/kernel.py", "/elsewhere/other.py"),
        ("// end inline asm", "// source 7: kernel.py:12"),
        ("	add.s32 	%r3, %r1, 16;", "add.s32 %r3, %r1, 16;   // sum"),
    ],
)
def test_what_a_refactoring_changes_is_not_in_the_digest(old, new):
    assert PTX.count(old)
    assert digest.digest(PTX.replace(old, new)) == digest.digest(PTX)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("%r1, 16", "%r1, 17"),
        ("add.s32 	%r3", "sub.s32 	%r3"),
        ("%r<4>", "%r<5>"),
        (".target sm_90a", ".target sm_100a"),
        (".version 8.8", ".version 8.7"),
        ("%r2, [kernel_cutlass_step_0_param_1]", "%r2, [kernel_cutlass_step_0_param_0]"),
        ("__dynamic_shmem__0", "__static_shmem__0"),
        ("nounroll", "// unroll"),
    ],
)
def test_every_other_change_is_in_the_digest(old, new):
    assert PTX.count(old)
    assert digest.digest(PTX.replace(old, new)) != digest.digest(PTX)


@pytest.fixture
def ptx_of_tiny(tmp_path, monkeypatch):
    """Compile the tiny kernel from its source with replacements, as a module of a name: ``ptx(name, replacements)``."""
    source = (SUPPORT / "tiny_kernel.py").read_text(encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    def ptx(name: str, replacements: dict[str, str], kernel: str = "Tiny") -> str:
        text = source
        for old, new in replacements.items():
            assert old in text, old
            text = text.replace(old, new)
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        importlib.invalidate_caches()
        made = getattr(importlib.import_module(name), kernel)(TinySpec(), TinyConfig(), arch.by_name("sm_90a"))
        try:
            return ptxsim.compile(made, *made.fakes(), arch="sm_90a").ptx
        finally:
            del sys.modules[name]

    return ptx


def test_renaming_and_moving_a_kernel_keep_the_digest_and_a_changed_kernel_does_not(ptx_of_tiny):
    base = ptx_of_tiny("tiny_base", {})
    comment = {"        i = block": "        # one element a thread\n        # of a block\n        i = block"}
    names = {
        "class Tiny": "class Doubled",
        "def kernel": "def step",
        "self.kernel": "self.step",
        "thread, _": "lane, _",
    }
    moved = ptx_of_tiny(
        "a_longer_module", comment | names | {"self.threads + thread": "self.threads + lane"}, "Doubled"
    )
    assert "Doubled" in moved and "Doubled" not in base
    assert digest.digest(moved) == digest.digest(base)
    assert digest.digest(ptx_of_tiny("tiny_constant", {"self.dtype(self.factor)": "self.dtype(3.0)"})) != digest.digest(
        base
    )
    assert digest.digest(ptx_of_tiny("tiny_operation", {"x[i] *": "x[i] -"})) != digest.digest(base)


@pytest.fixture
def specs(tmp_path, settings):
    """A file of the smallest kernels of the package, and how many they are."""
    calls = workloads.of_operator("checkpointing_ssu", (1,))
    kernels = plan.of_workloads(calls, [arch.by_name("sm_90a")])
    entries = [
        plan.as_entry(*kernel) for kernel in kernels if kernel[0].op in ("serving_commit", "serving_build_work_items")
    ]
    path = tmp_path / "specs.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path, len(entries)


def test_compare_finds_what_was_recorded_and_names_what_differs(specs, tmp_path, capsys):
    source, count = specs
    file = tmp_path / "digests.json"
    assert digest.main(["record", str(file), "--specs", str(source), "--dump", str(tmp_path / "all")]) == 0
    kernels, compilers = digest.read(file)
    assert len(kernels) == count >= 2
    assert all("Cuda compilation tools" in compiler for compiler in compilers)
    assert {path.stem for path in (tmp_path / "all").iterdir()} == {kernel.id for kernel in kernels}
    assert digest.main(["compare", str(file)]) == 0
    assert f"{count} kernels: {count} equal, 0 different" in capsys.readouterr().out

    digest.write(file, [kernels[0]._replace(digest="0" * 16), *kernels[1:]], compilers)
    assert digest.main(["compare", str(file), "--dump", str(tmp_path / "changed")]) == 1
    out = capsys.readouterr().out
    assert f"differs: {kernels[0].id} {kernels[0].text()}" in out
    assert f"{count} kernels: {count - 1} equal, 1 different" in out
    (changed,) = (tmp_path / "changed").iterdir()
    assert changed.read_text() == (tmp_path / "all" / changed.name).read_text()


def test_options_select_kernels_by_operator_target_text_and_number(specs, tmp_path, capsys):
    source, count = specs
    file = tmp_path / "digests.json"
    digest.write(file, [k._replace(op="some" if i else "one") for i, k in enumerate(digest.read(source)[0])], ["none"])

    def compared(*options: str) -> str:
        digest.main(["compare", str(file), *options])
        return capsys.readouterr().out.splitlines()[-2]

    assert compared("--op", "one").startswith("1 kernels")
    assert compared("--op", "some").startswith(f"{count - 1} kernels")
    assert compared("--arch", "sm_90a", "--limit", "2").startswith("2 kernels")
    assert digest.main(["compare", str(file), "--op", "other"]) == 2
    assert "expected some that the options select, got none; operators: one, some" in capsys.readouterr().err
    assert digest.main(["compare", str(file), "--arch", "sm_100a"]) == 2
    assert digest.main(["compare", str(file), "--spec-filter", "no such text"]) == 2


def test_names_that_the_code_does_not_know_are_errors_unless_they_are_mapped(specs, tmp_path, capsys):
    source, _ = specs
    entry = json.loads(source.read_text())[0]
    kind, field = entry["spec"]["type"], [name for name in entry["spec"] if name != "type"][-1]
    text = json.dumps([entry])
    for old, way in ((kind, f"OldSpec={kind}"), (field, f"old_field={field}")):
        name = way.partition("=")[0]
        source.write_text(text.replace(f'"{old}"', f'"{name}"'))
        file = tmp_path / "digests.json"
        digest.write(file, [k._replace(digest="0") for k in digest.read(source)[0]], ["none"])
        assert digest.main(["compare", str(file)]) == 2
        assert name in capsys.readouterr().err
        assert digest.main(["compare", str(file), "--renamed", way]) == 1
        assert "1 kernels: 0 equal, 1 different" in capsys.readouterr().out


def test_a_file_that_is_not_one_of_digests_is_refused(tmp_path, capsys):
    file = tmp_path / "digests.json"
    file.write_text('{"format": 0}')
    assert digest.main(["compare", str(file)]) == 2
    assert "format: expected 1, got 0; record it again" in capsys.readouterr().err
    assert digest.main(["record", str(file)]) == 2
    assert "expected --workloads, --cache FOLDER, or --specs FILE" in capsys.readouterr().err
