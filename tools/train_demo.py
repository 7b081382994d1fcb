"""Train the language model of the demo on the help topics that every Python installation carries.

One command makes ``cute_ssm/demo/weights`` and ``tools/train_demo_result.json``::

    python tools/train_demo.py

It runs on the CPU, on one thread unless told otherwise, and goes on from its checkpoint (``--checkpoint``) when it was
stopped. The text is `pydoc_data.topics`: each paragraph once, lines joined that were only broken to fit 70 columns,
tables left out. Every 20th section of about 1500 bytes is held out of the training and of the vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cute_ssm.demo import weights
from cute_ssm.demo.model import LanguageModel, ModelConfig
from cute_ssm.demo.tokenizer import Tokenizer, split_words

ROOT = Path(__file__).resolve().parent.parent
_QUOTES = str.maketrans(
    {"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2026": "...", "\u2013": "-", "\u2014": "-"}
)
_BULLET = re.compile(r"(\*|-|\d+\.|\[\d+\])\s+")
_WRAP = 70


def unwrap(paragraph: str) -> str:
    """Join the lines of a paragraph that were broken only because the next word did not fit into 70 columns."""
    if ">>>" in paragraph or "::=" in paragraph:
        return paragraph
    joined: list[str] = []
    previous = ""
    for line in paragraph.split("\n"):
        text = line.lstrip()
        indent = len(line) - len(text)
        body = previous.lstrip()
        start = len(previous) - len(body)
        bullet = _BULLET.match(body)
        hanging = {start, start + bullet.end()} if bullet else {start}
        first = text.split(" ", 1)[0]
        broken = len(previous) + 1 + len(first) > _WRAP and indent in hanging and re.search(r"\w", text) is not None
        if joined and broken and not _BULLET.match(text):
            joined[-1] += " " + text
            # a later line of a bullet hangs below its text, not below its mark
            previous = " " * indent + "x" * (len(line) - indent)
        else:
            joined.append(line)
            previous = line
    return "\n".join(joined)


def prepare(topics: Mapping[str, str], size: int = 1500) -> list[str]:
    """Turn help topics into sections of about `size` bytes in which no paragraph of 40 bytes or more occurs twice."""
    seen: set[str] = set()
    sections: list[str] = []
    for name in sorted(topics, key=lambda key: (-len(topics[key]), key)):
        current: list[str] = []
        for raw in re.split(r"\n\s*\n", topics[name].translate(_QUOTES).strip("\n")):
            lines = [line.rstrip() for line in raw.split("\n") if not re.match(r"\s*[+|]", line)]
            paragraph = unwrap("\n".join(lines))
            if not paragraph.strip() or (len(paragraph) >= 40 and paragraph in seen):
                continue
            seen.add(paragraph)
            current.append(paragraph)
            if sum(map(len, current)) >= size:
                sections.append("\n\n".join(current))
                current = []
        if sum(map(len, current)) >= 200:
            sections.append("\n\n".join(current))
    return sections


def learn_merges(text: str, count: int) -> list[tuple[int, int]]:
    """Learn `count` byte-pair merges: each time the most frequent pair inside words, the lowest among equals."""
    words = Counter(split_words(text.encode()))
    sequences = [list(word) for word in words]
    weight = list(words.values())
    pairs: Counter[tuple[int, int]] = Counter()
    where: dict[tuple[int, int], set[int]] = {}

    def account(index: int, sign: int) -> None:
        sequence = sequences[index]
        for pair in pairwise(sequence):
            pairs[pair] += sign * weight[index]
            where.setdefault(pair, set()).add(index)

    for index in range(len(sequences)):
        account(index, 1)
    merges: list[tuple[int, int]] = []
    for token in range(256, 256 + count):
        best = max(pairs, key=lambda pair: (pairs[pair], (-pair[0], -pair[1])))
        if pairs[best] < 2:
            raise ValueError(f"count: the text yields only {len(merges)} merges, not {count}")
        merges.append(best)
        for index in sorted(where.pop(best)):
            account(index, -1)
            old, new = sequences[index], []
            position = 0
            while position < len(old):
                if tuple(old[position : position + 2]) == best:
                    new.append(token)
                    position += 2
                else:
                    new.append(old[position])
                    position += 1
            sequences[index] = new
            account(index, 1)
        del pairs[best]
    return merges


class Resegmenter:
    """Encodes a text differently each time, by leaving out merges at random (BPE dropout, Provilkov et al. 2020).

    The text is small and would be learnt by heart after a few passes; this makes it a larger one.

    Parameters
    ----------
    tokenizer : Tokenizer
        Whose merges are used.
    text : str
        The text.
    dropout : float
        Probability of leaving a merge out.
    seed : int
        Seed of the choices.
    variants : int
        Segmentations drawn of each word; a pass over the text chooses among them.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, dropout: float, seed: int, variants: int = 16) -> None:
        rank = {pair: 256 + index for index, pair in enumerate(tokenizer.merges)}
        draw = random.Random(seed)
        self._seed = seed
        self._words = split_words(text.encode())
        self._variants = {
            word: [_segment(word, rank, dropout, draw) for _ in range(variants)] for word in sorted(set(self._words))
        }

    def encode(self, number: int) -> Tensor:
        """Return the tokens of a pass over the text, always the same for one `number`."""
        choose = random.Random(f"{self._seed} {number}").choice
        return torch.tensor([token for word in self._words for token in choose(self._variants[word])])


def _segment(word: bytes, rank: Mapping[tuple[int, int], int], dropout: float, draw: random.Random) -> list[int]:
    """Merge the bytes of a word, each time the pair of lowest rank among those that are not left out."""
    tokens = list(word)
    while True:
        known = [(rank[pair], index) for index, pair in enumerate(pairwise(tokens)) if pair in rank]
        kept = [entry for entry in known if draw.random() >= dropout]
        if not kept:
            return tokens
        token, index = min(kept)
        tokens[index : index + 2] = [token]


