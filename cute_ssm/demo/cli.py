"""``python -m cute_ssm demo``: text from a small Mamba-2 model, through :func:`cute_ssm.selective_state_update`."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cute_ssm.errors import CuteSsmError, UnsupportedArchError, describe

if TYPE_CHECKING:
    import torch

    from cute_ssm.demo.loop import Deviation, Generation

__all__ = ["add_arguments", "main"]

BACKENDS = ("auto", "reference", "emulate", "cuda")
STATE_DTYPES = ("float32", "float16", "bfloat16")
PROMPT = "The import statement"
TOKENS = {"reference": 200, "emulate": 100, "cuda": 200}
MAX_TOKENS = 10_000
TEMPERATURE = 0.5
EMULATED_ARCH = "sm_90a"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the demo on a parser."""
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help=f"text to go on from (default: {PROMPT!r})")
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
        help="what updates the states: the kernel on a GPU, the same compiled kernel in the emulator, or PyTorch "
        "(default: auto, the GPU if it can run the kernel and PyTorch if not)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=TEMPERATURE,
        help=f"spread of the sampling; 0 takes the likeliest token (default: {TEMPERATURE})",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    parser.add_argument(
        "--state-dtype",
        choices=STATE_DTYPES,
        default="float32",
        help="type the states are stored in (default: float32)",
    )


def main(args: argparse.Namespace) -> int:
    """Run the demo and return an exit code: 0, 2 for input that cannot be served, 130 after an interrupt."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the model's text may hold what the terminal's encoding does not
    try:
        return _run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the reader has gone; keep the interpreter from complaining when it closes the stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, ImportError, CuteSsmError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2


@dataclass
class _Backend:
    """Where the model runs, and what the table says of it once it has."""

    name: str
    device: str
    session: Any = None
    arch: str = ""

    def rows(self) -> list[tuple[str, str]]:
        """Name what updated the states."""
        if self.name == "reference":
            return [("backend", self.name), ("kernel", "reference (PyTorch)")]
        if self.name == "cuda":
            return [("backend", self.name), ("kernel", _kernel_class()), ("compiled for", self.arch)]
        launches = self.session.launches
        if not launches:
            raise CuteSsmError("no kernel was launched in the emulator: something else updated the states")
        # the compiler names a kernel by its class and, after that, by the address and types of its arguments
        name = launches[-1].program.kernel.name.partition("_object_at")[0]
        where = f"{self.arch}, run on this CPU by the emulator ptxsim ({len(launches)} launches)"
        return [("backend", self.name), ("kernel", name), ("compiled for", where)]


def _kernel_class() -> str:
    from cute_ssm.kernels.registry import KERNELS
    from cute_ssm.spec import SelectiveStateUpdateSpec

    return KERNELS[SelectiveStateUpdateSpec].rpartition(":")[2]


@contextlib.contextmanager
def _backend(name: str) -> Iterator[_Backend]:
    """Choose what runs the state updates, and open the emulator if it is to."""
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
            fix = "--backend emulate runs the same kernel without one, --backend reference runs PyTorch"
            raise ValueError(describe("backend", "a GPU for 'cuda'", "a machine where PyTorch finds none", fix))
        name = "reference"
    if name == "reference":
        yield _Backend("reference", "cpu")
        return
    try:
        ptxsim = import_module("ptxsim")
    except ImportError as error:
        raise ImportError(
            f"backend: the emulator (ptxsim, installed with this package) cannot be loaded: {error}"
        ) from error
    with ptxsim.emulate(arch=EMULATED_ARCH) as session:
        yield _Backend("emulate", "cpu", session=session, arch=EMULATED_ARCH)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep PyTorch to one thread: a token's products are too small to share, and waiting for a busy core costs more."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(args: argparse.Namespace) -> int:
    if not args.prompt:
        raise ValueError(describe("prompt", "some text", "none", "the model needs a token to start from"))
    if args.tokens is not None and not 1 <= args.tokens <= MAX_TOKENS:
        raise ValueError(describe("tokens", f"a number from 1 to {MAX_TOKENS}", args.tokens))

    import torch

    from cute_ssm.demo import report, weights
    from cute_ssm.demo.loop import Generation
    from cute_ssm.demo.sampling import Sampler

    sampler = Sampler(args.temperature, args.seed)
    state_dtype: torch.dtype = getattr(torch, args.state_dtype)
    with _one_thread(), _backend(args.backend) as backend:
        model, tokenizer = weights.load(device=backend.device)
        count = args.tokens or TOKENS[backend.name]
        generation = Generation(model, tokenizer.encode(args.prompt), count, sampler, state_dtype)
        first = generation.warm_up()
        screen = report.Screen(sys.stdout, sys.stderr, count)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        interrupted = False
        try:
            screen.text(args.prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
            for done, token in enumerate(generation.run(), start=1):
                screen.text(decoder.decode(tokenizer.decode([token])))
                screen.progress(done, generation.seconds)
            screen.text(decoder.decode(b"", final=True))
        except KeyboardInterrupt:
            interrupted = True
        finally:
            screen.close()
        if generation.generated:
            print()
            print(report.table(_rows(generation, backend, first, args.state_dtype)))
    return 130 if interrupted else 0


def _rows(generation: Generation, backend: _Backend, first: float, state_dtype: str) -> list[tuple[str, str]]:
    count = len(generation.generated)
    return [
        *backend.rows(),
        ("state", f"{state_dtype}, slot {generation.slot} of {generation.slots}"),
        ("first call", f"{first:.3f} s" + (", compilation included" if backend.name != "reference" else "")),
        ("prompt", f"{generation.prompt_length} tokens, {generation.prefill_seconds:.3f} s"),
        ("tokens", str(count)),
        ("time", f"{generation.seconds:.2f} s"),
        ("tokens/s", f"{count / generation.seconds:.1f}"),
        ("update error", _error(generation.ssm_deviation(), "recurrence")),
        ("logits error", _error(generation.logits_deviation(), "model")),
    ]


def _error(deviation: Deviation, against: str) -> str:
    largest = f"values up to {deviation.largest:.1f}"
    return f"{deviation.difference:.1e} at most from the float64 {against} ({largest})"
