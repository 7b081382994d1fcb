"""Gated delta nets of Hugging Face give the same tokens with this package's operator as without it."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from bits import equal
from torch.utils._python_dispatch import TorchDispatchMode

from cute_ssm.errors import CuteSsmError
from cute_ssm.integrations import _transformers_calls

transformers = pytest.importorskip("transformers", minversion="5.23")

from cute_ssm.integrations import transformers as integration  # noqa: E402

LENGTH, NEW = 21, 6
PROMPT = torch.randint(3, 60, (2, LENGTH), generator=torch.Generator().manual_seed(1))
COMMON = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 2, "max_position_embeddings": 128,
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 32, "linear_value_head_dim": 16,
}  # fmt: skip
DENSE = {"intermediate_size": 64}
EXPERTS = {
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
HEAD = {"head_dim": 16}
INDEXER = {
    "layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "indexer_head_dim": 16, "indexer_budget": 64, "indexer_compress_ratio": 4, "hc_count": 2, "hc_lowrank": 8,
}  # fmt: skip
FAMILIES = {  # folder of transformers.models -> name of the configuration, and its fields
    "qwen3_next": ("Qwen3Next", {**DENSE, **HEAD, **EXPERTS}),
    "olmo_hybrid": ("OlmoHybrid", {**DENSE, "linear_num_key_heads": 4}),  # beta up to 2
    "qwen3_5": ("Qwen3_5Text", {**DENSE, **HEAD}),
    "qwen3_5_moe": ("Qwen3_5MoeText", {**HEAD, **EXPERTS}),
    "qwen4_exp": ("Qwen4ExpText", {**HEAD, **EXPERTS, **INDEXER}),
    "lara_mini": ("LaraMini", {**HEAD, **EXPERTS}),
}
FIRST = ("qwen3_next", "olmo_hybrid")
families = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FIRST else pytest.mark.wide) for name in FAMILIES]
)
TENSORS = ("query", "key", "value", "g", "beta", "initial_state")


@pytest.fixture(autouse=True)
def restored():
    yield
    integration.unpatch()


def build(name, dtype=torch.bfloat16, **changes):
    """A random model whose logits are spread enough for tokens to differ."""
    kind, fields = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **fields, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def generate(model, tokens=NEW, prompt=PROMPT, **options):
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, **options}
    return model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, **options)


def logits(model, **options):
    with torch.no_grad():
        return model(PROMPT, **options).logits.float()


def close(got, want):
    """Equal but for roundings of bfloat16 that fell to the other side."""
    torch.testing.assert_close(got, want, rtol=0, atol=0.05 * want.std().item())


@pytest.fixture
def calls(monkeypatch):
    """(tokens, address of the states, whether they are updated) of every call of the operator, of up to 16 tokens."""
    seen = []
    monkeypatch.setattr(_transformers_calls, "TOKENS", 16)  # so that prompts of tests take two

    def spy(q, k, v, state, *args, **kwargs):
        seen.append((q.shape[1], state.data_ptr(), not kwargs["disable_state_update"]))
        return operator(q, k, v, state, *args, **kwargs)

    operator = _transformers_calls.gated_delta_rule_mtp
    monkeypatch.setattr(_transformers_calls, "gated_delta_rule_mtp", spy)
    return seen


@families
def test_the_same_tokens(name, calls, caplog):
    model = build(name)
    want = generate(model)
    assert not calls
    with integration.patch(name) as done:
        got = generate(model)
    equal(got, want)
    assert len(want[:, LENGTH:].unique()) > 2, "a model that repeats itself would prove little"
    assert [tokens for tokens, _, _ in calls] == [16, LENGTH - 16] + [1] * (NEW - 1), "of one layer"
    assert len({address for _, address, _ in calls[2:]}) == 1, "the states of the cache are updated where they are"
    assert "runs without cute_ssm" not in caplog.text
    assert done.patched == tuple(f"{name}.torch_{kind}_gated_delta_rule" for kind in ("recurrent", "chunk"))
    assert not done.skipped
    generate(model)
    assert len(calls) == 2 + NEW - 1, "no call after the context"


def test_the_same_tokens_from_the_kernel(backend):
    model, prompt = build("qwen3_next"), PROMPT[:, :17]  # more than the kernel has in a chunk
    want = generate(model, 3, prompt)
    with integration.patch("qwen3_next"), backend(checks=False) as session:
        got = generate(model, 3, prompt)
    equal(got, want)
    kernels = [launch.program.kernel.name for launch in session.launches]
    assert sum("GatedDelta" in kernel for kernel in kernels) == len(kernels) == 1 + 2


@families
def test_logits_of_a_prompt_without_a_cache(name, calls):
    model = build(name)
    want = logits(model, use_cache=False)
    with integration.patch(name):
        close(logits(model, use_cache=False), want)
    assert [(tokens, updated) for tokens, _, updated in calls] == [(16, True), (LENGTH - 16, False)]


def test_a_prompt_after_a_cached_one(calls):
    """A prefill that starts from the states of a cache."""
    model, more = build("qwen3_next"), PROMPT[:, :18]

    def run():
        with torch.no_grad():
            cache = model(PROMPT, use_cache=True).past_key_values
            return model(more, past_key_values=cache).logits.float()

    want = run()
    with integration.patch():
        close(run(), want)
    assert [tokens for tokens, _, _ in calls] == [16, 5, 16, 2]
    assert calls[2][1] == calls[3][1]


def test_padded_prompts(calls):
    model, mask = build("qwen3_next"), torch.ones_like(PROMPT)
    mask[1, :7] = 0
    want = generate(model, attention_mask=mask)
    with integration.patch():
        equal(generate(model, attention_mask=mask), want)
    assert calls


def test_beams_whose_states_move(calls):
    """Reordering gives the states of a cache another layout."""
    model = build("qwen3_next")
    want = generate(model, num_beams=2)
    with integration.patch():
        equal(generate(model, num_beams=2), want)
    assert len(calls) == 2 + NEW - 1


@pytest.mark.wide
def test_a_compiled_layer():
    """One graph, which updates the states of the cache as well."""
    model, token = build("qwen3_next"), torch.randn(2, 1, 64).bfloat16()
    layer = model.model.layers[0].linear_attn
    with integration.patch(), torch.no_grad():
        caches = [model(PROMPT, use_cache=True).past_key_values for _ in range(2)]
        want = layer(token, cache=caches[0])
        equal(torch.compile(layer, backend="eager", fullgraph=True)(token, cache=caches[1]), want)
    equal(*(cache.layers[0].recurrent_states[0] for cache in caches))


def test_prefill_stays_with_fla_where_it_is_installed(calls, monkeypatch):
    monkeypatch.setattr(integration, "find_spec", lambda name: object())
    model = build("qwen3_next")
    want = generate(model)
    with integration.patch("qwen3_next") as done:
        equal(generate(model), want)
    assert [tokens for tokens, _, _ in calls] == [1] * (NEW - 1)
    assert len({address for _, address, _ in calls}) == 1, "the states of the cache are updated where they are"
    assert done.patched == ("qwen3_next.torch_recurrent_gated_delta_rule",)
    assert done.skipped == {"qwen3_next.torch_chunk_gated_delta_rule": integration.FLA}
    assert done.rows[0][3:] == ("unchanged", integration.FLA)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float32}, "query: expected bfloat16 or float16, got torch.float32"),
        ({"linear_key_head_dim": 24}, "K: expected a multiple of 16 up to 256, got 24"),
        ({"linear_value_head_dim": 264}, "V: expected a multiple of 16 up to 256, or 512, got 264"),
    ],
)
def test_what_the_operator_does_not_support_runs_as_before(changes, words, caplog):
    model = build("qwen3_next", **changes)
    want = generate(model, 3)
    caplog.set_level(logging.WARNING, logger="cute_ssm")
    with integration.patch():
        equal(generate(model, 3), want)
    told = [message for message in caplog.messages if "runs without cute_ssm" in message]
    assert len(told) == 2, "once for prefill and once for decode steps"
    assert all(words in message for message in told)


def tensors(tokens=1):
    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)

    q, v = normal(2, tokens, 2, 16), normal(2, tokens, 4, 32)
    g, state = -normal(2, tokens, 4, dtype=torch.float32).abs(), normal(2, 4, 16, 32, dtype=torch.float32)
    return dict(zip(TENSORS, (q, q + 1, v, g, g.exp().bfloat16(), state)))


REPLACED = {"torch_recurrent": "delta_step", "torch_chunk": "delta_prefill"}


@pytest.fixture(params=REPLACED)
def pair(request):
    """A function of transformers, and its replacement."""
    module = transformers.models.qwen3_next.modeling_qwen3_next
    original = getattr(module, f"{request.param}_gated_delta_rule")
    return original, getattr(_transformers_calls, REPLACED[request.param])(original)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_call(pair, tokens, keep):
    """With a state in transformers' layout, which is left as it is."""
    original, replaced = pair
    call = tensors(tokens)
    state = call["initial_state"].clone()
    want, last = original(**call, output_final_state=keep, use_qk_l2norm_in_kernel=True)
    got, final = replaced(**call, output_final_state=keep, use_qk_l2norm_in_kernel=True, position_ids=1)
    equal(call["initial_state"], state)
    torch.testing.assert_close(got, want)
    assert got.dtype == torch.bfloat16
    assert (final is None) == (last is None) == (not keep)
    if keep:
        assert final.shape == last.shape and final.dtype == torch.float32
        torch.testing.assert_close(final, last, rtol=1e-4, atol=1e-5)
    assert inspect.signature(replaced) == inspect.signature(original)


