"""The one gradient policy: no operator builds a graph, and the one function with gradients has them on every path."""

from __future__ import annotations

import warnings

import checkpointing_cases
import gdn_cases
import kernel_backends
import pytest
import replay_cases
import scan_cases
import step_cases
import torch
from bits import equal
from kernel_backends import both
from memory import copy
from torch.autograd import forward_ad

import cute_ssm
from cute_ssm import serving
from cute_ssm.compat import fla, mamba_ssm
from cute_ssm.errors import GradientError
from cute_ssm.ops import _gradients
from cute_ssm.ops.selective_scan.reference import selective_scan as mathematics
from cute_ssm.ops.selective_scan.reference import selective_scan_gradients

WEIGHTS = ("A", "A_log", "D", "dt_bias", "delta_bias")  # all else is refused
CASE = checkpointing_cases.Case(batch=2, pads=())
SCAN = scan_cases.Case(lengths=(3, 3), give_out=False, nulls=(), in_place=False)
CALLS = {
    "selective_state_update": lambda: step_cases.arguments(step_cases.Case(pads=())),
    "checkpointing_ssu": lambda: checkpointing_cases.arguments(CASE),
    "checkpointing_ssu_ring": lambda: checkpointing_cases.arguments(
        checkpointing_cases.Case(batch=2, pads=(), history="ring")
    ),
    "gated_delta_rule_mtp": lambda: gdn_cases.arguments(gdn_cases.Case(K=64)),
    "gated_delta_rule_replay": lambda: replay_cases.arguments(replay_cases.Case(K=64)),
    "selective_scan": lambda: scan_cases.arguments(SCAN),
    "selective_scan_fn": lambda: {n: v for n, v in scan_cases.arguments(SCAN).items() if n != "out"},
    "materialize": lambda: materialize_arguments(),
}


def materialize_arguments():
    zeros, slot = torch.zeros, torch.tensor([0])
    return {
        "state": zeros(2, 2, 16, 64), "x_history": zeros(2, 8, 2, 16).half(), "B_history": zeros(2, 2, 8, 1, 64).half(),
        "dt_history": zeros(2, 2, 2, 8), "A": zeros(2, 1, 1).expand(2, 16, 64), "cache_buf_idx": slot.int().repeat(2),
        "prev_num_accepted_tokens": slot.int().repeat(2), "state_batch_indices": slot,
        "dst_state_batch_indices": slot + 1, "out": zeros(2, 2, 16, 64, dtype=torch.int8),
        "out_scale": zeros(2, 2, 16),
    }  # fmt: skip


def operator(name):
    return getattr(serving if name == "materialize" else cute_ssm, name)


def floats(call):
    """Names of the tensors that may require grad."""
    return [name for name, v in call.items() if isinstance(v, torch.Tensor) and v.dtype.is_floating_point]


def copied(call):
    """The same values, with the same strides."""
    return copy({n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in call.items()})


def same(call, before):
    return all(
        torch.equal(v.detach().contiguous().view(torch.uint8), before[n].detach().contiguous().view(torch.uint8))
        for n, v in call.items()
        if isinstance(v, torch.Tensor) and v.dim() and v.dtype != torch.bool
    )


