"""Hugging Face models give the same logits and tokens with this package's operators as without them."""

from __future__ import annotations

import inspect
import logging
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from bits import equal

import cute_ssm
from cute_ssm import tuning
from cute_ssm.compat import mamba_ssm
from cute_ssm.errors import CuteSsmError
from cute_ssm.integrations import _transformers_calls

transformers = pytest.importorskip("transformers", minversion="5.23")

from cute_ssm.integrations import transformers as integration  # noqa: E402

STEPS = ("selective_state_update", "torch_recurrent_gated_delta_rule")
PROMPT = torch.tensor([[5, 3, 60, 7], [1, 2, 9, 40]])
MAMBA2 = {"num_heads": 4, "head_dim": 32, "state_size": 32, "n_groups": 2, "chunk_size": 8}
CONFIGS = {
    "mamba2": ("Mamba2", MAMBA2),
    "mamba2-one-group": ("Mamba2", {**MAMBA2, "n_groups": 1, "state_size": 128, "head_dim": 64, "num_heads": 2}),
    "mamba": ("Mamba", {"state_size": 16}),
    "mamba-float32-residual": ("Mamba", {"state_size": 24, "residual_in_fp32": False, "use_bias": True}),
    "falcon_mamba": ("FalconMamba", {"state_size": 16}),
}
MAMBA1 = ("mamba", "mamba-float32-residual", "falcon_mamba")


def folder(name):
    """What `patch` calls the model of a config."""
    return name.partition("-")[0]


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
def scans(monkeypatch):
    """(shape of u, whether states are kept) of every scan by the operator."""
    seen = []

    def spy(u, states, *args, **kwargs):
        seen.append((tuple(u.shape), states is not None))
        return operator(u, states, *args, **kwargs)

    operator = mamba_ssm.selective_scan
    monkeypatch.setattr(mamba_ssm, "selective_scan", spy)
    return seen


@pytest.fixture
def calls(monkeypatch):
    """Layouts of state, A and dt in the calls of the decode operator."""
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
def test_the_same_tokens(name, seed, calls, scans):
    model = build(name, seed)
    want = generate(model)
    assert not calls
    assert not scans
    with integration.patch(folder(name)):
        got = generate(model)
    assert len(calls) == 2 * 11, "every layer of every token but the first runs through the operator"
    assert scans == ([((2, 128, 4), True)] * 2 if name in MAMBA1 else []), "every layer's prefill does, of Mamba-1"
    equal(got, want)
    assert len(want[:, 4:].unique()) > 4, "a model that repeats itself would prove little"
    generate(model)
    assert (len(calls), len(scans)) == (2 * 11, 2 * (name in MAMBA1)), "no call after the context"


@pytest.mark.parametrize("name", ["mamba2", "mamba"])
def test_the_same_tokens_from_the_kernel(name, calls, backend):
    model = build(name)
    want = generate(model, 4)
    with integration.patch(), backend(checks=False) as session:
        got = generate(model, 4)
    assert len(calls) == 2 * 3
    equal(got, want)
    kernels = [launch.program.kernel.name for launch in session.launches]
    assert sum("SelectiveScan" in kernel for kernel in kernels) == (2 if name == "mamba" else 0)
    assert sum("SelectiveStep" in kernel for kernel in kernels) == 2 * 3


def tokens(length, batch=2):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("length", [1, 5, 70])
@pytest.mark.parametrize("name", MAMBA1)
def test_logits_of_a_prefill(name, length, use_cache, scans):
    model = build(name)
    with torch.no_grad():
        want = model(tokens(length), use_cache=use_cache)
        with integration.patch(folder(name)):
            got = model(tokens(length), use_cache=use_cache)
    assert scans == [((2, 128, length), use_cache)] * 2
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4 * want.logits.std().item())
    if use_cache:
        for layer in range(2):
            state, wanted = (r.cache_params.get_recurrent_state(layer, state_idx=0) for r in (got, want))
            assert state.dtype == wanted.dtype == torch.float32
            torch.testing.assert_close(state, wanted, rtol=1e-4, atol=1e-4 * wanted.std().item())


