"""`compat.flashinfer.gdn_decode` beside the operators: one-token calls, ReplaySSM's windows and their commit."""

from __future__ import annotations

import pytest
import torch
from bits import equal, same_bits, same_memory
from gdn_cases import Case, arguments
from kernel_backends import both
from memory import copy

import cute_ssm
from cute_ssm.compat.flashinfer import gdn_decode
from cute_ssm.errors import UnsupportedSpecError

STATES = ("initial_state", "initial_state_indices")
NAN = float("nan")


def one_state_each(tokens: int = 1, **fields) -> tuple[dict, dict]:
    """A call of `gated_delta_rule_mtp` that updates, and the same with a state for each request."""
    call = arguments(Case(mode="update", tokens=tokens, K=64, pads=(), **fields))
    del call["output"]
    slots = call["initial_state_indices"]
    own = call["initial_state"][slots.clamp_min(0).long()].clone()
    rest = {name: value for name, value in call.items() if name not in (*STATES, "disable_state_update")}
    return call, {**rest, "state": own}


@pytest.mark.parametrize("state", ["f32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_states_of_requests_and_a_pool_give_the_same(tokens, state):
    call, own = one_state_each(tokens, state=state)
    output, states = gdn_decode.gated_delta_rule_decode_pretranspose(**own)
    assert states is own["state"]
    pool = {name: value for name, value in call.items() if name != "disable_state_update"}
    got, same = gdn_decode.gated_delta_rule_decode_pretranspose(state=None, **pool)
    assert same is call["initial_state"]
    equal(got, output)
    equal(same[call["initial_state_indices"].long()], states)


def test_states_with_keys_first_are_updated_in_place():
    _, own = one_state_each()
    turned = own | {"state": own["state"].mT.contiguous()}
    output, _ = gdn_decode.gated_delta_rule_decode_pretranspose(**own)
    got, states = gdn_decode.gated_delta_rule_decode(**turned)
    assert states is turned["state"]
    equal(got, output)
    equal(states.mT.contiguous(), own["state"])


def test_buffers_and_frozen_states():
    _, own = one_state_each(3)
    before = own["state"].clone()
    buffer = torch.full((before.shape[0], 4, *before.shape[1:]), NAN)
    gdn_decode.gated_delta_rule_decode_pretranspose(**own, intermediate_states_buffer=buffer, disable_state_update=True)
    same_memory(own["state"], before)
    gdn_decode.gated_delta_rule_decode_pretranspose(**own)
    equal(buffer[:, 2], own["state"])
    assert buffer[:, 3].isnan().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"backend": "rubin"}, ValueError, "backend: expected auto or flashinfer or cake_gdn, got 'rubin'"),
        ({"state": None}, ValueError, "state: expected a tensor, or initial_state in its place, got neither"),
        ({"initial_state": torch.zeros(1)}, ValueError, "state: expected .*, got both"),
        ({"initial_state_indices": torch.zeros(1)}, ValueError, "initial_state_indices: expected None with state"),
        ({"output_state_indices": torch.zeros(1)}, ValueError, "output_state_indices: expected None with state"),
        ({"state": 1.0}, TypeError, "state: expected a torch.Tensor, got float"),
        (
            {"state": None, "initial_state": torch.zeros(2, 2, 2, 32, 64)},
            *(UnsupportedSpecError, "initial_state: expected 4 dimensions, got a pool of two halves"),
        ),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    _, own = one_state_each()
    before = own["state"].clone()
    with pytest.raises(error, match=message):
        gdn_decode.gated_delta_rule_decode_pretranspose(**{**own, **change})
    same_memory(own["state"], before)


def windows(call: dict, dtype: torch.dtype, layers: int = 1) -> dict[str, torch.Tensor]:
    slots, value_heads, V, K = call["initial_state"].shape
    tokens, heads = call["q"].shape[1:3]
    made = {
        "replayssm_rawv": torch.full((layers, slots, value_heads, tokens, V), NAN, dtype=dtype),
        "replayssm_rawk": torch.full((layers, slots, heads, tokens, K), NAN, dtype=dtype),
        "replayssm_g": torch.full((layers, slots, value_heads, tokens), NAN),
        "replayssm_beta": torch.full((layers, slots, value_heads, tokens), NAN),
    }
    return made


