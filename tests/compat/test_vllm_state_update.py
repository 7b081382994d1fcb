"""vLLM's `selective_state_update` against a loop that follows vLLM's rules sequence by sequence."""

from __future__ import annotations

import contextlib
import dataclasses

import kernel_backends
import numpy as np
import pytest
import torch
from bits import same_bits
from step_oracle import at_row, close, states, token, tokens, wide

from cute_ssm import tuning
from cute_ssm.compat import vllm
from cute_ssm.compat.vllm import configs as vllm_configs
from cute_ssm.ops.selective_state_update import config as selective_step

NULL = 0


def on(backend):
    return kernel_backends.kernel() if backend == "kernel" else contextlib.nullcontext()


def loop(state, call, src, dst=None, accepted=None, cu=None):
    """What vLLM does: ({row: output}, {slot: state}); rows of the null block count, its states do not."""
    batch = len(call["x"]) if cu is None else len(cu) - 1
    outputs, stored = {}, {}
    for b in range(batch):
        rows = range(int(cu[b]), int(cu[b + 1])) if cu is not None else [b]
        columns = [int(s) for s in src[b].reshape(-1)] if src is not None else [b]
        targets = [int(s) for s in dst[b].reshape(-1)] if dst is not None else columns
        slot = columns[max(int(accepted[b]) - 1, 0) if accepted is not None else 0]
        null = src is not None and slot == NULL
        h = np.zeros(state.shape[1:]) if null else wide(state[slot])
        for t, row in enumerate(rows):
            h, outputs[row] = token(h, **at_row(call, row))
            if accepted is not None and not null and targets[t] != NULL:
                stored[targets[t]] = h
        if accepted is None and not null and len(rows):
            stored[targets[0]] = h
    return outputs, stored


def check(state, call, **kwargs):
    """Call, and compare every row of out and every slot."""
    names = {"src": "state_batch_indices", "dst": "dst_state_batch_indices", "accepted": "num_accepted_tokens"}
    names["cu"] = "cu_seqlens"
    extra = {key: kwargs.pop(key) for key in list(kwargs) if key not in names}
    outputs, stored = loop(state, call, **{"src": None, **kwargs})
    before, out = state.clone(), torch.full_like(call["x"], -77.0)
    assert (
        vllm.selective_state_update(state, **call, out=out, **extra, **{names[k]: v for k, v in kwargs.items()}) is None
    )
    for row in range(len(out)):
        want = outputs.get(row, np.full(out.shape[1:], -77.0))
        assert close(out[row], want), f"out[{row}]"
    for slot in range(len(state)):
        if slot in stored:
            assert close(state[slot], stored[slot]), f"state[{slot}]"
        else:
            same_bits(state[slot], before[slot], f"state[{slot}] changed where it must not")


