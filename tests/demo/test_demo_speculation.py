"""The demo's speculation: the sampler it rests on, the text it must give, its drafts, its figures and its plot."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from demo_models import arguments, small_model

import cute_ssm
from cute_ssm.demo import cli, loop
from cute_ssm.demo.exact import ExactModel
from cute_ssm.demo.loop import Generation
from cute_ssm.demo.sampling import Sampler
from cute_ssm.demo.speculation import Drafter, Speculation


# ------------------------------------------------------------------------------------------------------------- sampling
def test_sampling():
    logits = torch.tensor([0.0, 3.0, 2.9, -40.0])

    def drawn(sampler):
        return [sampler(logits, position).token for position in range(500)]

    assert set(drawn(Sampler(0))) == {1}
    assert drawn(Sampler(1.0, seed=3)) == drawn(Sampler(1.0, seed=3)) != drawn(Sampler(1.0, seed=4))
    assert set(drawn(Sampler(1.0, seed=3, floor=0.1))) == {1, 2}
    assert set(drawn(Sampler(1e-300, seed=3))) == {1}
    assert set(drawn(Sampler(1.0, floor=0.0))) == {0, 1, 2}
    assert set(drawn(Sampler(1.0, floor=1.0))) == {1}


def test_sampling_draws_from_the_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    sampler = Sampler(0.7, seed=1, floor=0.0)
    count = 6000
    frequency = torch.bincount(torch.tensor([sampler(logits, n).token for n in range(count)]), minlength=5) / count
    expected = torch.softmax(logits / 0.7, 0)
    assert ((frequency - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()


def test_a_position_has_its_own_random_numbers_in_any_order():
    logits = torch.zeros(6)
    forward = Sampler(1.0, seed=5)
    expected = [forward(logits, n) for n in range(200)]
    backward = Sampler(1.0, seed=5)
    assert [backward(logits, n) for n in reversed(range(200))] == expected[::-1]


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("floor", [0.0, 0.1, 0.7])
def test_errors_within_the_margin_change_no_choice(temperature, floor):
    """Neither do errors just below it, of any signs, nor is it far too small: some errors just above it do."""
    sampler, make = Sampler(temperature, 0, floor), torch.Generator().manual_seed(0)
    changed = tried = 0
    for position in range(40):
        logits = torch.randn(5, generator=make, dtype=torch.float64)
        choice = sampler(logits, position)
        if math.isinf(choice.margin):
            continue
        tried += 1
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 5)
        assert all(sampler(logits + 0.999 * choice.margin * sign, position).token == choice.token for sign in signs)
        changed += any(sampler(logits + 1.001 * choice.margin * sign, position).token != choice.token for sign in signs)
    assert tried and changed >= 0.8 * tried


def test_an_exact_model_gives_every_logit_once():
    model = small_model(torch.float32)
    exact, tokens = ExactModel(model), torch.randint(50, (30,)).tolist()
    expected = model.double()(torch.tensor([tokens]), chunk=None)[0]
    for count in (8, 9, 20, 20, 12):
        torch.testing.assert_close(exact.logits(tokens[:count], 7), expected[7:count], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(exact.logits(tokens, 3), expected[3:], rtol=1e-9, atol=1e-9)
    other = [*tokens[:10], (tokens[10] + 1) % 50, *tokens[11:]]
    expected = model.double()(torch.tensor([other]), chunk=None)[0]
    torch.testing.assert_close(exact.logits(other, 0), expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------- speculation
SPECULATIVE = {"headdim": 16, "dstate": 64, "layers": 2}


def repetitive_model():
    """A small model that repeats itself at low temperatures, so that drafts are right now and then."""
    return small_model(torch.float32, **SPECULATIVE)


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("prompt", "seed", "temperature"), [("The import statement", 0, 0.5), ("A class", 1, 0.0), ("If the\n\n  ", 2, 1.0)]
)
def test_speculation_generates_the_text_of_the_token_by_token_decode(shipped, prompt, seed, temperature):
    model, tokenizer = shipped
    runs = [kind(model, tokenizer.encode(prompt), 36, Sampler(temperature, seed)) for kind in (Generation, Speculation)]
    one, several = (list(run.run()) for run in runs)
    assert several == one and len(one) == 36 and runs[1].generated == one
    for run in runs:
        assert 0 < run.logits_deviation().difference <= run.decisions.tolerance, "what the guarantee rests on"
        assert 0 < run.ssm_deviation().difference < 1e-2
    assert sum(step.accepted for step in runs[1].steps) == 36 and runs[1].writes > 0


@pytest.mark.thin(3)
@pytest.mark.parametrize(("state_dtype", "draft"), [(torch.float16, 1), (torch.float16, 15), (torch.bfloat16, 7)])
def test_speculation_with_narrow_states_and_other_drafts_generates_the_same_text(shipped, state_dtype, draft):
    model, tokenizer = shipped
    prompt, sampler = tokenizer.encode("The value of the class is the"), Sampler(0.3, 3)
    one = list(Generation(model, prompt, 30, sampler).run())
    run = Speculation(model, prompt, 30, sampler, draft, state_dtype)
    assert list(run.run()) == one
    assert run.logits_deviation().difference <= run.decisions.tolerance


def noisy(amount):
    """A verification with relative errors of about `amount` in its outputs."""
    make = torch.Generator().manual_seed(0)

    def verification(**call):
        out = cute_ssm.checkpointing_ssu(**call)
        return out.mul_(1 + amount * torch.randn(out.shape, generator=make))

    return verification


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_errors_within_the_tolerance_change_nothing(temperature):
    """Large errors, on purpose: choices that hang on them are made in float64, and there are such."""
    model, prompt = repetitive_model(), [1, 2, 3]
    text = list(Generation(model, prompt, 40, Sampler(temperature, 2)).run())
    verification = noisy(0.1)
    for _ in range(2):
        run = Speculation(model, prompt, 40, Sampler(temperature, 2), 4, verification=verification, tolerance=0.2)
        assert list(run.run()) == text and run.decisions.close > 0
        assert 0.01 < run.logits_deviation().difference <= 0.2


def test_without_tolerance_such_errors_show():
    """The test above can fail."""
    model, verification = repetitive_model(), noisy(0.3)
    runs = [
        Speculation(model, [1, 2, 3], 40, Sampler(1.0, 2), 4, verification=verification, tolerance=0.0)
        for _ in range(4)
    ]
    assert len({tuple(run.run()) for run in runs}) > 1


@pytest.mark.parametrize("broken", ["conv", "cursor"])
def test_rejected_tokens_that_are_not_forgotten_are_seen(shipped, broken, monkeypatch):
    from cute_ssm.serving import StatePool

    commit = StatePool.commit

    def wrong(self, slots, accepted, **options):
        conv = self.conv_state.clone()
        commit(self, slots, accepted if broken == "conv" else accepted.clamp(max=0) + self.tokens, **options)
        if broken == "conv":
            self.conv_state[..., :3] = conv[..., self.tokens : self.tokens + 3]  # as if all had been accepted
        else:
            commit(self, slots, accepted * 0, **options) if self.prev_num_accepted_tokens.max() > 16 else None

    monkeypatch.setattr(StatePool, "commit", wrong)
    model, tokenizer = shipped
    run = Speculation(model, tokenizer.encode("The import statement"), 12, Sampler(0.5, 0))
    list(run.run())
    assert run.logits_deviation().difference > 10 * run.decisions.tolerance


def test_steps_are_counted_as_the_pool_sees_them():
    model, written = repetitive_model(), []

    def watched(**call):
        before = call["state"].clone()
        out = cute_ssm.checkpointing_ssu(**call)
        written.append(not torch.equal(before, call["state"]))
        return out

    run = Speculation(model, [1, 2, 3], 60, Sampler(0), 4, verification=watched)
    list(run.run())
    assert [step.wrote for step in run.steps] == written[::2] == written[1::2]
    assert run.writes > 3 and run.saved_bytes == (len(run.steps) - run.writes) * 2 * 4 * 16 * 64 * 4
    assert run.pool.prev_num_accepted_tokens[run.slot] == run._pending
    assert all(1 <= step.accepted <= 5 for step in run.steps) and len(run.steps) < 60


def test_drafts_repeat_what_followed(shipped):
    model, _ = shipped
    drafter = Drafter(model, Sampler(0))
    text = [5, 6, 7, 8, 9, 5, 6]
    assert drafter(text, 5) == [7, 8, 9, 5, 6]
    guess = drafter([*text, 300], 2)
    expected = model(torch.tensor([[300]]))[0, 0].argmax()
    assert guess[0] == expected, "nothing is known of this ending: what the model expects after the last token"
    assert drafter([*text, 300, 5, 6], 1) == [300], "the last occurrence counts"
    with pytest.raises(ValueError, match="least"):
        Drafter(model, Sampler(0), least=0)


@pytest.mark.parametrize("options", [{"draft": 0}, {"slots": 1}, {"count": 0}, {"prompt": []}, {"tolerance": -1.0}])
def test_bad_arguments_of_speculation(options):
    call = {"prompt": [1], "count": 3, "sampler": Sampler(0), **options}
    with pytest.raises(ValueError, match="tokens" if "count" in options else next(iter(options))):
        Speculation(repetitive_model(), **call)


@pytest.mark.parametrize(("draft", "dtype"), [("3", "float32"), ("0", "float16")])
def test_a_plot_of_the_steps_names_what_ran(draft, dtype, tmp_path, capsys, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    path, save, seen = tmp_path / "steps.png", figure.savefig, []
    monkeypatch.setattr(figure, "savefig", lambda self, *args, **options: (seen.append(self), save(self, *args)))
    words = ("--backend", "reference", "--tokens", "20", "--draft", draft, "--state-dtype", dtype)
    assert cli.main(arguments(*words, "--plot", str(path))) == 0
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 10_000
    title = seen[0].get_suptitle()
    assert title.startswith("Mamba-2 model of the demo (4 layers of 256, 1.")
    assert title.endswith(f"backend reference; states in {dtype}")
    above, below = seen[0].axes
    kind = above.get_title()
    heights = [bar.get_height() for bar in above.patches]
    written = below.lines[1].get_ydata()[-1]
    if draft == "0":
        assert kind == "token by token" and heights == [1] * 20
        assert written == below.lines[0].get_ydata()[-1] == pytest.approx(20 * 4 * 8 * 64 * 64 * 2 / 1e6)
    else:
        assert kind == "3 drafted tokens per step" and sum(heights) == 20 and max(heights) > 1
        assert written < below.lines[0].get_ydata()[-1]
        assert "MB saved compared with a write in every step" in capsys.readouterr().out


@pytest.mark.wide
def test_drafts_are_drawn_with_the_random_numbers_of_their_position(shipped):
    """With temperature: then what the model expects and what it chooses lean the same way, and more is accepted."""
    model, tokenizer = shipped
    sampler, prompt = Sampler(1.0, 0), tokenizer.encode("The import statement")
    expected = model(torch.arange(40)[:, None], chunk=1)[:, 0]
    drafter, differ = Drafter(model, sampler), 0
    for n in range(1, 41):  # every ending is new
        choice = sampler(expected[n - 1], n).token
        assert drafter(list(range(n)), 1) == [choice]
        differ += choice != sampler(expected[n - 1], n - 1).token
    assert differ > 10, "numbers of another position would show"

    def accepted(drafting):
        run = Speculation(model, prompt, 60, sampler)
        run._drafter = Drafter(model, drafting)
        list(run.run())
        return sum(step.accepted for step in run.steps) / len(run.steps)

    assert accepted(sampler) > 1.04 * accepted(Sampler(1.0, 1))


def test_a_plot_without_matplotlib_is_refused_before_the_work(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(arguments("--backend", "reference", "--plot", "a.png")) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "pip install 'cute-ssm[demo]'" in captured.err


def test_matplotlib_is_not_imported_without_a_plot():
    code = "import sys; from cute_ssm.__main__ import main; main(['demo', '--backend', 'reference', '--tokens', '2']); "
    code += "sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_logits_beyond_the_tolerance_are_reported(monkeypatch, capsys):
    monkeypatch.setitem(loop.TOLERANCES, torch.float32, 1e-7)
    assert cli.main(arguments("--backend", "reference", "--tokens", "5")) == 0
    assert "above the tolerance of 1e-07, other backends may give another text" in capsys.readouterr().out
