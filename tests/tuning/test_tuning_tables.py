"""Tables of measured configs: matching, distance, precedence, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest

from cute_ssm import arch, tuning
from cute_ssm.compat.vllm import configs as vllm_configs
from cute_ssm.ops.selective_state_update import config as selective_step
from cute_ssm.tuning import tables

SPEC = vllm_configs._spec(64, 128, "float16", False)


@pytest.fixture
def write(settings, tmp_path):
    """Make CUTE_SSM_TUNING_DIR hold one file of these rows, or of this text."""

    def fill(*rows, text=None, name="a.json"):
        (tmp_path / name).write_text(json.dumps(rows) if text is None else text)
        settings(TUNING_DIR=tmp_path)
        tables.forget()

    yield fill
    settings()
    tables.forget()


def row(heads, target="sm_90a", spec=None, **config):
    fields = {"dim": 64, "dstate": 128, "state_dtype": "float16"}
    return {"op": "selective_state_update", "arch": target, "heads": heads, "spec": spec or fields, "config": config}


def chosen(heads, target=arch.SM_90A, spec=SPEC):
    return selective_step.choose(spec, target, heads, 132)


def test_the_nearest_row_by_logarithm(write):
    write(row(64, warps=1), row(4096, warps=4))
    assert [chosen(heads).warps for heads in (1, 64, 511, 513, 100000)] == [1, 1, 1, 4, 4]


def test_rows_of_other_targets_and_specs_do_not_count(write):
    other = dataclasses.replace(SPEC, state_dtype="float32")
    before = [chosen(512), chosen(512, arch.SM_100A), chosen(512, spec=other)]
    write(row(512, warps=3))
    assert chosen(512) == dataclasses.replace(before[0], warps=3)
    assert [chosen(512, arch.SM_100A), chosen(512, spec=other)] == before[1:]


def test_more_fields_come_first_and_then_the_first_file(write):
    write(row(512, spec={"dim": 64}, warps=2), row(1, warps=3))
    assert chosen(512).warps == 3
    write(row(1, warps=4), name="0.json")
    assert chosen(512).warps == 4


@pytest.mark.parametrize("config", [{"rows": 7}, {"warps": 99}, {"lanes": 4}, {"speed": 1}])
def test_a_config_that_cannot_run_or_changes_results_is_ignored_and_logged(write, caplog, config):
    before = chosen(512)
    write(row(512, **config))
    caplog.set_level(logging.WARNING, logger="cute_ssm")
    assert chosen(512) == before
    assert "a row of tuned configs is ignored" in caplog.text


@pytest.mark.parametrize("text", ["{", "{}", '[{"op": "selective_state_update"}]', "[3]"])
def test_a_file_that_is_no_table_is_ignored_and_logged(write, caplog, text):
    before = chosen(512)
    write(text=text)
    caplog.set_level(logging.WARNING, logger="cute_ssm")
    assert chosen(512) == before
    assert "ignored" in caplog.text


def test_the_bundled_table_is_well_formed():
    content = json.loads(tables.BUNDLED.read_text())
    assert all(map(tables._is_row, content))


def test_watching_sees_every_question():
    with tables.watching() as seen:
        chosen(64)
        chosen(64)
    chosen(65)
    assert [lookup.heads for lookup in seen] == [64, 64]
    assert seen[0].spec == SPEC
    assert seen[0].free == selective_step.SelectiveStepConfig.FREE
    assert seen[0].rule == selective_step._choose(SPEC, arch.SM_90A, 64, 132, False)


def test_an_empty_config_is_the_rule(write):
    rule = chosen(512)
    write(row(64, warps=3), row(512))
    assert chosen(512) == rule
    assert chosen(60).warps == 3


def test_modelled_configs_that_gain_less_than_a_margin_are_withdrawn(tmp_path):
    path = tmp_path / "table.json"

    def found(heads, how, us):
        return {**row(heads, warps=3), "evidence": {"how": how, "us": us, "rule_us": 10.0}}

    tables.merge(path, [found(1, "modelled", 9.1), found(2, "modelled", 8.9), found(3, "measured", 9.1), row(4)])
    assert tables.withdraw(path, 0.1) == 1
    weak, good, measured, rule = tables.read(path)
    assert weak["config"] == {} and weak["evidence"]["us"] == weak["evidence"]["rule_us"] == 10.0
    assert (good, measured, rule) == (found(2, "modelled", 8.9), found(3, "measured", 9.1), row(4))
    assert tables.withdraw(path, 0.1) == 0


def test_merging_replaces_rows_of_the_same_call(tmp_path):
    path = tmp_path / "deep" / "table.json"
    first, second = row(64, warps=2), row(9, warps=3)
    assert tables.merge(path, [first, second]) == 2
    assert tables.read(path) == [second, first], "by amount of work"
    assert tables.merge(path, [row(64, warps=4)]) == 2
    assert tables.read(path) == [second, row(64, warps=4)]
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]


def test_what_was_measured_is_not_replaced_by_a_model(tmp_path):
    path = tmp_path / "table.json"
    measured = {**row(64, warps=2), "evidence": {"how": "measured"}}
    modelled = {**row(64, warps=3), "evidence": {"how": "modelled"}}
    tables.merge(path, [modelled])
    tables.merge(path, [measured])
    tables.merge(path, [modelled])
    assert tables.read(path) == [measured]


@pytest.mark.parametrize("content", ["{}", "[3]"])
def test_a_file_that_is_no_table_is_not_merged_into(tmp_path, content):
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="expected a table"):
        tables.merge(path, [row(64)])
    assert path.read_text() == content
    with pytest.raises(ValueError, match="expected a row"):
        tables.merge(tmp_path / "new.json", [{"op": "x"}])


def test_the_space_of_the_step_holds_what_the_rule_chooses():
    for heads in (1, 16, 300, 16384):
        config = selective_step._choose(SPEC, arch.SM_90A, heads, 132, False)
        space = selective_step.SelectiveStepConfig.space(SPEC, arch.SM_90A)
        assert set(space) == set(selective_step.SelectiveStepConfig.FREE)
        bounded = {"ctas_per_sm"}  # by what fits, for which the rule may have any value
        assert all(getattr(config, name) in values for name, values in space.items() if name not in bounded)


def test_an_override_of_an_unknown_field_is_refused_with_the_known_ones():
    config = selective_step._choose(SPEC, arch.SM_90A, 16, 132, False)
    with tuning.override(warps=config.warps + 1):
        assert tuning.apply_override(config).warps == config.warps + 1
    with (
        tuning.override(wraps=3),
        pytest.raises(TypeError, match=r"override: expected fields of SelectiveStepConfig \(.*warps.*\), got wraps"),
    ):
        tuning.apply_override(config)
