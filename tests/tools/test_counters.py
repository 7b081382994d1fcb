"""The counters that are committed: what the command beside a row prints is what the row says."""

from __future__ import annotations

import json
import re
from importlib import metadata

import count
import digest
import machine_code
import pytest
from bench import counters

RESULTS = json.loads(counters.RESULTS.read_text())
ROWS = RESULTS["rows"]
DIGESTS = counters.ROOT / "tools" / "digests" / "kernels.json"
CHEAP = [
    ("selective_state_update", "sm_100a", "batch=1 state_dtype=float16"),
    ("checkpointing_ssu", "sm_90a", "batch=1 state_dtype=bfloat16 pnat=8"),
    ("gated_delta_rule_mtp", "sm_90a", "B=1 T=1 verify=0"),
]


def found_in_the_page(op, arch, words):
    """The shortest line of the page whose command says all these words."""
    lines = [line for line in counters.PAGE.read_text().splitlines() if line.startswith(f"| `{op}` | ")]
    lines = [line for line in lines if f"| {arch} |" in line and set(words.split()) <= set(command(line))]
    return min(lines, key=len)


def called(row):
    """Operator, parameters and target of a row, as `counters.calls` has them."""
    return row["op"], dict(item.split("=", 1) for item in row["call"].split()), row["arch"]


def command(line):
    return line.split(" | ")[1].strip("`").split()


@pytest.mark.parametrize(("op", "arch", "words"), CHEAP, ids=[op for op, _, _ in CHEAP])
def test_the_command_beside_a_row_counts_it_again(op, arch, words, capsys):
    """Exactly: bytes, instructions of PTX and machine code, registers, code."""
    machine_code.needed()
    before, now = RESULTS["versions"]["nvidia-cutlass-dsl"], metadata.version("nvidia-cutlass-dsl")
    assert before == now, "another compiler makes other code: count anew"
    line = found_in_the_page(op, arch, words)
    assert count.main([op, *command(line), f"arch={arch}", "--json"]) == 0
    row = counters.as_row(json.loads(capsys.readouterr().out)) | {"call": " ".join(command(line))}
    assert counters.line(row) == line
    (kept,) = (each for each in ROWS if counters.line(each) == line)
    keys = {name: {k: str(v) for k, v in each["keys"].items()} for name, each in (("row", row), ("kept", kept))}
    assert keys["row"] == keys["kept"]
    assert {**row, "keys": 0} == {name: value for name, value in {**kept, "keys": 0}.items() if name in row}
    case = (op, dict(item.split("=", 1) for item in command(line)), arch)
    assert counters.of_these_kernels(kept, *case), "compiled a moment ago"
    other = [kept["digests"][0][::-1], *kept["digests"][1:]]
    assert not counters.of_these_kernels({**kept, "digests": other}, *case)


def test_every_row_has_the_configs_that_are_chosen_now():
    """A rule or a table that changed makes rows stale: count them anew."""
    cases = {counters.identity(*case): case for case in counters.calls()}
    rows = {counters.identity(row["op"], row["keys"], row["arch"]): row for row in ROWS}
    assert rows.keys() == cases.keys()
    stale = [
        f"{op} {rows[name]['call']} {arch}"
        for name, (op, keys, arch) in cases.items()
        if counters.configs(op, keys, arch) != rows[name]["configs"]
    ]
    assert not stale, f"tools/bench/counters.py counts them anew: {stale}"


def test_every_row_is_of_the_kernels_that_are_recorded_now():
    """Where tools/digests has a row's kernel, another digest there says that it has changed since it was counted."""
    recorded = {kernel.id: kernel.digest for kernel in digest.read(DIGESTS)[0]}
    found, stale = 0, []
    for row in ROWS:
        for kernel, of_row in zip(counters.kernels(*called(row)), row["digests"], strict=True):
            known = recorded.get(digest.as_kernel(*kernel).id)
            found += known is not None
            if known not in (None, of_row):
                stale.append(f"{row['op']} {row['call']} {row['arch']}")
    assert not stale, f"tools/bench/counters.py --stale counts them anew: {stale}"
    assert found == len(ROWS)


def test_the_check_names_a_row_of_another_kernel(monkeypatch, capsys):
    """And an option counts that row alone."""
    row = ROWS[0]
    monkeypatch.setattr(counters, "digests", lambda *case: of_rows[counters.identity(*case)])
    of_rows = {counters.identity(*called(each)): each["digests"] for each in ROWS}
    assert counters.main(["--check"]) == 0
    of_rows[counters.identity(*called(row))] = ["0" * 16]
    assert counters.main(["--check"]) == 1
    assert f"of other kernels: {row['op']} {row['call']} {row['arch']}\n" in capsys.readouterr().out
    counted = []
    monkeypatch.setattr(count, "count", lambda *case: counted.append(case) or {"kernels": [], "tensors": {}})
    rows = counters.record([], stale=True)["rows"]
    assert counted == [called(row)] and rows[0]["digests"] == ["0" * 16] and rows[1:] == ROWS[1:]


def test_rows_are_of_commits_without_changes():
    assert all(re.fullmatch("[0-9a-f]{40}", row["commit"]) for row in ROWS)


def test_machine_code_of_every_row_is_known():
    """Most slots to a few per cent; the others are open where ptxas made several copies of a loop."""
    spans = []
    for row in ROWS:
        least, most = row["machine_slots_per_unit"]
        assert 0 < least <= most < 2 * row["issue_slots_per_unit"], counters.line(row)
        spans.append(most / least)
        for kernel in row["kernels"]:
            code = kernel["machine_code"]
            assert code["registers"] == kernel["registers"] and code["local_bytes"] == kernel["spill_bytes"] == 0
            assert 0 <= code["largest_loop_bytes"] < code["code_bytes"]
    assert sum(span <= 1.03 for span in spans) >= 0.8 * len(spans) and max(spans) < 1.5