@pytest.mark.parametrize("backend", ["reference", "kernel"])
class TestAgainstTheLoop:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "dense"])
    def test_one_token(self, backend, dtype, tied):
        with on(backend):
            src = torch.tensor([3, NULL, 1, 5], dtype=torch.int32)
            check(states(6, dtype=dtype), tokens(dtype=dtype, tied=tied), src=src)

    def test_without_indices_slot_zero_is_no_padding(self, backend):
        with on(backend):
            check(states(4), tokens())

    def test_column_zero_of_matrices(self, backend):
        src = torch.tensor([[3, 1], [NULL, 2], [1, NULL], [5, 4]])
        dst = torch.tensor([[6, 1], [7, 1], [8, 1], [9, 1]])
        with on(backend):
            check(states(10), tokens(), src=src, dst=dst)

    def test_more_rows_of_indices_than_sequences(self, backend):
        with on(backend):
            check(states(6), tokens(3), src=torch.tensor([3, NULL, 1, 5, 4, 2], dtype=torch.int32))

    def test_packed(self, backend):
        cu = torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32)
        src = torch.tensor([3, 4, NULL, 5], dtype=torch.int32)
        with on(backend):
            check(states(6), tokens(8), src=src, cu=cu)
            check(states(6), tokens(8), cu=cu)

    @pytest.mark.parametrize("destination", ["default", "given"])
    def test_speculative(self, backend, destination):
        cu = torch.tensor([0, 3, 3, 5, 6, 8], dtype=torch.int32)
        src = torch.tensor([[1, 2, 3], [4, 5, 6], [7, NULL, 8], [NULL, NULL, NULL], [9, 10, 11]], dtype=torch.int32)
        accepted = torch.tensor([0, 2, 3, 1, 2], dtype=torch.int32)
        dst = None
        if destination == "given":
            dst = torch.tensor([[12, 13, 14], [1, 1, 1], [15, NULL, 1], [2, 3, 4], [NULL, 16, 1]], dtype=torch.int32)
        with on(backend):
            check(states(17), tokens(8), src=src, cu=cu, accepted=accepted, **({"dst": dst} if dst is not None else {}))

    def test_speculative_single_tokens(self, backend):
        src = torch.tensor([[1, 2], [3, 4], [NULL, 5]], dtype=torch.int32)
        with on(backend):
            check(states(6), tokens(3), src=src, accepted=torch.tensor([1, 1, 2], dtype=torch.int32))

    def test_a_padded_sequence_of_several_tokens_has_the_outputs_of_a_zero_state(self, backend):
        cu, src = torch.tensor([0, 4]), torch.tensor([NULL])
        with on(backend):
            check(states(2), tokens(4), src=src, cu=cu)

    def test_padded_rows_can_be_left_alone(self, backend):
        call, out = tokens(2), torch.full((2, 4, 64), -77.0)
        with on(backend):
            vllm.selective_state_update(
                states(3), **call, state_batch_indices=torch.tensor([NULL, 2]), out=out, write_padded_rows=False
            )
        assert bool((out[0] == -77).all())
        assert not bool((out[1] == -77).any())

    @pytest.mark.parametrize("out", [torch.bfloat16, torch.float32], ids=str)
    def test_types_may_be_mixed_and_none_is_rounded(self, backend, out):
        """As in vLLM's tests: B and C float32 beside x and z of bfloat16."""
        call, state, got = tokens(3), states(4, dtype=torch.bfloat16), torch.full((3, 4, 64), -77.0, dtype=out)
        call |= {name: call[name].bfloat16() for name in ("x", "z")}
        src, before = torch.tensor([3, NULL, 1]), state.clone()
        outputs, stored = loop(before, call, src)
        with on(backend):
            vllm.selective_state_update(state, **call, state_batch_indices=src, out=got, write_padded_rows=False)
        assert bool((got[1] == -77).all()), "rows that are not written keep their values"
        for row in (0, 2):
            assert close(got[row], outputs[row])
            assert close(state[src[row]], stored[int(src[row])])

    def test_another_null_block(self, backend):
        call, state, out = tokens(2), states(3), torch.empty(2, 4, 64)
        before = state.clone()
        with on(backend):
            vllm.selective_state_update(
                state, **call, state_batch_indices=torch.tensor([0, -1]), null_block_id=-1, out=out
            )
        new, _ = token(wide(before[0]), **at_row(call, 0))
        _, y = token(np.zeros(state.shape[1:]), **at_row(call, 1))
        assert close(state[0], new)
        assert close(out[1], y)
        same_bits(state[1:], before[1:])

    def test_without_heads(self, backend):
        call, state = tokens(3, heads=1, groups=1, tied=False), states(3, heads=1)
        outputs, stored = loop(state, call, None)
        squeezed = {n: call[n][:, 0] for n in ("x", "dt", "B", "C", "z")} | {
            n: call[n][0] for n in ("A", "D", "dt_bias")
        }
        out = torch.empty(3, 64)
        with on(backend):
            vllm.selective_state_update(state.squeeze(1), **squeezed, dt_softplus=True, out=out)
        for row in range(3):
            assert close(out[row], outputs[row][0])
            assert close(state[row], stored[row])