VIEWS = "expand transpose slice select unsqueeze view permute _unsafe_view detach alias empty new_empty squeeze".split()


class Launches(TorchDispatchMode):
    """Counts the operations that launch a kernel on a GPU: all but views and allocations."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ not in VIEWS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("tokens", "theirs"), [(64, 56), (256, 84), (4096, 624)])
def test_launches_of_a_prefill(tokens, theirs, calls):
    """Those of the guide."""
    original = transformers.models.qwen3_next.modeling_qwen3_next.torch_chunk_gated_delta_rule
    call = tensors(tokens)
    del call["initial_state"]
    with torch.no_grad(), Launches() as counted:
        original(**call, output_final_state=True, use_qk_l2norm_in_kernel=True)
    assert -(-tokens // 64) < theirs
    if transformers.__version__.startswith("5.24."):
        assert counted.count == theirs


def test_launches_of_a_decode_step(monkeypatch):
    """Beside the kernel: the slots, and the conversion of beta; states are updated in place."""
    monkeypatch.setattr(_transformers_calls, "gated_delta_rule_mtp", lambda *args, **kwargs: None)
    call = tensors()
    call["initial_state"] = call["initial_state"].mT.contiguous().mT
    replaced = _transformers_calls.delta_step(lambda *args, **kwargs: None)
    with torch.no_grad(), Launches() as counted:
        _, state = replaced(**call, output_final_state=True, use_qk_l2norm_in_kernel=True)
    assert counted.count == 2
    assert state is call["initial_state"], "which a cache then does not copy"


def test_states_that_are_not_kept_are_not_written(pair):
    """Also in the layout in which those of a cache are updated in place."""
    call = tensors(20)
    call["initial_state"] = call["initial_state"].mT.contiguous().mT
    state = call["initial_state"].clone()
    out, _ = pair[1](**call)
    equal(call["initial_state"], state)
    again, final = pair[1](**call, output_final_state=True)
    equal(again, out)
    assert final is call["initial_state"]


@pytest.mark.parametrize("replace", REPLACED.values())
@pytest.mark.parametrize("argument", TENSORS)
def test_a_call_runs_unpatched_if_any_one_tensor_requires_grad(argument, replace):
    ran = []
    replaced = getattr(_transformers_calls, replace)(lambda *args, **kwargs: ran.append("original"))
    call = tensors()
    replaced(**call)
    assert not ran
    call[argument].requires_grad_()
    replaced(**call)
    assert ran == ["original"]


def test_packed_sequences_run_as_before(caplog):
    ran = []
    for replace in (_transformers_calls.delta_step, _transformers_calls.delta_prefill):
        replace(lambda *args, **kwargs: ran.append(kwargs["cu_seqlens"]))(**tensors(), cu_seqlens=1)
    assert ran == [1, 1]
    assert "the operator has no cu_seqlens" in caplog.text


def test_functions_that_kernels_made_modules_of(caplog):
    """With the package kernels, transformers' functions are instances of torch.nn.Module, which have no name."""

    class Function(torch.nn.Module):
        def forward(self, *args, **kwargs):
            return "original"

    call = {name: tensor.float() for name, tensor in tensors().items()}
    assert _transformers_calls.delta_step(Function())(**call) == "original"
    assert "Function runs without cute_ssm: query" in caplog.text


def test_a_model_without_the_chunked_function(monkeypatch):
    """A version that has its prefill elsewhere is refused, not patched by half."""
    module = transformers.models.qwen3_next.modeling_qwen3_next
    before = module.torch_recurrent_gated_delta_rule
    monkeypatch.delattr(module, "torch_chunk_gated_delta_rule")
    with pytest.raises(CuteSsmError, match="torch_recurrent_gated_delta_rule and torch_chunk_gated_delta_rule"):
        integration.patch("qwen3_next")
    assert module.torch_recurrent_gated_delta_rule is before
