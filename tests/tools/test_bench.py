"""tools/bench: what is measured, lines and reports, and that peers get the arguments they take."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from cute_ssm import workloads
from cute_ssm.compat import fla as compat_fla
from cute_ssm.compat.flashinfer import gdn_decode, mamba
from cute_ssm.errors import CuteSsmError
from cute_ssm.runtime import toolchain
from cute_ssm.tuner import timing

pytest.importorskip("bench", reason="tools/ is not on the path")
import machine_code
from bench import cases, counters, outputs, peers, report, roof, run

STEP = {"batch": 3, "nheads": 4, "dim": 16, "dstate": 32, "state_dtype": "float32"}


# ------------------------------------------------------------------------------------------------------------- counters
def test_counting_one_operator_leaves_the_rows_of_others(monkeypatch):
    monkeypatch.setattr(counters, "commit", lambda: "none")
    known = json.loads(counters.RESULTS.read_text())["rows"]
    assert counters.record(["an operator without cases"])["rows"] == known


# ------------------------------------------------------------------------------------------------------------ the cases
def test_every_declared_model_has_cases():
    found = list(cases.declared())
    assert {case.model for case in found} == set(workloads.models())
    assert len({(case.op, case.name) for case in found}) == len(found), "two cases of one name"
    assert {case.op for case in cases.declared(ops=["selective_scan"])} == {"selective_scan"}
    assert {c.name.split()[1] for c in found if c.model == "nemotron-3-super"} == {"TP1", "TP8"}


def test_unknown_operators_and_models_are_refused():
    with pytest.raises(ValueError, match="nonsense"):
        list(cases.declared(ops=["nonsense"]))
    with pytest.raises(ValueError, match="nonsense"):
        list(cases.declared(models=["nonsense"]))


# --------------------------------------------------------------------------------------------------------------- timing
@pytest.mark.parametrize(
    ("floor", "size", "free", "wanted"),
    [(1 << 20, 2 << 20, 1 << 40, 150), (1 << 30, 2 << 30, 1 << 36, 4), (1 << 10, 1 << 12, 1 << 40, 256),
     (1 << 20, 1 << 30, 10 << 30, 4)],
)  # fmt: skip
def test_a_pass_moves_three_times_the_cache(floor, size, free, wanted):
    count = timing.sets_for(floor, size, 50 << 20, free)
    assert count == wanted
    assert count * size <= timing.MEMORY_SHARE * free


def test_sets_that_do_not_fit_are_refused():
    with pytest.raises(MemoryError, match="do not fit"):
        timing.sets_for(1 << 30, 1 << 30, 50 << 20, 2 << 30)


def test_summary_of_samples():
    assert roof.summary(list(range(1, 12))) == {"median": 6, "p10": 2, "p90": 10}
    assert roof.summary([3.0]) == {"median": 3.0, "p10": 3.0, "p90": 3.0}


def test_the_bandwidth_of_a_copy_is_of_bytes_read_and_written(monkeypatch):
    """Of half a gibibyte in a millisecond, per call of a pass, by the median."""
    seen = []
    monkeypatch.setattr(roof, "capture", lambda runs: seen.append(len(runs)) or "graph")

    def alternate(passes, samples):
        assert passes == {"copy": ("graph", 1)} and samples == 7
        return {"copy": [500.0, 1000.0, 9000.0]}

    monkeypatch.setattr(roof, "alternate", alternate)
    assert roof.copy_bandwidth(torch.device("cpu"), samples=7) == pytest.approx(2 * 2**29 / 1e-3)
    assert seen == [1]


# --------------------------------------------------------------------------------------------------------- what is kept
def test_no_tool_overwrites_a_file_that_it_was_not_given(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "modelled.jsonl"
    mine.write_text("precious")
    with pytest.raises(SystemExit):
        run.main(["--model", "--ops", "selective_state_update", "--batches", "1"])
    assert f"--out: expected a file, as {mine} exists; name it to overwrite it" in capsys.readouterr().err
    assert mine.read_text() == "precious"
    assert outputs.destination(None, "new.jsonl") == Path("new.jsonl")
    assert outputs.destination(None, "modelled.jsonl", goes_on=True) == Path("modelled.jsonl")
    assert outputs.destination(mine, "modelled.jsonl") == mine
    monkeypatch.chdir(outputs.RESULTS)
    with pytest.raises(ValueError, match="exists"):
        outputs.destination(None, "modelled.jsonl", goes_on=True)


def test_counters_are_printed_and_written_only_where_asked(tmp_path, monkeypatch, capsys):
    machine_code.needed()
    committed = {path: path.read_bytes() for path in (counters.RESULTS, counters.PAGE)}
    monkeypatch.setattr(
        counters, "cases", lambda: [("selective_state_update", {"batch": 1, "nheads": 2, "dstate": 16})]
    )
    monkeypatch.setattr(counters, "ARCHS", ("sm_90a",))
    assert counters.main([]) == 0
    printed = capsys.readouterr().out
    assert "| `selective_state_update` | `batch=1 nheads=2" in printed
    assert counters.main(["--out", str(tmp_path / "new" / "counters.json")]) == 0
    (row,) = json.loads((tmp_path / "new" / "counters.json").read_text())["rows"]
    assert row["arch"] == "sm_90a" and row["commit"]
    assert counters.main(["--table"]) == 0
    assert {path: path.read_bytes() for path in committed} == committed
    with pytest.raises(SystemExit):
        counters.main(["--table", "--out", "x"])


@pytest.mark.parametrize("lack", ["git", "repository"])
def test_without_git_the_sources_are_named_by_their_digest(lack, tmp_path, monkeypatch):
    if lack == "git":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setattr(outputs, "ROOT", tmp_path)
    assert outputs.commit() == f"no commit, sources {toolchain.sources_digest()}"


def test_a_kit_names_the_commit_that_was_packed_while_its_sources_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "ROOT", tmp_path)
    monkeypatch.setattr(outputs, "COMMIT", tmp_path / "COMMIT")
    outputs.COMMIT.write_text(f"0123abc {toolchain.sources_digest()}\n")
    assert outputs.commit() == "0123abc"
    outputs.COMMIT.write_text("0123abc another\n")
    assert outputs.commit() == f"no commit, sources {toolchain.sources_digest()}"


# ---------------------------------------------------------------------------------------------------------------- peers
def module(name, **members):
    made = types.ModuleType(name)
    made.__dict__.update(members)
    return made


def check_peer(op, name, keys, results, monkeypatch, **modules):
    """A peer whose function is our own, by the peer's signature, must give our results."""
    for path, member in modules.items():
        monkeypatch.setitem(sys.modules, path.replace("__", "."), member)
    ours, theirs = workloads.build(op, keys), workloads.build(op, keys)
    ours.run()
    present, absent = peers.of(op, [theirs.arguments])
    assert name in present, absent
    returned = present[name][0]()
    for result in results:
        assert torch.equal(ours.arguments[result], theirs.arguments[result])
    return ours, returned


