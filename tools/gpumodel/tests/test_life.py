"""`gpumodel.timeline`: one CTA's life adds up, watched tensors are told from others, and it is drawn."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import small_kernels

import gpumodel
import ptxsim
from gpumodel import timeline

TILES = 24
WATCHED = timeline.Watched("input", lambda tensor: tensor == "arg0")


@pytest.fixture(scope="module")
def kernel():
    """A ring of three stages, with every wait of its warp."""
    data = np.zeros(TILES * 4096 + 128, np.uint8)[:-128]
    options = {"trace": gpumodel.Trace, "wave_lanes": None}
    launch = ptxsim.run(small_kernels.ring(3), "ring", 1, 32, [data, TILES], 0, **options)
    return gpumodel.time_launch(launch, 32, gpumodel.H200, timeline=True)


def test_waits_of_a_warp_add_up(kernel):
    life = timeline.life_of(kernel)
    shares = life.waits("warp 0")
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["copy of arg0"] > 0.2
    (warp,) = life.warps
    assert all(warp.first <= wait.start < wait.end <= warp.last for wait in warp.waits)
    assert all(wait.end <= after.start for wait, after in pairwise(warp.waits))


def test_bytes_in_flight_are_those_of_the_watched_tensors(kernel):
    everything, some = timeline.life_of(kernel), timeline.life_of(kernel, watched=WATCHED)
    none = timeline.life_of(kernel, watched=timeline.Watched("nothing", lambda tensor: False))
    assert max(step.n_bytes for step in some.in_flight) == 3 * 4096
    assert some.in_flight == everything.in_flight
    assert none.in_flight == []
    assert some.as_dict()["input_bytes_in_flight"]["sm_most"] == 3 * 4096


def test_watched_loads_have_a_class_of_their_own():
    assert timeline.class_of("copy of arg0", WATCHED) == "watched"
    assert timeline.class_of("load of arg1, arg0", WATCHED) == "watched"
    assert timeline.class_of("copy of arg1", WATCHED) == "other data"
    assert timeline.class_of("barrier 0", WATCHED) == "another warp"
    assert timeline.class_of("instruction cache") == "code"
    assert timeline.class_of("kernel before") == "the kernel before"


def test_text_names_roles_and_watched_bytes(kernel):
    said = timeline.text(timeline.life_of(kernel, roles=("producer",), watched=WATCHED), width=60)
    (row,) = [line for line in said.splitlines() if line.startswith("producer ") and "|" in line]
    assert "S" in row and "#" in row
    assert "input, CTA" in said and "S input" in said


def test_picture_is_a_png(kernel, tmp_path):
    pytest.importorskip("matplotlib")
    timeline.picture([timeline.life_of(kernel)], str(tmp_path / "life.png"), "ring")
    assert (tmp_path / "life.png").read_bytes()[:4] == b"\x89PNG"


def test_cta_that_did_not_run_is_refused(kernel):
    with pytest.raises(ValueError, match="cta: expected 0 to 0, got 7"):
        timeline.life_of(kernel, 7)


def test_kernel_without_its_waits_is_refused(kernel):
    data = np.zeros(4096 + 128, np.uint8)[:-128]
    options = {"trace": gpumodel.Trace, "wave_lanes": None}
    launch = ptxsim.run(small_kernels.ring(1), "ring", 1, 32, [data, 1], 0, **options)
    with pytest.raises(ValueError, match="timeline=True"):
        timeline.life_of(gpumodel.time_launch(launch, 32, gpumodel.H200))


def test_parts_of_an_interval():
    assert dict(timeline.spread(1.5, 3.25, (0.0, 4.0), 4)) == {1: 0.5, 2: 1.0, 3: 0.25}
    assert dict(timeline.spread(-1.0, 9.0, (0.0, 3.0), 3)) == {0: 1.0, 1: 1.0, 2: 1.0}
    assert timeline.level([(0.0, 4), (1.0, 8), (3.0, 0)], 0.0, 4.0, 2) == [6.0, 4.0]


def test_first_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    block = re.search(r"^```python\n(.*?)^```", readme, re.M | re.S).group(1)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert "load of" in capsys.readouterr().out
    assert (tmp_path / "timeline.png").exists()
