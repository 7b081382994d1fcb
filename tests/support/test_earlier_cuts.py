"""Sums of tensor cores that are cut a bit or two too early exceed the bounds, for every family of kernels.

The calls are such that what is lost shows: sums of many products, whose partial sums are large and lose with one sign,
and results that are float32, or that cancel, so that their rounding hides nothing.
"""

from __future__ import annotations

import checkpointing_cases
import gdn_cases
import kernel_backends
import materialize_gated_cases
import pytest
import replay_cases
import token_cases
import torch
from memory import copy

pytest.importorskip("cutlass")

import cute_ssm
from cute_ssm import serving
from ptxsim.arithmetic import Arithmetic

WIDE = {"ratio": 1, "K": 256, "V": 64, "io": "f16", "l2norm": False, "pads": ()}
TINY = 2.0**-12  # of x, whose terms then do not count; D may be as large


def mostly_positive(*tensors):
    """Make about eight of ten elements positive."""
    g = torch.Generator().manual_seed(5)
    for tensor in tensors:
        tensor.copy_(torch.where(torch.rand(tensor.shape, generator=g) < 0.6, tensor.abs(), tensor))


def read_only(call):
    """Gated delta rule: no update and no decay, so that outputs are the products of queries with the state."""
    mostly_positive(call["q"], call["initial_state"])
    call["b"].fill_(-40)
    call["A_log"].fill_(-12)
    return call


def gated_delta_rule_mtp():
    case = gdn_cases.Case(batch=1, heads=4, mode="verify", **WIDE)
    call = read_only(gdn_cases.arguments(case))
    before = copy(call)
    out, _ = cute_ssm.gated_delta_rule_mtp(**call)
    gdn_cases.check(before, call, out)


def gated_delta_rule_replay():
    case = replay_cases.Case(batch=1, heads=4, pending=(0,), **WIDE)
    call = read_only(replay_cases.arguments(case))
    before = copy(call)
    out, _ = cute_ssm.gated_delta_rule_replay(**call)
    replay_cases.check(before, call, out)


def materialize_gated_delta():
    """One token, whose product with the state is a sum of large terms."""
    case = materialize_gated_cases.Case(heads=2, pending=(1,), counts=(1,), place=True, batch=3, **WIDE)
    call = materialize_gated_cases.arguments(case)
    g = torch.Generator().manual_seed(6)
    for slot in call["state_batch_indices"].tolist():
        call["initial_state"][slot] = 1 + torch.rand(call["initial_state"][slot].shape, generator=g) / 8
    call["k_cache"].copy_(torch.where(call["k_cache"].isnan(), call["k_cache"], (1 + call["k_cache"] / 16) / 16))
    for name, value in {"v_cache": 32.0, "g_cache": 0.0, "beta_cache": 1.0}.items():
        call[name].copy_(torch.where(call[name].isnan(), call[name], value))
    materialize_gated_cases.check(case, copy(call), call, serving.materialize_gated_delta(**call))


def cancelled(call, sums, share):
    """Let D x be what leaves `share` of the sums (nheads,) of the outputs, which are the same in every row."""
    heads, dim = call["x"].shape[-2:]
    call["D"] = torch.as_tensor((share - 1) * sums / TINY).float()[:, None].expand(heads, dim)


def same_in_every_row(call):
    """Positive states and C, the same of all rows and tokens of a head; x is tiny, and nothing decays."""
    state, C = call["state"], call["C"]
    state.copy_(state[..., :1, :].abs().nan_to_num(nan=1.0).expand(state.shape))
    state.copy_(state[call["state_batch_indices"].long()[0]].clone().expand(state.shape))
    C.copy_(C.reshape(-1, *C.shape[-2:])[:1].abs().expand(C.shape))
    call["x"].fill_(TINY)
    call["A"] = (call["A"][:, :1, :1] * 1e-6).expand(call["A"].shape)
    return state[0, :, 0].double() @ C.reshape(-1, C.shape[-1])[0].double()


def selective_state_update():
    case = token_cases.Tokens(
        lengths=(8,), nheads=16, dim=16, dstate=256, io="f16", pads=(), has_z=False, disabled=True
    )
    call = token_cases.arguments(case)
    cancelled(call, same_in_every_row(call), 0.0)
    before = copy(call)
    assert token_cases.path_of(before).multiplies
    token_cases.check(case, before, call, cute_ssm.selective_state_update(**call))


def checkpointing_ssu():
    case = checkpointing_cases.Case(
        batch=1, tokens=2, window=8, nheads=16, dstate=256, io="f16", has_z=False, pads=(), accepted=(0,)
    )
    call = checkpointing_cases.arguments(case)
    cancelled(call, same_in_every_row(call), 2.0**-7)
    before = copy(call)
    sequences = [
        checkpointing_cases.Sequence.of(case, before, *slot) for slot in checkpointing_cases.slots_of(case, before)
    ]
    compiled = checkpointing_cases.run(case, call)
    checkpointing_cases.check(case, before, call, sequences, compiled)


# family -> by how many bits sums are cut too early
FAMILIES = {
    gated_delta_rule_mtp: 1,
    gated_delta_rule_replay: 1,
    materialize_gated_delta: 1,
    selective_state_update: 2,
    checkpointing_ssu: 1,
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_sums_that_are_cut_too_early_exceed_the_bounds(family):
    with kernel_backends.kernel(checks=False, shuffle_sync=False, arithmetic=Arithmetic("hardware")):
        family()
    early = Arithmetic("hardware", early=FAMILIES[family])
    with kernel_backends.kernel(checks=False, shuffle_sync=False, arithmetic=early):
        with pytest.raises(AssertionError, match="exceeds"):
            family()