@pytest.mark.parametrize("more", [{}, {"T": 3}, {"T": 2, "intermediates": 1}, {"T": 2, "varlen": 1}], ids=str)
def test_flashinfer_step_takes_our_arguments(more, monkeypatch):
    fake = module("flashinfer.mamba", selective_state_update=mamba.selective_state_update)
    check_peer(
        "selective_state_update", "flashinfer", {**STEP, **more}, ["out", "state"], monkeypatch, flashinfer__mamba=fake
    )


def test_mamba_ssm_step_takes_our_arguments(monkeypatch):
    def step(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None):
        out = torch.empty_like(x)
        mamba.selective_state_update(
            state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, out=out
        )  # fmt: skip
        return out

    path = "mamba_ssm__ops__triton__selective_state_update"
    fake = module(path, selective_state_update=step)
    ours, out = check_peer(
        "selective_state_update", "mamba_ssm", STEP, ["state"], monkeypatch, **{path: fake}
    )  # fmt: skip
    assert torch.equal(out, ours.arguments["out"])


def test_vllm_step_takes_our_arguments(monkeypatch):
    def step(
        state, x, dt, A, B, C, D, dt_bias, *, z, dt_softplus, out, state_batch_indices, null_block_id, is_blackwell
    ):
        assert null_block_id < 0, "slot 0 holds a state"
        mamba.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, out=out)

    path = "__".join(peers.VLLM_STEP.split("."))
    fake = module(path, selective_state_update=step)
    monkeypatch.setitem(sys.modules, peers.VLLM_STEP, fake)
    check_peer("selective_state_update", "vllm", STEP, ["state", "out"], monkeypatch)


def test_flashinfer_gdn_takes_our_arguments(monkeypatch):
    fake = module("flashinfer.gdn_decode", gated_delta_rule_mtp=gdn_decode.gated_delta_rule_mtp)
    keys = {"B": 2, "T": 2, "H": 1, "HV": 2, "verify": 0}
    results = ["output", "initial_state"]
    check_peer("gated_delta_rule_mtp", "flashinfer", keys, results, monkeypatch, flashinfer__gdn_decode=fake)


def test_fla_computes_the_same(monkeypatch):
    function = compat_fla.fused_recurrent_gated_delta_rule
    fake = module("fla.ops.gated_delta_rule", fused_recurrent_gated_delta_rule=function)
    keys = {"B": 2, "T": 3, "H": 1, "HV": 2, "verify": 0}
    ours, (out, _) = check_peer("gated_delta_rule_mtp", "fla", keys, [], monkeypatch, fla__ops__gated_delta_rule=fake)
    want = ours.arguments["output"].float()
    assert (out.float() - want).abs().max() <= 2e-2 * want.abs().max()


