"""tools/gpu_check.py fit: what a pass found goes into results, tables, model and documents, by one command."""

from __future__ import annotations

import io
import json
import shutil
import tarfile

import gpu_check
import numpy as np
import pytest
import torch
from bench import report
from gpu_pass import arithmetic, fit, observed, probes
from paths import ROOT

import gpumodel
import ptxsim
from cute_ssm.arch import SM_90A
from gpumodel import constants, validated
from gpumodel.fit import Errors, Fit

OP, KEYS = "selective_state_update", {"nheads": 4, "dim": 64, "dstate": 16}
ABOUT = {
    "device": "NVIDIA H200", "arch": "sm_90a", "sms": 132, "commit": "0123456789abcdef",
    "began": "2030-01-01 00:00 UTC", "versions": {"torch": "2.11.0"}, "rehearsal": False, "part": 1, "minutes": 6,
}  # fmt: skip
TRUE_LAUNCH_US = 2.1  # of the GPU that the synthetic times are of


def timed(batch, device="NVIDIA H200"):
    """A line of a GPU that is the model's but for the time of a launch."""
    machine = constants.with_value(gpumodel.MACHINES["H200"], "launch_us", TRUE_LAUNCH_US)
    recorded = observed.Recorded(OP, {**KEYS, "batch": batch}, machine)
    us = round(recorded.us(machine, gpumodel.Conditions()), 3)
    one = dict.fromkeys(("median", "p10", "p90"), us)
    peer = dict.fromkeys(("median", "p10", "p90"), 2 * us)
    return {
        "op": OP, "model": "small", "case": "Small T=1 float16", "keys": KEYS, "batch": batch, "how": "measured",
        "device": device, "arch": "sm_90a", "copy_gbs": 3888.0, "us": one, "variants": {"apart": one, "chained": one},
        "pdl": "always", "bytes": 1000, "gbs": 1.0, "of_copy": 0.5, "versions": {"torch": "2.11.0"}, "commit": "0" * 40,
        "peers": {"mamba_ssm": {"us": peer, "ratio": 2.0, "variants": {"apart": peer}}},
    }  # fmt: skip


def row():
    return {
        "op": OP, "arch": "sm_90a", "heads": 4096, "spec": {"state_dtype": "float16"}, "config": {"rows": 16},
        "evidence": {"how": "measured", "us": 2.0, "rule_us": 3.0},
    }  # fmt: skip


def arrays(**values):
    file = io.BytesIO()
    np.savez(file, **values)
    return file.getvalue()


