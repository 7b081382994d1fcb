"""No declared kernel spills, on no target: recorded ones are known, others are compiled here, and so are the widest."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("bench", reason="tools/ is not on the path")
import digest
import spills

RECORD = Path(digest.__file__).with_name("digests") / "spills.json"
MANY = 200  # registers of a thread, which has 255
MOST_NEW = 24  # that are compiled here, a second each


@pytest.fixture(scope="module")
def declared():
    return {kernel.id: kernel for kernel in digest.declared(spills.TARGETS)}


@pytest.fixture(scope="module")
def recorded():
    return spills.read(RECORD)


def test_the_record_says_that_nothing_spills(recorded):
    assert recorded and not [name for name, resources in recorded.items() if resources.spill_bytes]
    assert {resources.arch for resources in recorded.values()} == set(spills.TARGETS)


def test_no_declared_kernel_spills(declared, recorded):
    """Of every declared call, batch and target, also where a rule or a table has changed since the record."""
    new = [kernel for name, kernel in declared.items() if name not in recorded]
    assert len(new) <= MOST_NEW, f"{len(new)} kernels are not recorded: python tools/spills.py {RECORD}"
    found = {kernel.text(): spills.measured(kernel) for kernel in new}
    assert not {text: resources for text, resources in found.items() if resources.spill_bytes}


@pytest.mark.wide
@pytest.mark.parametrize("target", spills.TARGETS)
def test_kernels_of_most_registers_are_as_recorded(declared, recorded, target):
    """One of every operator that needs many: where spills come first if its source changes."""
    for kernel in spills.worst(recorded, declared.values()):
        if kernel.arch == target and recorded[kernel.id].registers >= MANY:
            now, before = spills.measured(kernel), recorded[kernel.id]
            assert now.spill_bytes == 0, kernel.text()
            assert now == before, f"python tools/spills.py {RECORD} --anew: {kernel.text()}"


def test_a_loop_over_units_of_six_tokens_would_spill_on_sm_100a(declared):
    """What the rule avoids, and that a spill is seen: 128 heads at batch 64 in a persistent grid."""
    wanted = {"tokens": "batched", "state_dtype": "float16", "philox_rounds": 0}
    (kernel, *_) = (
        kernel
        for kernel in declared.values()
        if kernel.op == "selective_state_update" and kernel.arch == "sm_100a" and wanted.items() <= kernel.spec.items()
    )
    assert kernel.config["stages"] == 1
    looped = {"rows": 64, "block": 32, "warps": 2, "stages": 3, "ctas_per_sm": 2}
    assert spills.measured(kernel._replace(config={**kernel.config, **looped})).spill_bytes > 100


def test_kernels_that_are_recorded_are_not_compiled_again_and_a_spill_is_the_status(monkeypatch, tmp_path, capsys):
    kernels = [digest.Kernel({"type": "S", "n": n}, {"type": "C"}, "sm_90a", "op") for n in range(3)]
    monkeypatch.setattr(digest, "declared", lambda targets: kernels)
    compiled = []

    def measured(kernel):
        compiled.append(kernel.spec["n"])
        return spills.Resources("op", "sm_90a", 40 + kernel.spec["n"], 8 * (kernel.spec["n"] == 2))

    monkeypatch.setattr(spills, "measured", measured)
    path = tmp_path / "spills.json"
    spills.write(
        path, {kernels[0].id: spills.Resources("op", "sm_90a", 30, 0), "gone": spills.Resources("o", "a", 1, 0)}
    )
    assert spills.main([str(path)]) == 1
    assert compiled == [1, 2] and "gone" not in spills.read(path)
    assert "spills 8 bytes: sm_90a S n=2 C" in capsys.readouterr().out
    assert spills.main([str(path), "--anew"]) == 1 and compiled == [1, 2, 0, 1, 2]
    assert spills.worst(spills.read(path), kernels) == [kernels[2]]
