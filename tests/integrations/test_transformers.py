"""Hugging Face models generate the same tokens with this package's operator as without it."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys

import pytest
import torch

import cute_ssm
import ptxsim
from cute_ssm.compat import mamba_ssm
from cute_ssm.errors import CuteSsmError

transformers = pytest.importorskip("transformers", minversion="5.23")

from cute_ssm.integrations import transformers as integration  # noqa: E402

PROMPT = torch.tensor([[5, 3, 60, 7], [1, 2, 9, 40]])
MAMBA2 = {"num_heads": 4, "head_dim": 32, "state_size": 32, "n_groups": 2, "chunk_size": 8}
CONFIGS = {
    "mamba2": ("Mamba2", MAMBA2),
    "mamba2-one-group": ("Mamba2", {**MAMBA2, "n_groups": 1, "state_size": 128, "head_dim": 64, "num_heads": 2}),
    "mamba": ("Mamba", {"state_size": 16}),
    "mamba-float32-residual": ("Mamba", {"state_size": 24, "residual_in_fp32": False, "use_bias": True}),
}


@pytest.fixture(autouse=True)
def restored():
    yield
    integration.unpatch()


def build(name, seed=0, **changes):
    """A random model whose logits are spread enough for tokens to differ."""
    kind, fields = CONFIGS[name]
    torch.manual_seed(seed)
    common = {"hidden_size": 64, "expand": 2, "num_hidden_layers": 2, "vocab_size": 97, "eos_token_id": None}
    config = getattr(transformers, f"{kind}Config")(**{**common, "pad_token_id": 0, **fields, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def generate(model, tokens=12):
    return model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
    )


@pytest.fixture
def calls(monkeypatch):
    """Layouts of A, dt, D and dt_bias in the operator's calls."""
    seen = []

    def spy(*args, **kwargs):
        state, _, dt, A = args[:4]
        seen.append((tuple(state.shape), A.stride()[-2:], dt.stride()[-1]))
        return operator(*args, **kwargs)

    operator = mamba_ssm._update
    monkeypatch.setattr(mamba_ssm, "_update", spy)
    return seen


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_tokens(name, seed, calls):
    model = build(name, seed)
    want = generate(model)
    assert not calls
    with integration.patch():
        got = generate(model)
    assert len(calls) == 2 * 11, "every layer of every token but the first runs through the operator"
    assert torch.equal(got, want)
    assert len(want[:, 4:].unique()) > 4, "a model that repeats itself would prove little"
    generate(model)
    assert len(calls) == 2 * 11, "no call after the context"


@pytest.mark.parametrize("name", ["mamba2", "mamba"])
def test_the_same_tokens_from_the_kernel(name, calls):
    model = build(name)
    want = generate(model, 4)
    with integration.patch(), ptxsim.emulate(arch="sm_90a"):
        got = generate(model, 4)
    assert len(calls) == 2 * 3
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["mamba2", "mamba"])
def test_logits_of_a_bfloat16_model(name):
    """The operator adds dt_bias and rounds once, in float32, where the model's own code rounds between operations."""
    model, exact = build(name).bfloat16(), build(name)
    with torch.no_grad():
        exact.load_state_dict(model.state_dict())

        def logits(model):
            cache = model(PROMPT[:, :3], use_cache=True).cache_params
            return model(PROMPT[:, 3:], use_cache=True, cache_params=cache).logits.float()

        want, plain = logits(exact), logits(model)
        with integration.patch():
            got = logits(model)
    scale = want.std()
    assert (got - want).abs().mean() < 1.2 * (plain - want).abs().mean() + 1e-3 * scale


def test_heads_of_mamba2_are_tied_and_mamba_is_dense(calls):
    with integration.patch():
        generate(build("mamba2"), 2)
        generate(build("mamba"), 2)
    tied, dense = calls[:2], calls[2:]
    assert tied == [((2, 4, 32, 32), (0, 0), 0)] * 2
    assert dense == [((2, 128, 16), (16, 1), 1)] * 2


def test_patch_and_unpatch():
    module = transformers.models.mamba2.modeling_mamba2
    before = module.mamba2_selective_state_update
    first = integration.patch()
    replaced = module.mamba2_selective_state_update
    assert integration.patched()
    assert replaced is not before
    assert inspect.signature(replaced) == inspect.signature(before)
    with integration.patch():
        assert module.mamba2_selective_state_update is replaced, "patched once"
    assert module.mamba2_selective_state_update is replaced, "the context undoes what it did: nothing"
    with first:
        pass
    assert module.mamba2_selective_state_update is before
    integration.patch("mamba2")
    assert module.mamba2_selective_state_update is not before
    integration.unpatch()
    integration.unpatch()
    assert module.mamba2_selective_state_update is before
    assert not integration.patched()


def test_a_context_undoes_its_patch_after_an_error():
    module = transformers.models.mamba.modeling_mamba
    before = module.mamba_selective_state_update
    with pytest.raises(KeyError), integration.patch():
        raise KeyError
    assert module.mamba_selective_state_update is before


@pytest.mark.parametrize("model", ["bamba", "falcon_mamba", "jamba", "nemotron_h", "zamba2"])
def test_other_models_that_have_the_function(model):
    module, name = integration._find(model)
    before = getattr(module, name)
    with integration.patch(model):
        assert getattr(module, name) is not before
        assert inspect.signature(getattr(module, name)) == inspect.signature(before)
    assert getattr(module, name) is before


def test_a_model_without_the_function():
    with pytest.raises(CuteSsmError, match=r"models: expected a model of transformers that defines .*, got 'llama' of"):
        integration.patch("llama")
    with pytest.raises(ImportError):
        integration.patch("mamba", "no_such_model")
    assert not integration.patched()


def test_what_the_operator_does_not_support_runs_as_before(caplog):
    model = build("mamba", state_size=8)
    want = generate(model, 4)
    caplog.set_level(logging.WARNING, logger="cute_ssm")
    with integration.patch():
        assert torch.equal(generate(model, 4), want)
    assert len([m for m in caplog.messages if "runs as without cute_ssm" in m]) == 1


def test_gradients_run_as_before(calls):
    model = build("mamba2")
    with torch.no_grad():
        cache = model(PROMPT[:, :3], use_cache=True).cache_params
    with integration.patch():
        logits = model(PROMPT[:, 3:], use_cache=True, cache_params=cache).logits
    assert logits.requires_grad
    assert not calls


def test_the_package_does_not_load_transformers():
    code = "import sys, cute_ssm.integrations.transformers; assert 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert cute_ssm.__version__