class TestStochasticRounding:
    def run(self, **extra):
        state, call = states(4, dtype=torch.float16), tokens(3)
        before, out = state.clone(), torch.empty(3, 4, 64)
        extra = {"enable_stochastic_rounding": True, "state_batch_indices": torch.tensor([1, 2, 3]), **extra}
        vllm.selective_state_update(state, **call, out=out, **extra)
        return before, state, call

    def test_neighbours(self):
        before, state, call = self.run()
        for row in range(3):
            want, _ = token(wide(before[row + 1]), **at_row(call, row))
            got = wide(state[row + 1])
            assert (np.abs(got - want) <= 1.01 * np.spacing(np.abs(want).astype(np.float16)) + 1e-5).all()

    def test_a_call_draws_its_seed(self):
        torch.manual_seed(0)
        first, second = self.run()[1], self.run()[1]
        torch.manual_seed(0)
        same_bits(first, self.run()[1])
        assert not torch.equal(first, second)

    def test_a_seed_may_be_given(self):
        seed = torch.tensor([5])
        same_bits(self.run(rand_seed=seed)[1], self.run(rand_seed=seed)[1])

    def test_zero_rounds_are_ten(self):
        seed = torch.tensor([5])
        ten, six = (self.run(rand_seed=seed, cache_philox_rounds=n)[1] for n in (10, 6))
        same_bits(self.run(rand_seed=seed)[1], ten)
        assert not torch.equal(ten, six)

    def test_not_with_accepted_tokens(self):
        indices = torch.tensor([[1], [2], [3]])
        accepted = torch.ones(3, dtype=torch.int32)
        common = {"state_batch_indices": indices, "num_accepted_tokens": accepted}
        same_bits(self.run(**common)[1], self.run(**common, enable_stochastic_rounding=False)[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out": None}, TypeError, r"out: expected a torch.Tensor of the shape of x, got NoneType; allocate"),
        ({"out": torch.empty(3, 4, 32)}, ValueError, r"out: expected shape .* = \(3, 4, 64\), got \(3, 4, 32\)"),
        ({"x": torch.empty(3, 1, 4, 64)}, ValueError, r"x: expected shape \(tokens, nheads, dim\).*; pack the tokens"),
        ({"x": None}, TypeError, r"x: expected a torch.Tensor, got NoneType"),
        ({"state_batch_indices": [1, 2]}, TypeError, r"state_batch_indices: expected a torch.Tensor, got list"),
        (
            {"state_batch_indices": torch.tensor([1, 2])},
            ValueError,
            r"state_batch_indices: .*n >= batch = 3, got \(2,\)",
        ),
        (
            {"state_batch_indices": torch.empty(3, 0, dtype=torch.int32)},
            ValueError,
            "state_batch_indices: .*one column",
        ),
        (
            {"state_batch_indices": torch.tensor([1, 2, 9])},
            ValueError,
            r"state_batch_indices: expected indices in \[0, 4\) or null_block_id = 0, got 9",
        ),
        ({"null_block_id": 0.5}, TypeError, "null_block_id: expected an int"),
        (
            {
                "cu_seqlens": torch.tensor([0, 3]),
                "state_batch_indices": torch.tensor([[1, 2]]),
                "num_accepted_tokens": torch.tensor([1]),
            },
            ValueError,
            r"cu_seqlens: expected sequences of at most 2 tokens, got one of 3; give dst_state_batch_indices as many",
        ),
        (
            {"dst_state_batch_indices": torch.tensor([1.0, 2, 3])},
            TypeError,
            "dst_state_batch_indices: expected dtype int",
        ),
        ({"num_accepted_tokens": torch.tensor([1, 1, 1])}, ValueError, "num_accepted_tokens: expected None without"),
        ({"cu_seqlens": 3}, TypeError, "cu_seqlens: expected a torch.Tensor, got int"),
        ({"cu_seqlens": torch.zeros(1, 2)}, ValueError, r"cu_seqlens: expected shape \(batch \+ 1,\), got \(1, 2\)"),
        (
            {"enable_stochastic_rounding": True},
            TypeError,
            "state: expected dtype float16 with enable_stochastic_rounding",
        ),
        ({"rand_seed": torch.tensor([1])}, ValueError, "rand_seed: expected None without enable_stochastic_rounding"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(change, error, message):
    state, out = states(4), torch.full((3, 4, 64), 5.0)
    before = state.clone()
    with pytest.raises(error, match=message):
        vllm.selective_state_update(**{"state": state, **tokens(3), "out": out, **change})
    same_bits(state, before)
    assert bool((out == 5).all())


def test_rounds_are_checked():
    call = {"enable_stochastic_rounding": True, "cache_philox_rounds": -1, "out": torch.empty(3, 4, 64)}
    with pytest.raises(ValueError, match="cache_philox_rounds: expected 0 or more, got -1"):
        vllm.selective_state_update(states(4, dtype=torch.float16), **tokens(3), **call)


@pytest.mark.parametrize("config", [(4, 1), (64, 4), (256, 8)])
def test_tuned_configs_change_tiles_and_no_result(config, monkeypatch, backend):
    seen = []

    def run():
        state, out = states(4), torch.empty(3, 4, 64)
        with backend(checks=False):
            vllm.selective_state_update(state, **tokens(3), out=out, state_batch_indices=torch.tensor([1, 2, 3]))
        return state, out

    state, out = run()
    choose = selective_step.choose
    monkeypatch.setattr(selective_step, "choose", lambda *a, **k: seen.append(choose(*a, **k)) or seen[-1])
    with vllm.override_ssm_config(config):
        tuned_state, tuned_out = run()
    wanted = vllm_configs.as_override(64, 32, "float32", False, config)
    assert any(wanted.items() <= dataclasses.asdict(one).items() for one in seen)
    assert not tuning.overridden()
    same_bits(state, tuned_state)
    torch.testing.assert_close(out, tuned_out)


def test_traced_by_torch_compile():
    def run(state, out):
        slots = torch.tensor([3, NULL, 1], dtype=torch.int32)
        vllm.selective_state_update(state, **call, out=out, state_batch_indices=slots)

    call, pairs = tokens(3), [(states(4), torch.zeros(3, 4, 64)) for _ in range(2)]
    run(*pairs[0])
    with vllm.override_ssm_config((32, 1)):
        torch.compile(run, backend="aot_eager", fullgraph=True)(*pairs[1])
    for eager, compiled in zip(*pairs):
        same_bits(eager, compiled)