def test_absent_peers_say_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer.mamba", None)
    fake = module("x", selective_state_update=lambda **_: None)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.selective_state_update", fake)
    call = workloads.build("selective_state_update", {**STEP, "T": 2})
    present, absent = peers.of("selective_state_update", [call.arguments])
    assert not present
    assert "flashinfer.mamba" in absent["flashinfer"]
    assert "one token" in absent["mamba_ssm"]


def test_a_peer_that_fails_costs_only_itself(monkeypatch):
    """Triton raises RuntimeError, at import or later, where it finds no C compiler."""

    def raises(*_):
        raise RuntimeError("Failed to find C compiler")

    call = workloads.build("gated_delta_rule_mtp", {"B": 2, "H": 1, "HV": 2, "verify": 0})
    monkeypatch.setattr(peers, "import_module", raises)
    present, absent = peers.of("gated_delta_rule_mtp", [call.arguments])
    assert not present and "RuntimeError: Failed to find C compiler" in absent["fla"]
    monkeypatch.setitem(peers.PEERS["gated_delta_rule_mtp"], "fla", raises)
    _, absent = peers.of("gated_delta_rule_mtp", [call.arguments])
    assert absent["fla"] == "RuntimeError: Failed to find C compiler"


# ---------------------------------------------------------------------------------------------------- lines and reports
@pytest.fixture(scope="module")
def modelled(tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "modelled.jsonl"
    arguments = ["--model", "--ops", "selective_state_update", "--models", "nemotron-nano", "--batches", "1"]
    assert run.main([*arguments, "--machines", "H200", "--out", str(path)]) == 0
    return path, arguments


def test_modelled_lines_say_that_they_are(modelled):
    lines = report.read([modelled[0]])
    assert [line["keys"].get("state_dtype", "float16") for line in lines] == ["float16", "float32"]
    for line in lines:
        assert (line["how"], line["fitted"], line["device"], line["arch"]) == ("modelled", False, "H200", "sm_90a")
        assert 0 < line["of_copy"] < 1
        assert line["gbs"] == pytest.approx(line["bytes"] / line["us"]["median"] / 1e3, rel=0.01)
        assert {"commit", "versions", "keys", "model", "kernels"} <= line.keys()


def test_resume_leaves_out_what_is_done(modelled, capsys):
    path, arguments = modelled
    before = path.read_text()
    first = "".join(before.splitlines(keepends=True)[:1])
    path.write_text(first)
    assert run.main([*arguments, "--machines", "H200", "--out", str(path), "--resume"]) == 0
    after = path.read_text()
    path.write_text(before)
    assert after.startswith(first)
    assert len(after.splitlines()) == 2
    assert capsys.readouterr().out.count("modelled") == 1


def test_a_run_stops_when_its_time_is_up(modelled, tmp_path):
    path = tmp_path / "some.jsonl"
    assert run.main([*modelled[1], "--out", str(path), "--minutes", "1e-12"]) == 3
    assert path.read_text() == ""


def test_without_a_gpu_the_model_is_named(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        run.main(["--quick"])
    assert "--model" in capsys.readouterr().err


def test_gate_lets_right_results_pass_and_no_others(monkeypatch):
    keys = tuple((k, v) for k, v in STEP.items() if k != "batch")
    case = cases.Case("some", "selective_state_update", keys, (2,))
    run.gate(case, torch.device("cpu"))
    original = workloads.Call.run

    def broken(call, made=[]):  # noqa: B006
        made.append(original(call))
        if len(made) == 2:
            call.arguments["state"][call.arguments["state_batch_indices"][0].item(), 1, 2, 3] += 1.0
        return made[-1]

    monkeypatch.setattr(workloads.Call, "run", broken)
    with pytest.raises(CuteSsmError, match="state differs"):
        run.gate(case, torch.device("cpu"))


def line(batch, us, how="measured", **rivals):
    found = {name: {"us": roof.summary([us * ratio]), "ratio": ratio} for name, ratio in rivals.items()}
    return {
        "op": "selective_state_update", "case": "Some-Model T=1", "device": "GPU", "how": how, "batch": batch,
        "us": {"median": us, "p10": us * 0.9, "p90": us * 1.1}, "of_copy": 0.5, "commit": "0" * 40,
        "versions": {"torch": "x"}, "peers": {**found, "fla": {"absent": "no"}}, "copy_gbs": 4000.0,
    }  # fmt: skip


def test_table_shows_times_shares_and_ratios():
    lines = [line(1, 2.5), line(8, 20.0, flashinfer=1.25, copy=0.5)]
    head, _, row = report.table(lines, batches=(1, 8, 64)).splitlines()
    assert [c.strip() for c in head.split("|")[4:-1]] == [
        "batch 1: us, of copy", "batch 8: us, of copy", "copy / ours, batch 8", "flashinfer / ours, batch 8",
    ]  # fmt: skip
    assert [c.strip() for c in row.split("|")[4:-1]] == ["2.50, 50%", "20.0, 50%", "0.50", "1.25"]


def test_summary_shows_ranges_of_shares_and_of_the_best_peers_ratio():
    lines = [line(1, 2.5), line(8, 20.0, flashinfer=1.25, fla=1.5, copy=0.5), line(8, 9.0, flashinfer=0.75)]
    lines[1]["of_copy"] = 0.75
    head, _, row = report.summary(lines, batches=(1, 8, 64)).splitlines()
    assert [c.strip() for c in head.split("|")[3:-1]] == [
        "batch 1: of copy", "batch 8: of copy", "batch 64: of copy", "best peer / ours",
    ]  # fmt: skip
    assert [c.strip() for c in row.split("|")[3:-1]] == ["50%", "50% to 75%", "", "0.75 to 1.25"]


def test_page_is_rewritten_between_its_marks_only(tmp_path):
    page = tmp_path / "modelled.md"
    page.write_text("before\n<!-- modelled:begin -->\nold\n<!-- modelled:end -->\nafter\n")
    assert report.write_page("modelled", "new", page)
    assert page.read_text() == "before\n<!-- modelled:begin -->\nnew\n<!-- modelled:end -->\nafter\n"
    assert not report.write_page("modelled", "new", page), "twice the same changes nothing"
    with pytest.raises(ValueError, match=r"modelled\.md: expected the marks <!-- measured:begin -->"):
        report.write_page("measured", "new", page)


def test_plots_are_drawn_with_at_most_six_curves_a_panel(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [line(1, 2.5), line(8, 20.0, flashinfer=1.25), line(1, 3.0, "modelled"), line(8, 9.0, "modelled")]
    lines += [line(1, 2.5) | {"case": f"Some-Model T={number}"} for number in range(2, 9)]
    written = report.plots(lines, tmp_path)
    assert [path.name for path in written] == [
        "measured-selective_state_update-of-copy.svg", "measured-selective_state_update-best-peer.svg",
        "modelled-selective_state_update-of-copy.svg",
    ]  # fmt: skip
    assert all("<svg" in path.read_text() for path in written)
    assert {name: len(curves) for name, curves in report.panels(lines).items()} == {
        "Some-Model (1)": 6, "Some-Model (2)": 2,
    }  # fmt: skip


def test_broken_files_are_named(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(line(1, 2.5)) + "\n{}\n")
    with pytest.raises(ValueError, match=r"broken\.jsonl:2"):
        report.read([path])


def test_performance_pages_show_the_committed_lines():
    lines = report.read(sorted(report.RESULTS.glob("*.jsonl")))
    for mark, text, page in report.pages(lines):
        shown = f"<!-- {mark}:begin -->\n{text}\n<!-- {mark}:end -->"
        assert shown in page.read_text(), f"{mark}: run python tools/bench/report.py --docs"


def test_plots_of_the_documents_are_drawn_from_the_committed_lines():
    lines = report.read(sorted(report.RESULTS.glob("*.jsonl")))
    drawn = {path.stem: path.read_text() for path in (report.DOCS / "plots").glob("*.svg")}
    shown = "\n".join(path.read_text() for path in report.DOCS.glob("*.md"))
    for op, how in {(one["op"], one["how"]) for one in lines}:
        mine = [one for one in lines if (one["op"], one["how"]) == (op, how)]
        timed = [one for one in mine if report.best_peer(one) is not None]
        for name, used in (("of-copy", mine), ("best-peer", timed)):
            if used:
                text = drawn.pop(f"{how}-{op}-{name}")
                assert report.fingerprint(used) in text, "run: python tools/bench/report.py --docs"
                assert f"(plots/{how}-{op}-{name}.svg)" in shown
    assert not drawn, "plots of nothing that is recorded"


# ---------------------------------------------------------------------------------------------------------------- a GPU
@pytest.mark.gpu
@pytest.mark.timed
def test_a_call_is_measured_beside_a_copy(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    path = tmp_path / "measured.jsonl"
    arguments = ["--ops", "selective_state_update", "--models", "nemotron-nano", "--batches", "64", "--quick"]
    assert run.main([*arguments, "--out", str(path)]) == 0
    for measured in report.read([path]):
        us = measured["us"]
        assert 0 < us["p10"] <= us["median"] <= us["p90"]
        assert measured["peers"]["copy"]["us"]["median"] > 0
        assert 0 < measured["of_copy"] < 1.2