@pytest.mark.parametrize("splits", [1, 3])
def test_logits_of_a_prefill_by_the_kernel(splits, backend):
    model = build("mamba")
    with torch.no_grad():
        want = model(tokens(40)).logits
        with integration.patch(), backend(checks=False) as session, tuning.override(splits=splits):
            got = model(tokens(40)).logits
    assert len(session.launches) == 2 * min(splits, 2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.std().item())


def test_padded_prompts(scans):
    """Padding is masked to zero before the scan, which sees a dense batch."""
    model, mask = build("mamba"), torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    with torch.no_grad():
        want = model(tokens(9), attention_mask=mask).logits
        with integration.patch():
            got = model(tokens(9), attention_mask=mask).logits
    assert len(scans) == 2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.std().item())


@pytest.mark.parametrize("prefill", [3, 4], ids=["decode", "prefill"])
@pytest.mark.parametrize("name", ["mamba2", "mamba"])
def test_logits_of_a_bfloat16_model(name, prefill):
    """The operators add dt_bias and round once, in float32, where the model's own code rounds between operations."""
    model, exact = build(name).bfloat16(), build(name)
    with torch.no_grad():
        exact.load_state_dict(model.state_dict())

        def logits(model):
            first = model(PROMPT[:, :prefill], use_cache=True)
            if prefill == 4:
                return first.logits.float()
            return model(PROMPT[:, prefill:], use_cache=True, cache_params=first.cache_params).logits.float()

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


