"""tools/timeline.py: one CTA's life adds up, names roles, and is drawn."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from cute_ssm.ops.selective_state_update.kernel import SelectiveStep

pytest.importorskip("gpumodel")
timeline = pytest.importorskip("timeline", reason="tools/ is not on the path")
drawing = timeline.timeline

RING = {"batch": "64", "config.stages": "3", "config.warps": "2", "config.rows": "64", "config.ctas_per_sm": "2"}


@pytest.fixture(scope="module")
def life():
    (found,) = timeline.lives("selective_state_update", RING)
    return found


def test_waits_of_a_role_add_up(life):
    for role in ("warp 0", "warp 1"):
        shares = life.waits(role)
        assert sum(shares.values()) == pytest.approx(1)
        assert all(share >= 0 for share in shares.values())
        assert shares["copy of state"] > 0.02
    for warp in life.warps:
        assert all(warp.first <= wait.start < wait.end <= warp.last for wait in warp.waits)
        assert all(wait.end <= after.start for wait, after in pairwise(warp.waits))


def test_state_in_flight_fits_the_rings(life):
    tile = 64 * 128 * 2
    assert max(step.n_bytes for step in life.in_flight) in (2 * 2 * tile, 3 * 2 * tile)
    assert max(step.n_bytes for step in life.sm_in_flight) <= 2 * 3 * 2 * tile
    assert life.in_flight[-1].n_bytes == 0
    assert 0.2 * tile < life.mean_in_flight(life.in_flight) < 3 * 2 * tile


def test_more_stages_hold_more_bytes_in_flight():
    alone = timeline.lives("selective_state_update", {**RING, "config.stages": "1", "batch": "16"})[0]
    ring = timeline.lives("selective_state_update", RING)[0]
    assert ring.mean_in_flight(ring.in_flight) > alone.mean_in_flight(alone.in_flight)


def test_text_shows_every_warp(life):
    said = drawing.text(life, width=60)
    rows = [line for line in said.splitlines() if line.startswith("warp ") and "|" in line]
    assert len(rows) == len(life.warps) == 2
    assert all("S" in row and "#" in row for row in rows)
    assert "KiB" in said


@pytest.mark.parametrize("how", ["table", "function"])
def test_kernel_class_names_the_roles_of_its_warps(how, monkeypatch):
    names = ("producer", "consumer")
    if how == "table":
        monkeypatch.setattr(SelectiveStep, "ROLES", names, raising=False)
    else:
        monkeypatch.setattr(SelectiveStep, "roles", staticmethod(lambda spec, config: names), raising=False)
    (named,) = timeline.lives("selective_state_update", {**RING, "config.warps": "3"})
    assert [warp.name for warp in named.warps] == ["producer", "consumer", "consumer"]


def test_a_row_shows_long_waits_as_waits(life):
    for warp in life.warps:
        row = drawing.letters(life, warp, 50)
        issued = row.count("#") / len(row)
        assert issued <= 3 * life.waits(warp.name)["issuing"]


def test_command_line(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "life.png"
    arguments = ["gated_delta_rule_mtp", "B=4", "T=4", "--json", "--png", str(path), "--machine", "B200"]
    assert timeline.main(arguments) == 0
    (said,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert said["state_bytes_in_flight"]["sm_most"] > 0
    assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "named"), [(["batch=x"], "batch"), (["nothing=1"], "nothing"), (["batch=2", "--cta", "99"], "cta")]
)
def test_bad_arguments_are_named(arguments, named, capsys):
    with pytest.raises(SystemExit):
        timeline.main(["selective_state_update", *arguments])
    assert f"error: {named}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tensor", "wanted"),
    [
        ("state", True),
        ("initial_state", True),
        ("ssm_states", True),
        ("state_scale", False),
        ("state_batch_indices", False),
        ("x", False),
    ],
)
def test_tensors_that_hold_states(tensor, wanted):
    assert timeline.is_state(tensor) == wanted