def packed(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def of_lines(*lines):
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def emulated_matrix(tmp_path):
    """What the arithmetic step writes, of a GPU whose sums are those of the emulator's hardware arithmetic."""
    with ptxsim.emulate(arch="sm_90a", arithmetic="hardware"):
        data = arithmetic.matrix(2, "float16", tmp_path, "cpu")
    return data, (tmp_path / "matrix-float16.npz").read_bytes()


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pass")
    sums, matrix = emulated_matrix(folder)
    x = arithmetic.approximate_inputs(64, 1).numpy()
    exact = np.stack([arithmetic.EXACT[name](x[f]) for f, name in enumerate(probes.FUNCTIONS)]).astype(np.float32)
    exact[1, :16] *= 1.001  # reciprocals that no document allows
    functions = {"rcp": {**arithmetic.histogram(np.array([0.3, -0.7])), "range": [1.0, 2.0, False]}}
    files = {
        "about.json": json.dumps(ABOUT).encode(),
        "summary.json": json.dumps([{"name": "smoke", "status": "failed", "seconds": 9.0, "line": "bad"}]).encode(),
        "failures.jsonl": of_lines({"step": "smoke", "name": f"{OP} z=1", "error": "Wrong: far off", "max_error": 0.5}),
        "items-smoke.jsonl": of_lines({"item": f"{OP} z=1", "state": "failed", "max_error": 0.5}),
        "items-arithmetic.jsonl": of_lines(
            {"item": "approximate 1", "state": "passed", "functions": functions},
            {"item": "matrix float16", "state": "passed", **sums},
        ),
        "approximate-1.npz": arrays(inputs=x, outputs=exact), "matrix-float16.npz": matrix,
        "times.jsonl": of_lines(*(timed(batch) for batch in (1, 2, 3, 4))) + b'{"op": "cut sh',
        "tuned.json": json.dumps([row()]).encode(),
    }  # fmt: skip
    return packed(folder / "pass1.tar.gz", files)


@pytest.fixture
def checkout(tmp_path):
    """As much of a checkout as takes results."""
    for folder in ("tools/bench/results", "cute_ssm/tuning", "tools/gpumodel/gpumodel", "docs/performance"):
        (tmp_path / folder).mkdir(parents=True)
    for path in ("tools/bench/results/host.json", "docs/performance/index.md", "docs/performance/measured.md",
                 "docs/performance/modelled.md", "cute_ssm/tuning/tables.json", "README.md"):  # fmt: skip
        shutil.copy(ROOT / path, tmp_path / path)
    return tmp_path


def test_one_command_takes_a_pass_in(archive, checkout, capsys):
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    given = ["--constants", "launch_us", "--batches", "1", "2", "3", "4"]
    code = gpu_check.main(["fit", str(archive), "--root", str(checkout), *given])
    assert code == 1, "the pass has a failure"
    results = checkout / "tools" / "bench" / "results"
    lines = report.read([results / "measured.jsonl"])
    assert [line["batch"] for line in lines] == [1, 2, 3, 4]
    assert row() in json.loads((checkout / "cute_ssm" / "tuning" / "tables.json").read_text())

    stored = json.loads((checkout / "tools" / "gpumodel" / "gpumodel" / "fitted.json").read_text())
    assert stored["H200"]["constants"]["launch_us"] == pytest.approx(TRUE_LAUNCH_US, rel=0.05)
    path = checkout / "tools" / "gpumodel" / "gpumodel" / "fitted.json"
    assert constants.fitted(gpumodel.H200, path).fitted and not constants.fitted(gpumodel.B200, path).fitted

    record = json.loads((results / "pass-nvidia-h200.json").read_text())
    assert record["fit"]["errors"]["fit"]["after"][0] < 0.02 < record["fit"]["errors"]["fit"]["before"][0]
    assert stored["H200"]["error"] == pytest.approx(record["fit"]["errors"]["held out"]["after"][0], abs=1e-4)
    assert record["errors"] == {OP: 0.5}
    assert record["beside_emulator"]["equal"] == {"float16": 1.0}
    assert record["beside_emulator"]["within"]["rcp"] == 48 / 64
    assert record["beside_emulator"]["within"]["ex2"] == 1.0

    page = (checkout / "docs" / "performance" / "measured.md").read_text()
    shown = ("| `selective_state_update` | Small T=1 float16 | NVIDIA H200 | 4 |", "Wrong: far off", "mamba_ssm, apart")
    for part in (*shown, "`launch_us`", "75.0%", "100.0%"):
        assert part in page, part
    index = (checkout / "docs" / "performance" / "index.md").read_text()
    assert "Times of NVIDIA H200 are measured" in index and "Nothing was measured on a GPU" not in index
    assert "**Nothing was measured" not in (checkout / "README.md").read_text()
    assert list((checkout / "docs" / "performance" / "plots").glob("measured-*.svg"))


def test_a_fit_that_errs_much_raises_the_margin_and_withdraws_modelled_configs(archive, checkout, monkeypatch, capsys):
    """Those with `config` in the copied table gain less than the error; the measured row of the pass stays."""
    given = Errors(3, 0.9, 1.0)
    found = Fit({"H200": gpumodel.H200}, {}, {}, {"fit": Errors(9, 0.1, 1.0), "held out": given}, {})
    monkeypatch.setattr(observed, "fit", lambda *_: found)
    monkeypatch.setattr(Fit, "as_json", lambda self: {"constants": {}, "errors": {}, "points": {}})
    monkeypatch.setattr(fit, "documents", lambda *_: None)
    assert gpu_check.main(["fit", str(archive), "--root", str(checkout)]) == 1
    stored = checkout / "tools" / "gpumodel" / "gpumodel" / "fitted.json"
    assert validated.error(fitted=stored) == 0.9
    table = json.loads((checkout / "cute_ssm" / "tuning" / "tables.json").read_text())
    assert [one["evidence"]["how"] for one in table if one["config"]] == ["measured"]
    assert "margin of modelled configs: 90.0%" in capsys.readouterr().out


def test_a_rehearsal_is_never_taken_for_a_measurement(tmp_path, checkout, capsys):
    for number, about in enumerate(({**ABOUT, "rehearsal": True}, {**ABOUT, "device": "gpushim sm_90a"})):
        path = packed(tmp_path / f"{number}.tar.gz", {"about.json": json.dumps(about).encode()})
        with pytest.raises(SystemExit):
            gpu_check.main(["fit", str(path), "--root", str(checkout)])
        assert "expected a pass on a GPU, got a rehearsal" in capsys.readouterr().err
    assert not (checkout / "tools" / "bench" / "results" / "measured.jsonl").exists()


def test_a_rehearsal_is_taken_in_without_a_trace_in_a_dry_run(tmp_path, checkout, monkeypatch, capsys):
    """A GPU that is not there stands for one of the model with as many SMs."""
    about = {**ABOUT, "device": "gpushim sm_90a", "sms": 132, "rehearsal": True}
    files = {"about.json": about, "tuned.json": [row()]}
    packing = {name: json.dumps(value).encode() for name, value in files.items()}
    packing["times.jsonl"] = of_lines(timed(1, "gpushim sm_90a"))
    path = packed(tmp_path / "rehearsal.tar.gz", packing)
    before = {file: file.read_bytes() for file in checkout.rglob("*") if file.is_file()}
    seen = []

    def fails(lines, *_):
        seen.extend(line["device"] for line in lines)
        raise ImportError("no scipy")

    monkeypatch.setattr(observed, "fit", fails)
    assert gpu_check.main(["fit", "--dry-run", str(path), "--root", str(checkout)]) == 1
    printed = capsys.readouterr().out
    assert {file: file.read_bytes() for file in checkout.rglob("*") if file.is_file()} == before
    assert seen == ["NVIDIA H200"], "the first of the model's that has 132 SMs"
    for name in ("docs/performance/measured.md", "tools/bench/results/measured.jsonl", "cute_ssm/tuning/tables.json",
                 "tools/bench/results/pass-nvidia-h200.json"):  # fmt: skip
        assert f"would write {name}\n" in printed, name


def test_times_of_another_board_or_of_a_part_of_one_are_not_fitted():
    line = {**timed(1, "NVIDIA H100 80GB HBM3 MIG 1g.10gb"), "sms": 16}
    with pytest.raises(ValueError, match="sms: expected 132, those of the model's H100, got 16"):
        observed.observations([line], ["chained"])


def test_what_is_no_archive_of_a_pass_is_refused(tmp_path, checkout, capsys):
    (tmp_path / "torn.tar.gz").write_bytes(b"1234")
    for path in (tmp_path / "torn.tar.gz", packed(tmp_path / "other.tar.gz", {"x": b""})):
        with pytest.raises(SystemExit):
            gpu_check.main(["fit", str(path), "--root", str(checkout)])
        assert "expected the archive of a pass" in capsys.readouterr().err


def test_passes_on_two_gpus_are_not_mixed(tmp_path, checkout, capsys):
    paths = [
        packed(tmp_path / f"{name}.tar.gz", {"about.json": json.dumps({**ABOUT, "device": f"NVIDIA {name}"}).encode()})
        for name in ("H100", "H200")
    ]
    with pytest.raises(SystemExit):
        gpu_check.main(["fit", *map(str, paths), "--root", str(checkout)])
    assert "got those on NVIDIA H100, NVIDIA H200" in capsys.readouterr().err


def test_a_pass_without_times_still_leaves_its_record(tmp_path, checkout):
    path = packed(tmp_path / "x.tar.gz", {"about.json": json.dumps(ABOUT).encode()})
    assert gpu_check.main(["fit", str(path), "--root", str(checkout)]) == 0
    assert (checkout / "tools" / "bench" / "results" / "pass-nvidia-h200.json").exists()


def test_a_model_that_cannot_be_fitted_keeps_nothing_else_back(archive, checkout, monkeypatch, capsys):
    seen = []

    def fails(lines, *_):
        seen.extend(line["batch"] for line in lines)
        raise ImportError("no scipy")

    monkeypatch.setattr(observed, "fit", fails)
    assert gpu_check.main(["fit", str(archive), "--root", str(checkout), "--batches", "1", "4"]) == 1
    assert seen == [1, 4]
    assert "the model is not fitted: no scipy" in capsys.readouterr().err
    record = json.loads((checkout / "tools" / "bench" / "results" / "pass-nvidia-h200.json").read_text())
    assert "fit" not in record and record["functions"]
    assert "Times of NVIDIA H200 are measured" in (checkout / "docs" / "performance" / "index.md").read_text()


def test_times_within_the_noise_of_what_was_subtracted_are_no_observations():
    line = timed(1)
    line["variants"]["apart"] = {"median": -0.1}
    names = [point.name for point in observed.observations([line], ["chained", "apart", "evicted"])]
    assert [name.rpartition(", ")[2] for name in names] == ["chained", "copy on H200"]


def test_later_times_of_a_call_replace_earlier_ones(tmp_path):
    path = tmp_path / "measured.jsonl"
    for us in (3.0, 4.0):
        one = {"op": OP, "case": "c", "batch": 1, "device": "NVIDIA H200", "how": "measured", "us": {"median": us}}
        fit.take_times([fit.Results(tmp_path, ABOUT, {"times.jsonl": of_lines(one)})], path)
    (line,) = report.read([path])
    assert line["us"]["median"] == 4.0


def test_devices_have_the_models_machine():
    assert observed.machine_name("NVIDIA H200") == "H200"
    assert observed.machine_name("NVIDIA H100 80GB HBM3") == "H100"
    with pytest.raises(ValueError, match="NVIDIA L4"):
        observed.machine_name("NVIDIA L4")


@pytest.mark.parametrize("operands", probes.OPERANDS)
def test_probes_multiply_matrices_as_their_fragments_say(operands, tmp_path):
    """In exact arithmetic: results are A B + C to float32's rounding, wherever lanes hold them."""
    with ptxsim.emulate(arch="sm_90a"):
        arithmetic.matrix(2, operands, tmp_path, "cpu")
    with np.load(tmp_path / f"matrix-{operands}.npz") as found:
        a, b, c, d = (torch.from_numpy(found[name]).double() for name in "abcd")
        want = (a @ b + c)[:, found["rows"], found["columns"]]
    size = (a.abs() @ b.abs() + c.abs()).max()
    assert float((d - want).abs().max()) < 2.0**-20 * float(size)


def test_probes_compute_the_functions(tmp_path):
    with ptxsim.emulate(arch="sm_90a"):
        found = arithmetic.approximate(64, 1, tmp_path, "cpu")["functions"]
    assert found.keys() == set(probes.FUNCTIONS)
    assert all(one["count"] == 64 and max(one["max"], -one["min"]) < 1 for one in found.values())
    assert [spec.op for spec, _, _ in probes.kernels(SM_90A)] == ["probe"] * 5