@pytest.mark.parametrize("subclass", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_each_tensor_that_requires_grad_alone_is_refused_by_name(name, subclass, monkeypatch):
    """A parameter among the tokens takes the way through PyTorch's dispatcher."""
    monkeypatch.setattr(_gradients, "_warned", set())
    first = {"materialize": "state", "selective_scan": "u", "selective_scan_fn": "u"}.get(name, "x")
    first = "q" if "gated" in name else first
    for argument in floats(CALLS[name]()):
        call = CALLS[name]()
        if argument in WEIGHTS:
            continue
        if subclass and (argument == first or not call[first].is_contiguous()):
            call[argument] = torch.nn.Parameter(call[argument])
        else:
            call[argument] = call[argument].detach().requires_grad_()
            if subclass:
                call[first] = torch.nn.Parameter(call[first], requires_grad=False)
        before = copied(call)
        with pytest.raises(GradientError, match=rf"^{argument}: expected .* torch\.no_grad\(\) .*{argument}\.detach"):
            operator(name)(**call)
        assert same(call, before), f"{argument}: something was written"
    assert issubclass(GradientError, RuntimeError) and issubclass(GradientError, ValueError)


SHARED = ("checkpointing_ssu_ring", "selective_scan_fn", "materialize")  # what they run is that of others


@pytest.mark.parametrize(
    ("name", "backend"),
    [(n, "reference") for n in CALLS]
    + [pytest.param(n, "kernel", marks=[pytest.mark.slow] if n in SHARED else []) for n in CALLS],
    indirect=["backend"],
)
def test_weights_that_are_parameters_are_constants_with_one_warning(name, backend, monkeypatch):
    monkeypatch.setattr(_gradients, "_warned", set())
    call = CALLS[name]()
    weights = [argument for argument in floats(call) if argument in WEIGHTS]
    assert weights
    for argument in weights:
        call[argument] = call[argument].detach().requires_grad_()
    plain = copied(call)
    with backend(checks=False):
        with pytest.warns(UserWarning, match=r"takes weights as constants") as caught:
            result = operator(name)(**call)
    assert len(caught) == 1 and all(argument in str(caught[0].message) for argument in weights)
    assert caught[0].filename == __file__, "the warning shows the line of the call"
    results = result if isinstance(result, tuple) else (result,)
    assert not any(value.requires_grad for value in results)
    assert [n for n, v in call.items() if isinstance(v, torch.Tensor) and v.requires_grad] == weights
    if backend is kernel_backends.reference:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            operator(name)(**plain)
        for argument, value in call.items():
            if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
                equal(value.float().nan_to_num(), plain[argument].float().nan_to_num(), argument)


@pytest.mark.parametrize("name", ["selective_scan", "gated_delta_rule_mtp"])
def test_tangents_of_forward_mode_are_refused(name):
    """Weights included: the reference would carry them on, and the kernel drop them."""
    for argument in floats(CALLS[name]()):
        call = CALLS[name]()
        with forward_ad.dual_level():
            call[argument] = forward_ad.make_dual(call[argument], torch.ones_like(call[argument]))
            before = copied({n: v for n, v in call.items() if n != argument})
            with pytest.raises(GradientError, match=rf"^{argument}: expected a tensor without a tangent"):
                operator(name)(**call)
            assert same({n: v for n, v in call.items() if n != argument}, before)


def test_what_requires_grad_is_noticed_beside_what_is_no_tensor_and_whatever_levels_are_called(monkeypatch):
    call = CALLS["gated_delta_rule_mtp"]()
    call["k"].requires_grad_()
    with pytest.raises(GradientError, match=r"^k: "):
        cute_ssm.gated_delta_rule_mtp(**{**call, "initial_state_indices": [0, 1, 2]})
    monkeypatch.delattr(forward_ad, "_current_level")
    with pytest.raises(GradientError, match=r"^k: "):
        cute_ssm.gated_delta_rule_mtp(**call)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_refused_without_grad_mode(name, mode):
    call = CALLS[name]()
    for argument in floats(call):
        call[argument] = call[argument].detach().requires_grad_()
    with mode(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = operator(name)(**call)
    results = result if isinstance(result, tuple) else (result,)
    assert not any(value.grad_fn for value in results)


@pytest.mark.parametrize("name", ["gated_delta_rule_mtp", "checkpointing_ssu"])
def test_the_policy_holds_under_torch_compile(name, monkeypatch):
    monkeypatch.setattr(_gradients, "_warned", set())
    call = CALLS[name]()
    weights = [argument for argument in floats(call) if argument in WEIGHTS]
    constant = {n: v for n, v in call.items() if not isinstance(v, torch.Tensor)}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(tensors):
        result = operator(name)(**tensors, **constant)
        return (result[0] if isinstance(result, tuple) else result) + 1

    tensors = {n: v for n, v in call.items() if isinstance(v, torch.Tensor)}
    parameters = {n: v.detach().requires_grad_() if n in weights else v for n, v in tensors.items()}
    with pytest.warns(UserWarning, match="takes weights as constants"):
        assert not step(parameters).requires_grad
    first = {"gated_delta_rule_mtp": "k", "checkpointing_ssu": "B"}[name]
    with pytest.raises(Exception, match=rf"{first}: expected a tensor that does not require grad"):
        step({**tensors, first: tensors[first].detach().requires_grad_()})


def test_the_step_of_fla_names_its_own_arguments():
    call = {name: torch.zeros(1, 1, 1, 64).bfloat16() for name in "qkv"}
    call |= {"g": torch.zeros(1, 1, 1), "beta": torch.ones(1, 1, 1), "initial_state": torch.zeros(1, 1, 64, 64)}
    for name in call:
        with pytest.raises(GradientError, match=rf"^{name}: .* fused_recurrent_gated_delta_rule has no gradients"):
            fla.fused_recurrent_gated_delta_rule(**{**call, name: call[name].clone().requires_grad_()})


# ------------------------------------------------------------------------------------------ the function with gradients
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def scan_inputs(batch=2, dim=4, dstate=3, length=5, groups=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    tokens, columns = (batch, dim, length), (batch, groups, dstate, length)
    return [
        randn(*tokens), randn(*tokens), -randn(dim, dstate).abs(), randn(*columns), randn(*columns), randn(dim),
        randn(*tokens), randn(dim),
    ]  # fmt: skip


class Exact(torch.autograd.Function):
    """A scan in float64 whose gradients are those of `selective_scan_gradients`."""

    @staticmethod
    def forward(ctx, segment, *tensors):
        ctx.segment = segment
        ctx.save_for_backward(*tensors)
        return mathematics(*tensors, True, None, torch.float64)[1:]

    @staticmethod
    def backward(ctx, *grads):
        return None, *selective_scan_gradients(ctx.saved_tensors, True, *grads, torch.float64, ctx.segment)


@pytest.mark.parametrize("segment", [2, 5, 64])
def test_gradcheck_of_the_recomputation_in_segments(segment):
    tensors = [t.requires_grad_() for t in scan_inputs(dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: Exact.apply(segment, *t), tensors)


@both
def test_the_scan_of_mamba_ssm_has_gradients_on_every_path(backend):
    """The outputs are the bits of the operator, and the gradients of all arguments those of float64."""
    tensors = [t.requires_grad_() for t in scan_inputs(length=9)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    g = torch.Generator().manual_seed(4)
    with backend(checks=False):
        out, state = mamba_ssm.selective_scan_fn(*tensors, delta_softplus=True, return_last_state=True)
        with torch.no_grad():
            plain, plain_state = mamba_ssm.selective_scan_fn(*tensors, delta_softplus=True, return_last_state=True)
        grads = torch.randn(out.shape, generator=g), torch.randn(state.shape, generator=g)
        found = torch.autograd.grad((out, state), tensors, grads)
    equal(out, plain)
    equal(state, plain_state)
    want = torch.autograd.grad(mathematics(*exact, True, None, torch.float64)[1:], exact, [x.double() for x in grads])
    for name, one, other in zip(NAMES, found, want):
        assert (one.double() - other).abs().max() <= 1e-5 * other.abs().max(), name


@both
def test_gradcheck_of_the_scan_of_mamba_ssm(backend):
    """By differences of the operator's own outputs, in float32."""
    tensors = [t.requires_grad_() for t in scan_inputs(length=3)]
    with backend(checks=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that gradcheck wants float64
        assert torch.autograd.gradcheck(
            lambda *t: mamba_ssm.selective_scan_fn(*t, delta_softplus=True), tensors, eps=1e-2, atol=2e-3, rtol=2e-3,
            fast_mode=True,
        )  # fmt: skip


def test_gradients_of_the_scan_have_the_types_and_shapes_of_the_arguments():
    u, delta, A, B, C, D, z, bias = scan_inputs(groups=1)
    tokens = [t.bfloat16().requires_grad_() for t in (u, delta, B[:, 0], C[:, 0], z)]
    weights = [A.requires_grad_(), D.bfloat16().requires_grad_(), bias.requires_grad_()]
    u, delta, B, C, z = tokens
    mamba_ssm.selective_scan_fn(u, delta, weights[0], B, C, weights[1], z, weights[2]).float().sum().backward()
    for tensor in (*tokens, *weights):
        assert tensor.grad.shape == tensor.shape and tensor.grad.dtype == tensor.dtype and tensor.grad.any()
    empty = scan_inputs(length=0)
    out = mamba_ssm.selective_scan_fn(*[t.requires_grad_() for t in empty])
    out.sum().backward()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in empty)


@pytest.mark.parametrize("argument", NAMES)
def test_a_single_argument_that_requires_grad_gets_its_gradient(argument):
    tensors = dict(zip(NAMES, scan_inputs()))
    tensors[argument].requires_grad_()
    out = mamba_ssm.selective_scan_fn(**tensors)
    (found,) = torch.autograd.grad(out.sum(), [tensors[argument]])
    assert found.shape == tensors[argument].shape and found.any()
