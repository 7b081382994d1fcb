"""``python -m cute_ssm demo``: generate text with a small Mamba-2 model.

By default a step verifies several drafted tokens with :func:`cute_ssm.checkpointing_ssu`; with ``--draft 0`` it
generates one token with :func:`cute_ssm.selective_state_update`.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cute_ssm.demo import DRAFT
from cute_ssm.env import settings
from cute_ssm.errors import CuteSsmError, UnsupportedArchError, describe
from cute_ssm.runtime.companions import require

if TYPE_CHECKING:
    import torch

    from cute_ssm.demo.loop import Deviation, Run
    from cute_ssm.demo.model import LanguageModel
    from cute_ssm.demo.speculation import Speculation

__all__ = ["add_arguments", "main"]

BACKENDS = ("auto", "reference", "emulate", "cuda")
STATE_DTYPES = ("float32", "float16", "bfloat16")
PROMPT = "The import statement"
TOKENS = {"reference": 200, "emulate": 100, "cuda": 200}
MAX_TOKENS = 10_000
MOST_DRAFT = 15
TEMPERATURE = 0.5
EMULATED_ARCH = "sm_90a"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the demo on a parser."""
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help=f"text to continue (default: {PROMPT!r})")
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help=f"tokens to generate (default: {TOKENS['reference']}, with --backend emulate {TOKENS['emulate']})",
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="where state updates run: the compiled kernel on a GPU, the same kernel in the emulator, or the PyTorch "
        "reference (default: auto, a supported GPU if there is one, else the reference)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=TEMPERATURE,
        help=f"sampling temperature; 0 takes the most likely token (default: {TEMPERATURE})",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    parser.add_argument(
        "--state-dtype",
        choices=STATE_DTYPES,
        default="float32",
        help="dtype of the stored states (default: float32)",
    )
    parser.add_argument(
        "--draft",
        type=int,
        default=DRAFT,
        metavar="N",
        help=f"drafted tokens per step; 0 generates token by token, which gives the same text (default: {DRAFT})",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot accepted tokens and written bytes per step")


def main(args: argparse.Namespace) -> int:
    """Run the demo and return its exit code: 0, 2 for an error, 130 after an interrupt."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the model may generate what the terminal cannot encode
    try:
        return _run(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, ImportError, CuteSsmError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2


@dataclass
class _Backend:
    """The selected backend, and the rows of the final table that describe it."""

    name: str
    device: str
    session: Any = None
    arch: str = ""

    def announce(self, speculative: bool) -> None:
        """Print that a kernel may have to be compiled before the first token."""
        if self.name == "reference":
            return
        kernel = _kernel_path(speculative).partition(":")[2]
        once = "compiled once (about 10 s), later loaded from the cache"
        if settings().cache_dir is None:
            once = "compiled in every process (about 10 s) because of CUTE_SSM_CACHE=0"
        print(f"demo: preparing {kernel} for {self.arch}: {once}", file=sys.stderr, flush=True)

    def rows(self, speculative: bool) -> list[tuple[str, str]]:
        """Return the rows that say what updated the states."""
        if self.name == "reference":
            return [("backend", self.name), ("kernel", "reference (PyTorch)")]
        module, _, kernel = _kernel_path(speculative).partition(":")
        if self.name == "cuda":
            return [("backend", self.name), ("kernel", kernel), ("compiled for", self.arch)]
        # a compiled kernel's name is its module and class, then the object's address and the argument types
        names = [launch.program.kernel.name.partition("_object_at")[0] for launch in self.session.launches]
        found = [name for name in names if module.replace(".", "") in name]
        if not found:
            raise CuteSsmError(f"{kernel} was not launched in the emulator: something else updated the states")
        launches = f"{len(found)} launches" + (f", {len(names)} in all" if len(names) > len(found) else "")
        where = f"{self.arch}, run on this CPU by the emulator ptxsim ({launches})"
        return [("backend", self.name), ("kernel", found[-1]), ("compiled for", where)]


def _kernel_path(speculative: bool) -> str:
    from cute_ssm.ops.checkpointing_ssu.spec import CheckpointingSSUSpec
    from cute_ssm.ops.selective_state_update.spec import SelectiveStateUpdateSpec
    from cute_ssm.runtime.registry import KERNELS

    return KERNELS[CheckpointingSSUSpec if speculative else SelectiveStateUpdateSpec]


@contextlib.contextmanager
def _backend(name: str) -> Iterator[_Backend]:
    """Select what runs the state updates, and open an emulator session for ``emulate``."""
    import torch

    from cute_ssm import arch as archs

    if name in ("auto", "cuda"):
        if torch.cuda.is_available():
            try:
                found = archs.of_device(torch.device("cuda"))
            except UnsupportedArchError:
                if name == "cuda":
                    raise
            else:
                device = torch.cuda.get_device_name()
                yield _Backend("cuda", "cuda", arch=f"{found.name} ({device})")
                return
        elif name == "cuda":
            fix = "use --backend emulate to run the same kernel without a GPU, or --backend reference for PyTorch"
            raise ValueError(describe("backend", "a GPU for 'cuda'", "none that PyTorch finds", fix))
        name = "reference"
    if name == "reference":
        yield _Backend("reference", "cpu")
        return
    try:
        ptxsim = require("ptxsim")
    except ImportError as error:
        raise ImportError(f"backend: the emulator cannot be loaded: {error}") from error
    with ptxsim.emulate(arch=EMULATED_ARCH) as session:
        yield _Backend("emulate", "cpu", session=session, arch=EMULATED_ARCH)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Limit PyTorch to one thread: the products of one token are too small to gain from several."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(args: argparse.Namespace) -> int:
    _check(args)

    import torch

    from cute_ssm.demo import report, weights
    from cute_ssm.demo.loop import Generation
    from cute_ssm.demo.sampling import Sampler
    from cute_ssm.demo.speculation import Speculation

    if args.plot is not None:
        report.pyplot()  # report a missing matplotlib before generating
    sampler = Sampler(args.temperature, args.seed)
    state_dtype: torch.dtype = getattr(torch, args.state_dtype)
    with _one_thread(), _backend(args.backend) as backend:
        model, tokenizer = weights.load(device=backend.device)
        count = args.tokens or TOKENS[backend.name]
        prompt = tokenizer.encode(args.prompt)
        backend.announce(bool(args.draft))
        screen = report.Screen(sys.stdout, sys.stderr, count)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        interrupted, first = False, 0.0
        run: Run | None = None
        try:
            screen.text(args.prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
            run = (
                Speculation(model, prompt, count, sampler, args.draft, state_dtype)
                if args.draft
                else Generation(model, prompt, count, sampler, state_dtype)
            )
            first = run.warm_up()
            for done, token in enumerate(run.run(), start=1):
                screen.text(decoder.decode(tokenizer.decode([token])))
                screen.progress(done, run.seconds)
            screen.text(decoder.decode(b"", final=True))
        except KeyboardInterrupt:
            interrupted = True
        finally:
            screen.close()
        if run is not None and run.generated:
            print()
            print(report.table(_rows(run, backend, first, args.state_dtype)))
        if args.plot is not None and run is not None and run.steps:
            title = _title(model, backend, args.state_dtype)
            report.save_plot(args.plot, run.steps, args.draft, run.state_bytes, title)
    return 130 if interrupted else 0


def _check(args: argparse.Namespace) -> None:
    """Check option values that argparse does not check."""
    if not args.prompt:
        raise ValueError(
            describe("prompt", "a non-empty text", repr(args.prompt), "the model needs a token to start from")
        )
    if args.tokens is not None and not 1 <= args.tokens <= MAX_TOKENS:
        raise ValueError(describe("tokens", f"a number from 1 to {MAX_TOKENS}", args.tokens))
    if not 0 <= args.draft <= MOST_DRAFT:
        raise ValueError(describe("draft", f"a number from 0 to {MOST_DRAFT}", args.draft))
    if args.plot is None:
        return
    if args.plot.suffix.lower() != ".png":
        raise ValueError(describe("plot", "a name that ends in .png", repr(str(args.plot))))
    if not args.plot.parent.is_dir():
        raise ValueError(describe("plot", "a file in a folder that exists", repr(str(args.plot))))


def _title(model: LanguageModel, backend: _Backend, state_dtype: str) -> str:
    """Return the title of the plot."""
    c, count = model.config, sum(value.numel() for value in model.parameters())
    where = f", {backend.arch}" if backend.arch else ""
    sizes = f"{c.layers} layers of {c.width}, {count / 1e6:.1f} M parameters"
    return f"Mamba-2 model of the demo ({sizes})\nbackend {backend.name}{where}; states in {state_dtype}"


def _rows(run: Run, backend: _Backend, first: float, state_dtype: str) -> list[tuple[str, str]]:
    from cute_ssm.demo.speculation import Speculation

    count, speculative = len(run.generated), isinstance(run, Speculation)
    logits = run.logits_deviation()
    tolerance = run.decisions.tolerance
    held = (
        ""
        if logits.difference <= tolerance
        else f": above the tolerance of {tolerance}, other backends may give another text"
    )
    return [
        *backend.rows(speculative),
        ("state", f"{state_dtype}, slot {run.slot} of {run.slots}"),
        ("first call", f"{first:.3f} s" + (", compilation included" if backend.name != "reference" else "")),
        ("prompt", f"{run.prompt_length} tokens, {run.prefill_seconds:.3f} s"),
        ("tokens", str(count)),
        *(_steps(run) if isinstance(run, Speculation) else ()),
        ("time", f"{run.seconds:.2f} s"),
        ("tokens/s", f"{count / run.seconds:.1f}"),
        ("update error", _error(run.ssm_deviation(), "recurrence")),
        ("logits error", _error(logits, "model") + held),
        (
            "close choices",
            f"{run.decisions.close} of {count}, with a margin within {tolerance}, decided in float64",
        ),
    ]


def _steps(run: Speculation) -> list[tuple[str, str]]:
    """Return the rows about speculation: steps, accepted tokens, state writes."""
    steps, size = len(run.steps), run.pool.state_bytes
    accepted = [step.accepted for step in run.steps]
    mean = f"{sum(accepted) / steps:.2f} of {run.pool.tokens} tokens accepted on average, {max(accepted)} at most"
    saved = f"{run.saved_bytes / 1e6:.1f} of {steps * size / 1e6:.1f} MB saved compared with a write in every step"
    return [
        ("steps", f"{steps}, {mean}"),
        ("state writes", f"in {run.writes} of {steps} steps: {saved}"),
    ]


def _error(deviation: Deviation, against: str) -> str:
    largest = f"values up to {deviation.largest:.1f}"
    return f"{deviation.difference:.1e} at most from the float64 {against} ({largest})"
