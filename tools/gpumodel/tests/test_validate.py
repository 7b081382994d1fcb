"""`gpumodel.validate`: points and their refusals, recordings on disk, calls longer than their record, tables."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import types
from pathlib import Path

import numpy as np
import pytest
import small_kernels

import gpumodel
import ptxsim
from gpumodel import MachineCode, validated
from gpumodel.constants import MACHINES, value_of
from gpumodel.fit import Observation
from gpumodel.validate import command, points, recordings, sweeps, tables, times
from gpumodel.validate.kernels import Call

ROOT = Path(__file__).resolve().parents[3]
GOOD = {"name": "p", "source": "s", "gpu": "H200", "kernel": "vllm selective_state_update", "us": 2.0,
        "keys": {"batch": 2}, "protocol": {"data": "warm"}}  # fmt: skip


def file_of(folder, *items):
    path = folder / "points.json"
    path.write_text(json.dumps({"points": items}))
    return path


# --------------------------------------------------------------------------------------------------------------- points
def test_keys_that_a_point_leaves_out_have_the_known_values(tmp_path):
    (point,), refused = points.read(file_of(tmp_path, GOOD))
    assert not refused
    assert (point.keys["batch"], point.keys["headdim"], point.half) == (2, 64, "held out")
    assert point.conditions == gpumodel.Conditions(data="warm")


@pytest.mark.parametrize(
    "wrong,said",
    [
        ({"kernel": "mine"}, "kernel: expected one of vllm selective_state_update, .* got 'mine'"),
        ({"gpu": "A100"}, "gpu: expected one of .*H100.*, got 'A100'"),
        ({"keys": {"rows": 2}}, "keys: expected .*batch.*, got rows"),
        ({"us": 0}, "us: expected microseconds, got 0"),
        ({"half": "both"}, "half: expected one of fit, held out, got 'both'"),
        ({"protocol": {"data": "hot"}}, "data: expected one of"),
        ({"protocol": {"clock": 1}}, "clock"),
    ],
)
def test_a_point_that_names_what_is_not_known_is_refused_alone(wrong, said, tmp_path):
    found, refused = points.read(file_of(tmp_path, GOOD, {**GOOD, "name": "q", **wrong}))
    assert [point.name for point in found] == ["p"]
    (one,) = refused
    assert one.name == "q"
    assert re.search(said, one.why), one.why


def test_a_point_without_a_field_and_a_second_one_of_a_name_are_refused(tmp_path):
    short = {key: value for key, value in GOOD.items() if key != "us"}
    _, refused = points.read(file_of(tmp_path, {**short, "name": "short"}, GOOD, GOOD))
    assert [tuple(one) for one in refused] == [("short", "lacks us"), ("p", "the name is not unique")]


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json: no file of points"):
        points.read(path)


def test_the_command_says_for_each_point_why_it_is_not_modelled(tmp_path, capsys):
    path = file_of(tmp_path, GOOD, {**GOOD, "name": "q", "kernel": "mine"})
    folders = ["--peers", str(tmp_path / "peers"), "--cache", str(tmp_path / "cache")]
    assert command.main(["--points", str(path), *folders, "--out", str(tmp_path / "out.json")]) == 1
    printed, said = capsys.readouterr()
    assert "q: kernel: expected one of" in said
    assert "p: Absent: " in said and "pip install --no-deps --target" in said
    assert "- p: Absent" in printed
    found = json.loads((tmp_path / "out.json").read_text())
    assert not found["points"] and {one["name"] for one in found["refused"]} == {"p", "q"}


def test_the_published_points_can_all_be_read():
    found, refused = points.read()
    assert len(found) >= 80 and not refused
    assert {point.half for point in found} == {"fit", "held out"}
    assert all(point.where.startswith("https://") for point in found)


# ----------------------------------------------------------------------------------------------------------- recordings
@pytest.fixture
def recording(monkeypatch):
    """A copy by as many CTAs as make 60 of an SM, of which the first ones are recorded."""
    monkeypatch.setattr(recordings, "code_of", lambda cubin: MachineCode(4096, 200, straight=False))

    def of(whole):
        n_bytes = 120 * 2 * 32 * 64  # of 2 trips by 32 threads, which leave gaps
        arrays = [np.zeros(n_bytes + 128, np.uint8) for _ in range(2)]
        arrays = [array[-array.ctypes.data % 128 :][:n_bytes] for array in arrays]
        launch = ptxsim.run(small_kernels.COPY, "copy", 120, 32, [*arrays, 2], **recordings.options(2, whole))
        info = types.SimpleNamespace(registers=32)
        launch.function = types.SimpleNamespace(kernels=[info], cubin=b"", ptx=small_kernels.COPY)
        return recordings.recording_of(types.SimpleNamespace(launches=[launch]), 2)

    monkeypatch.setattr(recordings, "most_ctas", lambda launch: 40)
    for module in ("gpumodel.model", "gpumodel.validate.times"):
        monkeypatch.setattr(f"{module}.resident_ctas", lambda *_: 10)
    return of


POINT = points.point_of("p", GOOD)._replace(conditions=gpumodel.Conditions())
SMALL = gpumodel.MACHINES["H200"]


def test_a_recording_from_disk_takes_the_same_time(recording, tmp_path):
    made = recording(whole=False)
    assert (made.launches[0].ctas, made.launches[0].all_ctas) == (40, 60)
    cache = recordings.Cache(tmp_path)
    assert cache.get({"key": 1}) is None
    cache.put({"key": 1}, made)
    read = cache.get({"key": 1})
    assert cache.get({"key": 2}) is None
    assert times.time_of(read, SMALL, POINT) == times.time_of(made, SMALL, POINT)
    assert read.launches[0].code == made.launches[0].code


def test_a_call_is_continued_from_the_record_of_its_first_ctas(recording):
    part, whole = (times.time_of(recording(whole), SMALL, POINT) for whole in (False, True))
    assert part == pytest.approx(whole, rel=0.05)


def test_the_pace_is_that_of_the_starts_and_not_of_the_end():
    lives = {}
    for cta in range(6):  # 2 are resident; the first wave takes 300 clocks, the second one 100; the last CTA ends late
        for warp in range(2):
            start = (0.0, 300.0, 400.0)[cta // 2] + 10 * (cta % 2)
            lives[2 * cta + warp] = (start + warp * cta, 0.0 if cta < 5 else 9999.0)
    timing = types.SimpleNamespace(lives=lives, dram_busy=240.0, port_busy=120.0)
    kernel = types.SimpleNamespace(trace=types.SimpleNamespace(warps_per_cta=2), timing=timing)
    assert times.pace(kernel, 2) == 50
    timing.dram_busy = 6 * 60.0  # of writes, which no CTA waits for
    assert times.pace(kernel, 2) == 60


def test_machines_that_differ_in_launches_alone_share_a_replay(recording, tmp_path, monkeypatch):
    library = times.Library(tmp_path, tmp_path)
    library.cache.put(POINT.recorded, recording(whole=True))
    replays = []
    monkeypatch.setattr(times, "time_of", lambda *given: replays.append(given) or 5.0)
    for field in ("launch_us", "stream_launch_us", "profiler_us"):
        conditions = gpumodel.Conditions(
            launch=field.partition("_us")[0].replace("_launch", "").replace("launch", "graph")
        )
        for us in (1.0, 2.0):
            machine = dataclasses.replace(SMALL, **{field: us})
            assert library.modelled(POINT._replace(conditions=conditions), machine) == 5.0 + us
    assert len(replays) == 3
    library.modelled(POINT, dataclasses.replace(SMALL, dram_latency=500.0))
    assert len(replays) == 4


def test_a_modelled_point_takes_the_time_of_its_call(recording, tmp_path):
    made = recording(whole=True)
    library = times.Library(tmp_path, tmp_path)
    library.cache.put(POINT.recorded, made)
    assert library.modelled(POINT, SMALL) == pytest.approx(times.time_of(made, SMALL, POINT))


def test_a_call_without_a_launch_is_no_recording():
    with pytest.raises(ValueError, match="launched no kernel"):
        recordings.recording_of(types.SimpleNamespace(launches=[]), 2)


def test_what_the_first_ctas_of_all_sms_read_together_is_counted(recording):
    (launch,) = recording(whole=False).launches
    assert list(launch.together.values()) == [1.0]  # no CTA reads what another one does


def test_a_call_of_cute_dsl_is_recorded_for_the_architecture_of_the_gpu(monkeypatch):
    import small_cute

    monkeypatch.setattr(recordings, "code_of", lambda function: MachineCode(4096, 200, straight=False))
    (launch,) = times.recorded(Call(small_cute.doubled, language="CuTe DSL"), MACHINES["B200"]).launches
    assert ".target sm_100a" in launch.ptx
    assert (launch.grid, launch.block_threads, launch.all_ctas) == ((296, 1, 1), 32, 2)
    assert launch.registers > 0


def test_a_launch_is_of_the_function_that_has_its_kernel():
    a, b = (types.SimpleNamespace(kernels=[types.SimpleNamespace(name=name)]) for name in "ab")
    launch = types.SimpleNamespace(program=types.SimpleNamespace(kernel=types.SimpleNamespace(name="b")))
    assert recordings.function_of(types.SimpleNamespace(functions=[a, b]), launch) is b


# ------------------------------------------------------------------------------------------------------------------ fit
def test_constants_of_a_gpu_are_fitted_on_its_points_from_their_start():
    pytest.importorskip("scipy")
    said = [(3.0, "H200", "fit"), (4.0, "H200", "held out"), (1.5, "B200", "fit")]
    made = [POINT._replace(name=f"{gpu} {us}", us=us, gpu=gpu, half=half) for us, gpu, half in said]
    seen = []

    def observation(point):
        def modelled(machine):
            seen.append((machine.name, machine.launch_us))
            return machine.launch_us

        return Observation(point.name, point.us, modelled, point.gpu, point.source, point.half)

    library = types.SimpleNamespace(observation=observation)
    found = command.fit_of(made, library, ["launch_us@H200=1.5", "launch_us@B200"], rounds=12)
    after = {name: change["after"] for name, change in found["constants"].items()}
    assert after == {"launch_us@H200": pytest.approx(2.2, rel=0.01), "launch_us@B200": pytest.approx(1.5, rel=0.01)}
    assert ("H200", 1.5) in seen and ("B200", MACHINES["B200"].launch_us) in seen
    assert found["errors"]["held out"] == {"n": 1, "before": [0.625, 0.375], "after": pytest.approx([0.45, 0.55], 0.01)}
    assert found["errors"]["fit"]["n"] == 2


def test_the_constants_are_those_that_the_committed_fit_found():
    fit = json.loads(validated.RESULT.read_text(encoding="utf-8"))["fit"]
    for name, change in fit["constants"].items():
        field, _, gpu = name.partition("@")
        assert value_of(MACHINES[gpu], field) == pytest.approx(change["after"], rel=0.002), name


# --------------------------------------------------------------------------------------------------------------- tables
def test_the_regret_is_of_the_published_winner():
    sweep = sweeps.Sweep("s", (4, 4), {(4, 1): 2.0, (4, 4): 3.0, (8, 1): 2.5})
    assert (sweep.best, sweep.rank, sweep.regret) == ((4, 1), 3, 0.5)
    assert "Within 5.0 %: 0 of 1." in tables.sweeps_table({"sweeps": [sweep.as_json()]})


def test_errors_are_summed_up_by_source_and_half():
    found = tables.result([(POINT, 1.0), (POINT._replace(name="q", half="fit"), 4.0)], [], [], None)
    errors = tables.errors(found)
    assert errors["s"]["all"] == (2, 0.75, pytest.approx(1.0))
    assert errors["all"]["held out"].bias == pytest.approx(0.5)
    assert "| s | 2 | 75.0 % | 1.00 | 1 | 50.0 % | 0.50 |" in tables.summary(found)


def test_the_documented_tables_are_those_of_the_committed_result():
    page = ROOT / "docs" / "performance" / "validation.md"
    if not page.exists():
        pytest.skip("not in a checkout of the repository")
    text = page.read_text(encoding="utf-8")
    assert tables.rendered(text, json.loads(validated.RESULT.read_text(encoding="utf-8"))) == text


def test_the_validated_error_is_the_larger_one_of_all_and_held_out_points(tmp_path):
    def error(*pairs):
        path = tmp_path / "v.json"
        path.write_text(json.dumps({"points": [{"ratio": ratio, "half": half} for ratio, half in pairs]}))
        return validated.error(path, tmp_path / "none.json")

    assert error((1.1, "fit"), (1.3, "held out")) == pytest.approx(0.3)
    assert error((1.5, "fit"), (1.1, "held out")) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="no point"):
        error()
    assert 0 < validated.error() < 0.5


@pytest.mark.parametrize("errors,expected", [((0.1, 0.4), 0.4), ((0.1, 0.2), 0.3)])
def test_the_error_of_a_fit_counts_where_it_is_larger_than_that_of_the_validation(errors, expected, tmp_path):
    result, fitted = tmp_path / "v.json", tmp_path / "fitted.json"
    result.write_text(json.dumps({"points": [{"ratio": 1.3, "half": "held out"}]}))
    fits = {gpu: {"constants": {}, "error": error} for gpu, error in zip(("H100", "H200"), errors)}
    fitted.write_text(json.dumps(fits))
    assert validated.error(result, fitted) == pytest.approx(expected)


@pytest.mark.peers
def test_three_recorded_points_are_modelled_as_the_result_says(tmp_path):
    peers = os.environ.get("GPUMODEL_PEERS")
    if not peers:
        pytest.skip("GPUMODEL_PEERS names no folder of packages")
    found = {one["name"]: one for one in json.loads(validated.RESULT.read_text(encoding="utf-8"))["points"]}
    library = times.Library(Path(peers), tmp_path)
    for point in points.read()[0]:
        if point.name in (
            "vLLM #43083 H100 fp16 batch x heads 128 (8, 2)", "vLLM #31722 B200 value heads 8 batch 32 columns 32",
            "FlashInfer #2588 B200 value heads 32 batch 1",
        ):  # fmt: skip
            us = library.modelled(point, MACHINES[point.gpu])
            assert us == pytest.approx(found[point.name]["modelled"], rel=0.01)