@both
@pytest.mark.parametrize("accepted", [(0, 1, 4), (4, 2, 0)])
def test_verified_tokens_are_committed_in_all_layers(accepted, backend):
    """As many as are accepted; a checkpoint of a middle token besides; slots of nobody keep their bytes."""
    layers = [arguments(Case(mode="verify", tokens=4, batch=3, K=64, pads=()), seed) for seed in (1, 2)]
    first, second = (layer["initial_state_indices"].long() for layer in layers)
    layers[1]["initial_state"][first] = layers[1]["initial_state"][second].clone()
    layers[1]["initial_state_indices"] = layers[0]["initial_state_indices"]
    slots = layers[0]["initial_state_indices"]
    made = windows(layers[0], layers[0]["q"].dtype, 2)
    total = layers[0]["initial_state"].shape[0]
    free = [slot for slot in range(total) if slot not in slots.tolist()]
    track = torch.tensor([free[0], -1, -1], dtype=torch.int32)
    steps = torch.tensor([1, 0, 0], dtype=torch.int32)
    state = torch.stack([layer["initial_state"] for layer in layers])
    before = state.clone()
    lengths = torch.tensor(accepted, dtype=torch.int32)
    wanted, touched = before.clone(), torch.zeros(state.shape[:2], dtype=torch.bool)
    with backend(checks=False):
        for i, layer in enumerate(layers):
            call = {**layer, "initial_state": state[i], "disable_state_update": True, "cache_replayssm": True}
            call |= {name: window[i] for name, window in made.items()}
            output, pool = gdn_decode.gated_delta_rule_mtp(**call)
            same_memory(pool, before[i], "verification changes no state")
            verified = copy(layer) | {"initial_state": before[i].clone()}
            same, _ = cute_ssm.gated_delta_rule_mtp(**verified)
            error = (output.double() - same.double()).abs().max()
            assert error <= 2**-7 * same.double().abs().max()
        gdn_decode.gated_delta_rule_replayssm_commit(
            state, made["replayssm_rawv"], made["replayssm_rawk"], made["replayssm_g"], made["replayssm_beta"],
            slots, lengths, track_state_indices=track, track_steps=steps,
            use_qk_l2norm=layers[0]["use_qk_l2norm"],
        )  # fmt: skip
        for i, layer in enumerate(layers):
            for row, slot in enumerate(slots.tolist()):
                for count, target in ((accepted[row], slot), (int(steps[row]) + 1, int(track[row]))):
                    if slot < 0 or target < 0 or count > accepted[row] or not count:
                        continue
                    part = {
                        name: value[row : row + 1, :count].contiguous()
                        for name, value in layer.items() if name in ("q", "k", "v", "a", "b")
                    }  # fmt: skip
                    alone = before[i].clone()
                    rest = {
                        n: v for n, v in layer.items() if n not in (*part, *STATES, "output", "disable_state_update")
                    }
                    cute_ssm.gated_delta_rule_mtp(
                        **part, **rest, initial_state=alone, initial_state_indices=slots[row : row + 1],
                        disable_state_update=False,
                    )  # fmt: skip
                    wanted[i, target] = alone[slot]
                    touched[i, target] = True
    same_bits(state[~touched], before[~touched], "not committed")
    assert (state - wanted)[touched].abs().max() <= 1e-5 * wanted[touched].abs().max()


def test_arguments_of_replayssm_that_do_not_fit_are_named():
    call = arguments(Case(mode="verify", tokens=4, K=64))
    made = {name: window[0] for name, window in windows(call, call["q"].dtype).items()}
    run = gdn_decode.gated_delta_rule_mtp
    with pytest.raises(ValueError, match="replayssm_g: expected None without cache_replayssm"):
        run(**call, replayssm_g=made["replayssm_g"])
    ready = {**call, **made, "cache_replayssm": True, "disable_state_update": True}
    with pytest.raises(ValueError, match="disable_state_update: expected True with cache_replayssm, got False"):
        run(**{**ready, "disable_state_update": False})
    with pytest.raises(TypeError, match=r"replayssm_beta: expected a torch\.Tensor, got NoneType"):
        run(**{**ready, "replayssm_beta": None})
    with pytest.raises(ValueError, match="ssm_state_indices: expected None with cache_replayssm"):
        run(**{**ready, "ssm_state_indices": torch.zeros(1)})
    short = {**ready, "replayssm_rawk": made["replayssm_rawk"][:, :, :3]}
    with pytest.raises(ValueError, match="replayssm_rawk: expected shape"):
        run(**short)
    commit = gdn_decode.gated_delta_rule_replayssm_commit
    whole = [torch.stack([call["initial_state"]]), *windows(call, call["q"].dtype).values()]
    indices = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="track_steps: expected a tensor"):
        commit(*whole, indices, indices, track_state_indices=indices)
    with pytest.raises(ValueError, match="rawk_cache: expected 5 dimensions, layers first, contiguous"):
        commit(whole[0], whole[1], whole[2][0], *whole[3:], indices, indices)
    whole = [torch.ones_like(tensor) for tensor in whole]
    before = whole[0].clone()
    with pytest.raises(TypeError, match=r"accept_lens: expected a torch\.Tensor, got int"):
        commit(*whole, indices, 1, track_state_indices=indices + 1, track_steps=indices)
    same_memory(whole[0], before, "not even the further checkpoints are written")