@pytest.mark.parametrize(
    ("model", "functions"),
    [
        ("mamba", ["mamba_selective_state_update", "mamba_selective_scan"]),
        ("mamba2", ["mamba2_selective_state_update"]),
        ("bamba", ["mamba2_selective_state_update"]),
        ("falcon_h1", ["mamba2_selective_state_update"]),
        ("falcon_mamba", ["mamba_selective_state_update", "mamba_selective_scan"]),
        ("granitemoehybrid", ["mamba2_selective_state_update"]),
        ("jamba", ["mamba_selective_state_update", "mamba_selective_scan"]),
        ("nemotron_h", ["mamba2_selective_state_update"]),
        ("zamba", ["mamba_selective_state_update", "mamba_selective_scan"]),
        ("zamba2", ["mamba2_selective_state_update"]),
        ("qwen3_next", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"]),
    ],
)
def test_models_that_have_the_functions(model, functions):
    places = list(integration._find(model).functions)
    assert [name for _, name in places] == functions
    before = [getattr(*place) for place in places]
    with integration.patch(model):
        for place, original in zip(places, before):
            assert getattr(*place) is not original
            assert inspect.signature(getattr(*place)) == inspect.signature(original)
    assert [getattr(*place) for place in places] == before


def test_every_family_is_patched_by_default():
    with integration.patch() as done:
        assert tuple(row.model for row in done.rows) == integration.MODELS
        decoded = [row.model for row in done.rows if row.decode != "unchanged"]
        assert [name.split(".")[0] for name in done.patched if name.endswith(STEPS)] == decoded
        assert sum("scan" in name for name in done.patched) == 4, "of Mamba-1 alone"
        assert {name.split(".")[0] for name in done.skipped} == {row.model for row in done.rows if row.reason}
        assert "'mamba2.mamba2_chunk_scan': 'this package has no kernel for Mamba-2 prefill'" in repr(done)
        assert done.skipped["kimi_linear"].startswith("this package has no kernel for Kimi delta attention")
        assert integration.patch("bamba").patched == ("bamba.mamba2_selective_state_update",), "patched before"


def test_no_family_of_the_installed_version_is_missing():
    """Every file of transformers that defines one of the functions."""
    kinds = [*(kind.step for kind in integration.RECURRENCES), *integration.OTHERS]
    defined = re.compile(rf"^def ({'|'.join(kinds)})\(", re.MULTILINE)
    files = pathlib.Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    assert {file.parent.name for file in files if defined.search(file.read_text())} == set(integration.MODELS)


def test_the_guide_has_the_table():
    guide = pathlib.Path(__file__).parents[2] / "docs" / "guides" / "transformers.md"
    with integration.patch() as done:
        assert str(done) in guide.read_text(), f"the table of the guide is print(patch()):\n{done}"


def test_a_family_that_this_version_lacks_is_reported_not_raised(monkeypatch):
    monkeypatch.setattr(integration, "MODELS", ("mamba", "no_such_model"))
    with integration.patch() as done:
        assert len(done.patched) == 2
        assert "no_such_model" in done.skipped["no_such_model"]


COMMON = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
HEADS = {
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 32, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_chunk_size": 8,
}  # fmt: skip
HYBRIDS = {  # model -> configuration, layers with a recurrence, and those of them whose prefill is scanned
    "bamba": (lambda: transformers.BambaConfig(**COMMON, **HEADS, attn_layer_indices=[1]), 1, 0),
    "falcon_h1": (lambda: transformers.FalconH1Config(**COMMON, **HEADS, mamba_d_ssm=128), 2, 0),
    "granitemoehybrid": (
        lambda: transformers.GraniteMoeHybridConfig(
            **{**COMMON, **HEADS, "layer_types": ["mamba", "attention"]},
            **{"shared_intermediate_size": 64, "num_local_experts": 2, "num_experts_per_tok": 1},
        ),
        *(1, 0),
    ),
    "zamba2": (
        lambda: transformers.Zamba2Config(
            **{**COMMON, "mamba_d_state": 32, "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 32},
            **{"chunk_size": 8, "layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "use_mem_rope": True},
            adapter_rank=8,
        ),
        *(2, 0),
    ),
    "nemotron_h": (
        lambda: transformers.NemotronHConfig(
            **{**COMMON, "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 32, "n_groups": 1},
            **{"chunk_size": 8, "layers_block_type": ["mamba", "attention"]},
        ),
        *(1, 0),
    ),
    "jamba": (
        lambda: transformers.JambaConfig(
            **{**COMMON, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1},
            **{"mamba_d_state": 16, "mamba_dt_rank": 8},
        ),
        *(1, 1),
    ),
    "zamba": (
        lambda: transformers.ZambaConfig(
            **{**COMMON, "num_hidden_layers": 3, "mamba_d_state": 16, "n_mamba_heads": 2, "mamba_dt_rank": 8},
            layers_block_type=["mamba", "hybrid", "hybrid"],
        ),
        *(3 * 2, 3 * 2),  # a call for each of its heads
    ),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrid_models_decode_through_the_operators(name, calls, scans, caplog):
    """Their mixers pass on arguments of other layers, which transformers' own functions ignore."""
    configuration, layers, scanned = HYBRIDS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configuration()).eval()
    want = generate(model, 4)
    with integration.patch(name):
        got = generate(model, 4)
    assert len(calls) == 3 * layers
    assert len(scans) == scanned
    equal(got, want)
    assert "runs without cute_ssm" not in caplog.text


@pytest.mark.parametrize("name", _transformers_calls.MEANT)
def test_arguments_that_change_a_result_are_not_ignored(name, caplog):
    ran = []
    step = _transformers_calls.update(lambda *args, **kwargs: ran.append(kwargs))
    call = {"state": torch.zeros(1, 2, 16, 16), "hidden_states": torch.zeros(1, 2, 16), "dt": torch.zeros(1, 2, 16)}
    call |= {"A": torch.zeros(2, 16, 16), "B": torch.zeros(1, 1, 16), "C": torch.zeros(1, 1, 16)}
    step(**call, **{name: None}, position_embeddings=1)
    assert not ran
    step(**call, **{name: 1})
    assert ran[0][name] == 1
    assert f"the operator has no {name}" in caplog.text


@pytest.mark.parametrize(
    ("name", "words"),
    [(name, "Kimi delta attention") for name in ("bailing_hybrid", "kimi_linear", "glm5_next")],
)
def test_other_recurrences_are_refused_for_what_they_are(name, words):
    pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    with pytest.raises(CuteSsmError, match=f"models: .*{name}.*{words}"):
        integration.patch(name)
    assert not integration.patched()


def test_a_missing_transformers_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'cute-ssm\[hf\]'"):
        integration.patch()


def test_a_model_without_the_scan(monkeypatch):
    """A version that scans elsewhere is refused, not patched by half."""
    module = transformers.models.mamba.modeling_mamba
    before = module.mamba_selective_state_update
    monkeypatch.delattr(module, "mamba_selective_scan")
    with pytest.raises(CuteSsmError, match="defines mamba_selective_state_update and mamba_selective_scan"):
        integration.patch("mamba")
    assert module.mamba_selective_state_update is before


def test_a_model_without_the_function():
    with pytest.raises(CuteSsmError, match=r"models: expected a model of transformers that defines .*, got 'llama' of"):
        integration.patch("llama")
    with pytest.raises(ImportError):
        integration.patch("mamba", "no_such_model")
    assert not integration.patched()


def test_what_the_operator_does_not_support_runs_as_before(caplog):
    model = build("mamba", state_size=4)
    want = generate(model, 4)
    caplog.set_level(logging.WARNING, logger="cute_ssm")
    with integration.patch():
        equal(generate(model, 4), want)
    assert len([m for m in caplog.messages if "runs without cute_ssm" in m]) == 1


def test_gradients_run_as_before(calls, scans):
    with integration.patch():
        assert build("mamba")(PROMPT).logits.requires_grad
    assert not scans
    model = build("mamba2")
    with torch.no_grad():
        cache = model(PROMPT[:, :3], use_cache=True).cache_params
    with integration.patch():
        logits = model(PROMPT[:, 3:], use_cache=True, cache_params=cache).logits
    assert logits.requires_grad
    assert not calls


@pytest.mark.parametrize("argument", ["state", "hidden_states", "dt", "A", "B", "C", "D", "dt_bias", "z"])
def test_a_step_runs_unpatched_if_any_one_tensor_requires_grad(argument):
    """Also what no layer computes from activations, such as D."""
    ran = []
    step = _transformers_calls.update(lambda *args, **kwargs: ran.append("original"))
    call = {"state": torch.zeros(1, 2, 16, 16), "hidden_states": torch.zeros(1, 2, 16), "dt": torch.zeros(1, 2, 16)}
    call |= {"A": torch.zeros(2, 16, 16), "B": torch.zeros(1, 1, 16), "C": torch.zeros(1, 1, 16)}
    call |= {"D": torch.zeros(2, 16), "dt_bias": torch.zeros(2, 16), "z": torch.zeros(1, 2, 16)}
    assert step(**call).shape == (1, 2, 16) and not ran
    call[argument].requires_grad_()
    step(**call)
    assert ran == ["original"]


@pytest.mark.parametrize("argument", range(8))
def test_a_scan_runs_unpatched_if_any_one_tensor_requires_grad(argument):
    ran = []
    scan = _transformers_calls.scan(lambda *args, **kwargs: ran.append("original"))
    tokens, columns = (1, 4, 3), (1, 2, 3)
    call = [torch.zeros(*size) for size in (tokens, tokens, (4, 2), columns, columns, (4,), tokens, (4,))]
    assert scan(*call).shape == tokens and not ran
    call[argument].requires_grad_()
    scan(*call)
    assert ran == ["original"]


def test_the_package_does_not_load_transformers():
    code = "import sys, cute_ssm.integrations.transformers; assert 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert cute_ssm.__version__
