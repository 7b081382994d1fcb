"""tools/bench/host.py: the ways to make a call agree, and their cost can be measured."""

from __future__ import annotations

import pytest
import torch

from cute_ssm import workloads

host = pytest.importorskip("bench.host", reason="tools/ is not on the path")


def test_host_cost_of_a_call_is_that_of_its_entry_and_more():
    given, cached, alone = host.measure(host.one_token())
    assert given == 12
    assert 0 < alone < cached < 1000


def test_without_a_gpu_its_rows_are_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        host.main(["--gpu"])
    assert "no GPU" in capsys.readouterr().err


def test_bits_are_compared_as_bytes():
    some = {"out": torch.tensor([float("nan"), 0.0])}
    assert host.same_bits(some, {"out": some["out"].clone()})
    assert not host.same_bits(some, {"out": torch.tensor([float("nan"), -0.0])})


@pytest.mark.gpu
@pytest.mark.timed
@pytest.mark.parametrize("op", workloads.OPERATORS)
def test_graph_and_compiled_calls_have_the_bits_of_plain_ones(op):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    rows = host.on_gpu(op)
    assert len(rows) == 3
    assert all(us > 0 for us in rows.values())


@pytest.mark.gpu
def test_replay_reads_what_has_changed_since_the_capture():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    keys = {"batch": 4, "nheads": 4, "state_dtype": "float32"}
    call, other = (workloads.build("selective_state_update", keys, "cuda", seed=seed) for seed in (0, 1))
    graph = host.captured(call)
    for name, value in other.arguments.items():
        if isinstance(value, torch.Tensor):  # also through views that repeat one value per head
            mine = call.arguments[name]
            (mine if mine._base is None else mine._base).copy_(value if value._base is None else value._base)
    graph.replay()
    other.run()
    torch.cuda.synchronize()
    assert host.same_bits(call.results(), other.results())
