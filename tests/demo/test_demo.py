"""The demo: its scan, tokenizer, model, weights, loop and command line, all on the reference backend."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from demo_models import arguments, small_model
from paths import ROOT

import cute_ssm
from cute_ssm.demo import cli, report, weights
from cute_ssm.demo.loop import Deviation, Generation
from cute_ssm.demo.model import LanguageModel, ModelConfig
from cute_ssm.demo.sampling import Sampler
from cute_ssm.demo.ssd import chunked_scan, recurrence
from cute_ssm.demo.tokenizer import Tokenizer, split_words

pytest.importorskip("safetensors")

# written for this test: in the manner of the training text, but no part of it
PASSAGE = """\
The purpose of a function is to give a name to a piece of code, so that it can be called from several places in a
program. When a function is called, its arguments are evaluated first, and each value is bound to the name of the
corresponding parameter. If the number of arguments does not match the definition, a "TypeError" exception is raised.
The value of the call is the object that the "return" statement names, or "None" if the end of the body is reached.

Note that a default value is evaluated only once, when the definition is executed. A list that is used as a default
value is therefore shared by all calls of the function, which is rarely what was intended. The usual way around this
is to use "None" as the default and to test for it in the body of the function.
"""
PASSAGE_BITS_PER_BYTE = 1.4  # the shipped weights: 1.29


def inputs(batch=2, time=37, heads=4, headdim=8, groups=2, dstate=6, dtype=torch.float64, seed=0):
    make = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=make, dtype=dtype)

    x, B, C = (
        normal(batch, time, heads, headdim),
        normal(batch, time, groups, dstate),
        normal(batch, time, groups, dstate),
    )
    dt = F.softplus(normal(batch, time, heads) - 1)
    return x, dt, -torch.exp(normal(heads)), B, C, normal(heads), normal(batch, heads, headdim, dstate)


def double_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, out):
    """The state update in float64, which the operator does not take."""
    repeat = x.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(repeat, 1)[:, :, None], C.repeat_interleave(repeat, 1)[:, :, None]
    assert (
        dt_softplus
        and z is None
        and (dt.stride(2), A.stride()[1:], D.stride(1), dt_bias.stride(1)) == (0, (0, 0), 0, 0)
    )
    step = F.softplus(dt + dt_bias)[..., None]
    new = torch.exp(A * step) * state[state_batch_indices] + step * x[..., None] * B
    state[state_batch_indices] = new
    return out.copy_((new * C).sum(-1) + D * x)


# ----------------------------------------------------------------------------------------------------------------- scan
@pytest.mark.parametrize("time", [1, 7, 8, 37])
@pytest.mark.parametrize("chunk", [1, 8, 64])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_chunks_equal_the_recurrence(time, chunk, groups):
    x, dt, A, B, C, D, state = inputs(time=time, groups=groups)
    for start in (None, state):
        expected, last = recurrence(x, dt, A, B, C, D, start)
        y, end = chunked_scan(x, dt, A, B, C, D, start, chunk)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(end, last, rtol=1e-10, atol=1e-10)


def test_chunks_equal_the_recurrence_in_float32_with_strong_decay():
    x, dt, A, B, C, D, state = inputs(time=200)
    expected, last = recurrence(x, 20 * dt, A, B, C, D, state)
    y, end = chunked_scan(*(v.float() for v in (x, 20 * dt, A, B, C, D, state)), chunk=32)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(end.double(), last, rtol=1e-4, atol=1e-3)


def test_gradients_of_chunks_equal_those_of_the_recurrence():
    def gradients(scan, **options):
        values = [value.requires_grad_() for value in inputs(time=11)]
        y, end = scan(*values, **options)
        (y.square().sum() + end.square().sum()).backward()
        return [value.grad for value in values]

    for got, expected in zip(gradients(chunked_scan, chunk=4), gradients(recurrence), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_a_scan_in_two_parts_is_the_scan():
    x, dt, A, B, C, D, state = inputs(time=20)
    whole, last = chunked_scan(x, dt, A, B, C, D, state, 8)
    first, middle = chunked_scan(x[:, :13], dt[:, :13], A, B[:, :13], C[:, :13], D, state, 8)
    second, end = chunked_scan(x[:, 13:], dt[:, 13:], A, B[:, 13:], C[:, 13:], D, middle, 8)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)


def test_chunk_must_be_positive():
    with pytest.raises(ValueError, match="chunk"):
        chunked_scan(*inputs(), chunk=0)


# ------------------------------------------------------------------------------------------------------------ tokenizer
def test_tokenizer_gives_back_any_bytes(shipped):
    _, tokenizer = shipped
    draw = random.Random(0)
    samples = [bytes(draw.randrange(256) for _ in range(draw.randrange(200))) for _ in range(200)]
    samples += [
        b"",
        b" ",
        b"\n\n  x",
        b"a  b\n",
        "naïve — “quoted” 漢字 🙂".encode(),
        bytes(range(256)),
        PASSAGE.encode(),
    ]
    for data in samples:
        assert tokenizer.decode(tokenizer.encode(data)) == data
        assert b"".join(split_words(data)) == data


def test_tokenizer_takes_text_with_undecodable_bytes(shipped):
    _, tokenizer = shipped
    assert tokenizer.decode(tokenizer.encode("a\udcffb")) == b"a\xffb"


def test_merges_apply_in_their_order():
    th, the = 256, 257
    tokenizer = Tokenizer([(ord("t"), ord("h")), (th, ord("e")), (ord("h"), ord("e"))])
    assert tokenizer.encode("the he") == [the, ord(" "), 258]
    assert len(tokenizer) == 259


def test_a_merge_of_a_later_token_is_refused():
    with pytest.raises(ValueError, match="merges"):
        Tokenizer([(256, 97)])


# ---------------------------------------------------------------------------------------------------------------- model
@pytest.mark.parametrize("groups", [1, 2])
def test_prefill_and_steps_equal_the_whole_sequence(groups):
    model = small_model(ngroups=groups)
    tokens = torch.randint(50, (3, 23), generator=torch.Generator().manual_seed(0))
    expected = model(tokens, chunk=None)
    torch.testing.assert_close(model(tokens, chunk=8), expected, rtol=1e-9, atol=1e-9)
    for prompt in (1, 2, 17):
        cache = model.new_cache(slots=6)
        slots = torch.tensor([4, 0, 3])
        logits = [model.prefill(tokens[:, :prompt], cache, slots, chunk=8)]
        logits += [model.step(tokens[:, t], cache, slots, double_update) for t in range(prompt, 23)]
        torch.testing.assert_close(torch.stack(logits, 1), expected[:, prompt - 1 :], rtol=1e-9, atol=1e-9)
        for pool in (*cache.conv, *cache.ssm):
            assert not pool[[1, 2, 5]].any(), "a slot of nobody was written"


@pytest.mark.parametrize(
    ("state_dtype", "bound"), [(torch.float32, 1e-4), (torch.float16, 2e-2), (torch.bfloat16, 2e-1)]
)
def test_steps_through_the_operator_equal_the_whole_sequence(shipped, state_dtype, bound):
    model, tokenizer = shipped
    tokens = torch.tensor([tokenizer.encode(PASSAGE)[:48], tokenizer.encode(PASSAGE)[48:96]])
    expected = model(tokens)
    cache, slots = model.new_cache(slots=5, state_dtype=state_dtype), torch.tensor([3, 1])
    logits = [model.prefill(tokens[:, :30], cache, slots)]
    logits += [model.step(tokens[:, t], cache, slots) for t in range(30, 48)]
    assert cache.ssm[0].dtype == state_dtype
    difference = (torch.stack(logits, 1) - expected[:, 29:]).abs().max()
    assert difference <= bound * expected.abs().max()


@pytest.mark.parametrize("slots", [[0], [0, 0], [0, 6], [-1, 0]])
def test_slots_are_checked(slots):
    model = small_model()
    with pytest.raises(ValueError, match="slots"):
        model.step(torch.tensor([1, 2]), model.new_cache(6), torch.tensor(slots), double_update)


@pytest.mark.parametrize("sizes", [{"headdim": 7}, {"ngroups": 3}, {"conv": 1}, {"layers": 0}, {"vocab": 2.5}])
def test_sizes_are_checked(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        ModelConfig(**{"vocab": 50, **sizes})


# -------------------------------------------------------------------------------------------------------------- weights
def test_shipped_weights_are_small_and_known_to_be_finite(shipped):
    model, tokenizer = shipped
    assert sum(path.stat().st_size for path in weights.DIRECTORY.iterdir()) <= 4_000_000
    assert len(tokenizer) == model.config.vocab
    assert all(torch.isfinite(value).all() for value in model.parameters())


def test_shipped_weights_predict_text(shipped):
    model, tokenizer = shipped
    text = "\n\n" + PASSAGE.strip().replace("\n\n", "\0").replace("\n", " ").replace("\0", "\n\n")
    tokens = torch.tensor([tokenizer.encode(text)])
    nats = F.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:], reduction="sum")
    assert nats / math.log(2) / len(text) <= PASSAGE_BITS_PER_BYTE


def test_weights_come_back_as_saved(tmp_path):
    model = small_model(torch.float32, vocab=257)
    weights.save(tmp_path, model, Tokenizer([(97, 98)]), dtype=torch.float32)
    again, tokenizer = weights.load(tmp_path)
    assert again.config == model.config and tokenizer.merges == [(97, 98)]
    for (name, value), (_, expected) in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(value, expected), name


def test_damaged_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no model\.json"):
        weights.load(tmp_path)
    weights.save(tmp_path, small_model(torch.float32, vocab=256), Tokenizer([]))
    (tmp_path / weights.WEIGHTS_FILE).write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="damaged"):
        weights.load(tmp_path)
    weights.save(tmp_path, small_model(torch.float32, vocab=256, layers=1), Tokenizer([]))
    content = json.loads((tmp_path / weights.CONFIG_FILE).read_text())
    content["merges"] = [[97, 98]]
    (tmp_path / weights.CONFIG_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="256 tokens, its tokenizer 257"):
        weights.load(tmp_path)


# ---------------------------------------------------------------------------------------------------- sampling and loop
@pytest.mark.parametrize("options", [{"temperature": -1}, {"temperature": math.nan}, {"floor": 2}, {"seed": -1}])
def test_sampling_options_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampler(**options)


def test_generation_is_exact_against_a_double_model():
    model = small_model()
    generation = Generation(model, [1, 2, 3], 12, Sampler(0.8, 1), torch.float64, update=double_update)
    assert list(generation.run()) == generation.generated and len(generation.generated) == 12
    assert generation.ssm_deviation().difference < 1e-12 < generation.ssm_deviation().largest
    assert generation.logits_deviation().difference < 1e-12 < generation.logits_deviation().largest


def test_a_wrong_update_is_seen():
    def wrong(*values, out, **options):
        double_update(*values, out=out, **options)
        return out.mul_(1.5)

    generation = Generation(small_model(), [1, 2, 3], 5, Sampler(), torch.float64, update=wrong)
    list(generation.run())
    assert generation.ssm_deviation().difference > 1e-5
    assert generation.logits_deviation().difference > 1e-5
    assert math.isnan(Deviation.of(torch.tensor([math.nan, 1.0]), torch.zeros(2)).difference)


def test_the_warm_up_changes_nothing(shipped):
    model, tokenizer = shipped
    texts = []
    for warm in (False, True):
        generation = Generation(model, tokenizer.encode("A class"), 5, Sampler())
        if warm:
            assert generation.warm_up() > 0
        texts.append(list(generation.run()))
    assert texts[0] == texts[1]


# --------------------------------------------------------------------------------------------------------- command line
def test_demo_prints_text_and_table(capsys):
    words = ("--backend", "reference", "--prompt", "The import statement", "--tokens", "40")
    outputs = []
    for _ in range(2):
        assert cli.main(arguments(*words)) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        outputs.append(captured.out)
    text = [output.split("\n\n---")[0] for output in outputs]
    assert text[0] == text[1] and text[0].startswith("The import statement") and len(text[0]) > 80
    rows = dict(line.split("  ", 1) for line in outputs[0].splitlines() if line[:1].isalpha() and "  " in line)
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["backend"] == "reference" and rows["kernel"] == "reference (PyTorch)" and rows["tokens"] == "40"
    for name in ("update error", "logits error"):
        assert 0 < float(rows[name].split()[0]) < 1e-2
    assert re.match(r"\d+, \d\.\d\d of 4 tokens accepted", rows["steps"]) and "MB saved" in rows["state writes"]
    assert re.match(r"\d+ of 40, with a margin within 0.02", rows["close choices"])


def test_seed_and_temperature_change_the_text(capsys):
    def text(*words):
        assert cli.main(arguments("--backend", "reference", "--tokens", "30", *words)) == 0
        return capsys.readouterr().out.split("\n\n---")[0]

    hot = ("--temperature", "1", "--seed")
    assert text(*hot, "1") == text(*hot, "1") != text(*hot, "2")


def test_demo_takes_narrow_states(capsys):
    assert cli.main(arguments("--backend", "reference", "--tokens", "3", "--state-dtype", "float16")) == 0
    assert "float16, slot" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompt", ""), "prompt: expected a non-empty text"),
        (("--tokens", "0"), "tokens: expected a number from 1"),
        (("--tokens", "-3"), "tokens: expected a number from 1"),
        (("--tokens", "1000000"), "tokens: expected a number from 1"),
        (("--temperature", "-1"), "temperature: expected"),
        (("--temperature", "nan"), "temperature: expected"),
        (("--seed", "-1"), "seed: expected"),
        (("--draft", "-1"), "draft: expected a number from 0 to 15"),
        (("--draft", "16"), "draft: expected a number from 0 to 15"),
        (("--plot", "a.pdf"), "plot: expected a name that ends in .png"),
        (("--plot", "/no/such/folder/a.png"), "plot: expected a file in a folder that exists"),
    ],
)
def test_bad_input_ends_with_a_message_and_code_2(words, message, capsys):
    assert cli.main(arguments("--backend", "reference", *words)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"demo: {message}") and captured.err.count("\n") == 1


@pytest.mark.parametrize("words", [("--tokens", "many"), ("--backend", "tpu"), ("--state-dtype", "int8")])
def test_what_argparse_refuses_ends_with_code_2(words):
    with pytest.raises(SystemExit) as stopped:
        arguments(*words)
    assert stopped.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_cuda_without_a_gpu_is_an_error(capsys):
    assert cli.main(arguments("--backend", "cuda")) == 2
    assert "--backend emulate" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_auto_without_a_gpu_is_the_reference(capsys):
    assert cli.main(arguments("--tokens", "1")) == 0
    assert "reference (PyTorch)" in capsys.readouterr().out


@pytest.mark.parametrize("draft", ["0", "3"])
def test_the_prompt_comes_before_anything_that_takes_long(draft, capsys, monkeypatch):
    """As soon as the model is loaded: drafts are not prepared yet, and nothing has run or been compiled."""

    def stop(*_, **__):
        raise ValueError("the model runs")

    monkeypatch.setattr(LanguageModel, "forward", stop)
    monkeypatch.setattr(LanguageModel, "step", stop)
    assert cli.main(arguments("--backend", "reference", "--prompt", "A class", "--draft", draft)) == 2
    captured = capsys.readouterr()
    assert captured.out == "A class\n" and captured.err == "demo: the model runs\n"


@pytest.mark.parametrize(("cached", "said"), [("1", "loaded from the cache"), ("0", "because of CUTE_SSM_CACHE=0")])
def test_a_kernel_that_is_awaited_is_named(cached, said, capsys, monkeypatch, settings):
    settings(CACHE=cached)
    monkeypatch.setattr(LanguageModel, "forward", lambda *_, **__: pytest.fail("announced too late"))
    monkeypatch.setattr(report.Screen, "text", lambda *_: (_ for _ in ()).throw(ValueError("stop here")))
    assert cli.main(arguments("--backend", "emulate")) == 2
    announced = capsys.readouterr().err.splitlines()[0]
    assert announced.startswith("demo: preparing CheckpointingSSU for sm_90a: compiled ") and said in announced


@pytest.mark.wide
def test_emulated_kernel_generates_the_text_of_the_reference(capsys):
    pytest.importorskip("cutlass")
    pytest.importorskip("ptxsim")
    outputs = []
    for words in (("emulate",), ("emulate", "--draft", "0"), ("reference",), ("reference", "--draft", "0")):
        assert cli.main(arguments("--backend", *words, "--tokens", "6")) == 0
        outputs.append(capsys.readouterr().out)
    several, one, *reference = outputs
    assert len({output.split("\n\n---")[0] for output in outputs}) == 1
    assert "SelectiveStep" in one and "sm_90a" in one and "(28 launches)" in one
    steps = int(re.search(r"steps +(\d+),", several).group(1))
    assert "checkpointing_ssu" in several and f"({4 * steps + 4} launches, {6 * steps + 6} in all)" in several
    assert all("reference (PyTorch)" not in output for output in (several, one))
    assert all("SelectiveStep" not in output and "kernels" not in output for output in reference)


def test_an_interrupt_keeps_what_was_generated(capsys, monkeypatch):
    step, calls = LanguageModel.step, []

    def interrupted_at_the_fourth_token(self, tokens, cache, slots, update=None):
        calls.append(None)
        if len(calls) < 5:
            return step(self, tokens, cache, slots, update)

        def stop(*values, **options):
            raise KeyboardInterrupt

        update.update = stop  # inside a layer, when its inputs are recorded and its outputs are not
        return step(self, tokens, cache, slots, update)

    monkeypatch.setattr(LanguageModel, "step", interrupted_at_the_fourth_token)
    assert cli.main(arguments("--backend", "reference", "--tokens", "50", "--draft", "0")) == 130
    assert re.search(r"^tokens +3$", capsys.readouterr().out, re.M)


def test_an_interrupt_within_a_step_of_several_tokens_keeps_the_steps_before(capsys, monkeypatch):
    operator, calls = cute_ssm.checkpointing_ssu, []

    def interrupted_in_the_second_layer_of_the_third_step(**call):
        calls.append(None)
        if len(calls) == 4 * 3 + 2:  # a step to warm up, and two whole ones
            raise KeyboardInterrupt
        return operator(**call)

    monkeypatch.setattr(cute_ssm, "checkpointing_ssu", interrupted_in_the_second_layer_of_the_third_step)
    assert cli.main(arguments("--backend", "reference", "--tokens", "50")) == 130
    rows = capsys.readouterr().out
    assert re.search(r"^steps +2, ", rows, re.M) and "nan" not in rows


def test_the_command_line_is_there_without_torch():
    code = "import sys, cute_ssm.demo.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_reader_that_leaves_is_no_error():
    command = [sys.executable, "-c", "import sys; from cute_ssm.__main__ import main; sys.exit(main())"]
    command += ["demo", "--backend", "reference", "--tokens", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


# --------------------------------------------------------------------------------------------------------------- report
class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_no_bar_and_no_wrapping_off_a_terminal():
    out, err = io.StringIO(), io.StringIO()
    screen = report.Screen(out, err, 10)
    screen.text("word " * 100)
    screen.progress(5, 1.0)
    screen.close()
    assert out.getvalue() == "word " * 100 + "\n" and err.getvalue() == ""


def test_bar_on_a_terminal():
    out, err = io.StringIO(), Terminal()
    screen = report.Screen(out, err, 10)
    screen.progress(5, 2.0)
    screen.close()
    assert "############............] 5/10  2.5 tokens/s" in err.getvalue()
    assert err.getvalue().endswith("\r\x1b[J")


def test_text_on_a_terminal_is_broken_between_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "31")
    out = Terminal()
    screen = report.Screen(out, io.StringIO(), 10)
    for piece in ("   an inde", "nted line that", " is too long\n\nx ", "y" * 70, " end"):
        screen.text(piece)
    screen.close()
    assert out.getvalue().splitlines() == [
        "   an indented line that is",
        "   too long",
        "",
        "x",
        "y" * 30,
        "y" * 30,
        "y" * 10 + " end",
    ]


def test_table():
    assert report.table([("a", "1"), ("name", "value")]) == "-----------\na     1\nname  value\n-----------"


# ------------------------------------------------------------------------------------------------------------- training
@pytest.fixture(scope="module")
def train():
    path = ROOT / "tools" / "train_demo.py"
    if not path.is_file():
        pytest.skip("the tools are not installed")
    spec = importlib.util.spec_from_file_location("train_demo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lines_are_joined_only_where_they_were_wrapped(train):
    assert train.unwrap(f"{'x' * 60} {'y' * 8}\nnext line\nand on") == f"{'x' * 60} {'y' * 8} next line\nand on"
    bullet = f"* {'x' * 66}\n  next\n* other"
    assert train.unwrap(bullet) == f"* {'x' * 66} next\n* other"
    for kept in ("short\nnext", f"{'x' * 66}\n  indented", f"{'x' * 69}\n{'=' * 69}", f">>> {'x' * 66}\nTrue"):
        assert train.unwrap(kept) == kept


def test_sections_hold_every_long_paragraph_once(train):
    long = [f"paragraph {index} " + "word " * 20 for index in range(40)]
    sections = train.prepare({"b": "\n\n".join(long), "a": "\n\n".join(long[:20])}, size=500)
    text = "\n\n".join(sections)
    assert all(text.count(f"paragraph {index} ") == 1 for index in range(40))


def test_merges_join_the_most_frequent_pairs(train):
    assert train.learn_merges("abc abc abd", 2) == [(ord("a"), ord("b")), (ord(" "), 256)]  # of two equals the first
    with pytest.raises(ValueError, match="count"):
        train.learn_merges("abc abc abd", 3)


def test_left_out_merges_give_other_tokens_of_the_same_text(train, shipped):
    _, tokenizer = shipped
    segment = train.Resegmenter(tokenizer, PASSAGE, 0.2, seed=0)
    first, second = segment.encode(0).tolist(), segment.encode(1).tolist()
    assert first != second and first == segment.encode(0).tolist()
    assert tokenizer.decode(first) == tokenizer.decode(second) == PASSAGE.encode()
    assert train.Resegmenter(tokenizer, PASSAGE, 0.0, seed=0).encode(0).tolist() == tokenizer.encode(PASSAGE)


def test_the_committed_result_is_that_of_the_shipped_weights(train, shipped):
    from pydoc_data.topics import topics

    result = json.loads((train.ROOT / "tools" / "train_demo_result.json").read_text())
    content = (weights.DIRECTORY / weights.WEIGHTS_FILE).read_bytes()
    assert result["weights_sha256"] == hashlib.sha256(content).hexdigest()
    assert result["weights_bytes"] == len(content)
    held_out = train.prepare(topics)[10::20]
    if sum(len(section.encode()) for section in held_out) == result["held_out_bytes"]:  # the same version of the text
        assert train.bits_per_byte(*shipped, held_out) == pytest.approx(result["held_out_bits_per_byte"], abs=1e-3)


def test_training_goes_on_from_its_checkpoint_as_if_never_stopped(train, tmp_path, monkeypatch):
    import pydoc_data.topics

    names = ("compound", "import", "strings")
    monkeypatch.setattr(pydoc_data.topics, "topics", {name: pydoc_data.topics.topics[name] for name in names})
    sizes = ["--steps=6", "--report-every=3", "--vocab=300", "--layers=1", "--width=64", "--dstate=16", "--batch=2"]
    sizes.append("--length=32")

    def run(name):
        folder = tmp_path / name
        paths = ["--checkpoint", f"{folder}.pt", "--out", str(folder), "--result", f"{folder}.json"]
        torch.manual_seed(hash(name) % 1000)
        assert train.main([*sizes, *paths]) == 0
        return weights.load(folder)[0].state_dict(), json.loads(Path(f"{folder}.json").read_text())

    threads = torch.get_num_threads()
    try:
        whole, result = run("whole")
        measure, calls = train.bits_per_byte, []

        def stop_at_the_second_report(*values):
            calls.append(None)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return measure(*values)

        monkeypatch.setattr(train, "bits_per_byte", stop_at_the_second_report)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
        monkeypatch.setattr(train, "bits_per_byte", measure)
        resumed, again = run("stopped")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert again["held_out_bits_per_byte"] == result["held_out_bits_per_byte"] > 0
    assert result["history"][-1]["step"] == 6 and result["history"][-1]["loss"] < result["history"][0]["loss"]