@torch.no_grad()
def bits_per_byte(model: LanguageModel, tokenizer: Tokenizer, sections: Sequence[str]) -> float:
    """Mean cost of a byte of the sections, each read from an empty state after a blank line."""
    was_training = model.training
    model.eval()
    start = tokenizer.encode("\n\n")
    nats, size = 0.0, 0
    for section in sections:
        tokens = torch.tensor(start + tokenizer.encode(section.lstrip()))
        logits = model(tokens[None, :-1])[0, len(start) - 1 :]
        nats += float(F.cross_entropy(logits.float(), tokens[len(start) :], reduction="sum"))
        size += len(section.lstrip().encode())
    model.train(was_training)
    return nats / math.log(2) / size


def optimizer_of(model: LanguageModel, decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices alone."""
    matrices = [p for p in model.parameters() if p.ndim == 2 and min(p.shape) > 8]
    others = [p for p in model.parameters() if not (p.ndim == 2 and min(p.shape) > 8)]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Learning rate: linear warm-up, then half a cosine down to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5600)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--decay", type=float, default=0.2, help="weight decay")
    parser.add_argument("--dropout", type=float, default=0.15)
    parser.add_argument("--merge-dropout", type=float, default=0.1, help="merges left out of the training text")
    parser.add_argument("--plain", type=float, default=0.25, help="last part of the steps, which leave no merge out")
    parser.add_argument("--vocab", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dstate", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of the matrix products"
    )
    parser.add_argument("--report-every", type=int, default=400)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "build" / "train_demo.pt")
    parser.add_argument("--out", type=Path, default=weights.DIRECTORY)
    parser.add_argument("--result", type=Path, default=ROOT / "tools" / "train_demo_result.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train, save, report."""
    args = build_parser().parse_args(argv)
    from pydoc_data.topics import topics

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    sections = prepare(topics)
    held_out = sections[10::20]
    training = [section for index, section in enumerate(sections) if index % 20 != 10]
    text = "\n\n".join(training)
    tokenizer = Tokenizer(learn_merges(text, args.vocab - 256))
    plain = torch.tensor(tokenizer.encode(text))
    resegmenter = Resegmenter(tokenizer, text, args.merge_dropout, args.seed)
    sizes = {
        "training_bytes": len(text.encode()),
        "training_tokens": len(plain),
        "held_out_bytes": sum(len(section.encode()) for section in held_out),
    }
    print(json.dumps(sizes), flush=True)

    config = ModelConfig(vocab=args.vocab, layers=args.layers, width=args.width, dstate=args.dstate)
    model = LanguageModel(config, dropout=args.dropout).train()
    model.reset_parameters()
    optimizer = optimizer_of(model, args.decay)
    generator = torch.Generator().manual_seed(args.seed)
    options = {key: value for key, value in sorted(vars(args).items()) if not isinstance(value, Path)}
    first, seconds, history = 0, 0.0, []
    if args.checkpoint.is_file():
        saved: dict[str, Any] = torch.load(args.checkpoint, weights_only=True)
        if saved["options"] != options:
            raise SystemExit(
                f"{args.checkpoint} is of a run with other options; remove it or name another --checkpoint"
            )
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        torch.set_rng_state(saved["dropout"])
        first, seconds, history = saved["step"], saved["seconds"], saved["history"]
        print(f"going on from step {first}", flush=True)

    begin = time.monotonic() - seconds
    running = torch.zeros(())
    per_pass = max(1, len(plain) // (args.batch * args.length))
    plain_from = round(args.steps * (1 - args.plain))
    for step in range(first, args.steps):
        if step >= plain_from:
            stream = plain
        elif step % per_pass == 0 or step == first:
            stream = resegmenter.encode(step // per_pass)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args.steps, args.rate)
        starts = torch.randint(len(stream) - args.length, (args.batch,), generator=generator)
        window = stream[starts[:, None] + torch.arange(args.length + 1)]
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bfloat16"):
            logits = model(window[:, :-1], chunk=64)
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += loss.detach()
        if (step + 1) % args.report_every == 0 or step + 1 == args.steps:
            seconds = time.monotonic() - begin
            count = (step % args.report_every) + 1
            entry = {
                "step": step + 1,
                "seconds": round(seconds, 1),
                "loss": round(float(running) / count, 4),
                "held_out_bits_per_byte": round(bits_per_byte(model, tokenizer, held_out), 4),
            }
            running.zero_()
            history.append(entry)
            print(json.dumps(entry), flush=True)
            state = {
                "options": options,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(),
                "dropout": torch.get_rng_state(),
                "step": step + 1,
                "seconds": seconds,
                "history": history,
            }
            args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            partial = args.checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(args.checkpoint)

    weights.save(args.out, model, tokenizer)
    shipped, tokenizer = weights.load(args.out)
    result = {
        "method": "bits per byte of the saved bfloat16 weights, computed in float32, each section read from an empty "
        "state after a blank line; of the training text every tenth section",
        "train_bits_per_byte": round(bits_per_byte(shipped, tokenizer, training[::10]), 4),
        "held_out_bits_per_byte": round(bits_per_byte(shipped, tokenizer, held_out), 4),
        "parameters": sum(p.numel() for p in shipped.parameters()),
        "weights_bytes": (args.out / weights.WEIGHTS_FILE).stat().st_size,
        "weights_sha256": hashlib.sha256((args.out / weights.WEIGHTS_FILE).read_bytes()).hexdigest(),
        "seconds": round(seconds, 1),
        **sizes,
        "options": options,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "history": history,
    }
    args.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "history"}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
