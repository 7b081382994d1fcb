"""Digests of kernels' PTX: show that a refactoring changes no kernel.

    python tools/digest.py compare tools/digests/kernels.json --op selective_state_update --limit 6
    python tools/digest.py compare tools/digests/kernels.json --dump changed
    python tools/digest.py record tools/digests/kernels.json --workloads --specs tools/digests/kernels.json

A digest is the SHA-256 of the PTX without what a refactoring may change: comments, source lines, and the names of
kernels and their parameters.  Kernels are compiled for the emulator through the cache on disk; they do not run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cute_ssm import arch as archs
from cute_ssm import runtime, workloads
from cute_ssm.errors import CuteSsmError, describe
from cute_ssm.workloads import plan

TARGETS = ("sm_90a", "sm_100a")
HEX_DIGITS = 16  # of a SHA-256, in a file
FORMAT = 1
NOTHING: Mapping[str, str] = {}

_COMMENT = re.compile(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', re.S)
_DEBUG_SECTION = re.compile(r"^[ \t]*\.section[ \t]+\.debug[^{]*\{.*?^[ \t]*\}", re.S | re.M)
_DEBUG_LINE = re.compile(r"\.(file|loc)\s|\$L__(tmp|func_begin|func_end|info_string)\w*:$")
_FUNCTION = re.compile(r"(\.extern\s+)?\.(?:entry|func)\s+(?:\([^)]*\)\s*)?([\w$]+)")
_COMPILER = re.compile(r"^// *(Cuda compilation tools, .*\S)", re.M)


class Kernel(NamedTuple):
    """An entry of `plan.as_entry`; once it is recorded, also its operator and the digest of its PTX."""

    spec: dict[str, Any]
    config: dict[str, Any]
    arch: str
    op: str = ""
    digest: str = ""

    @property
    def entry(self) -> dict[str, Any]:
        """The kernel as an entry of a file of specs."""
        return {"spec": self.spec, "config": self.config, "arch": self.arch}

    @property
    def id(self) -> str:
        """Digest of the entry."""
        return hashlib.sha256(json.dumps(self.entry, sort_keys=True).encode()).hexdigest()[:HEX_DIGITS]

    def text(self) -> str:
        """Target, types and fields on one line."""
        parts = [self.arch]
        for fields in (self.spec, self.config):
            parts += [str(value) if name == "type" else f"{name}={value}" for name, value in fields.items()]
        return " ".join(parts)


def normalised(ptx: str) -> str:
    """Return PTX without comments, source lines, and the names of functions and their parameters.

    Functions are called ``kernel_0``, ``kernel_1``, ... in the order of their first appearance.  Everything else stays,
    ``.version`` and ``.target`` included; blanks are made equal.
    """
    ptx = _COMMENT.sub(lambda match: match.group(1) or " ", ptx)
    ptx = _DEBUG_SECTION.sub("", ptx)
    lines = (" ".join(line.split()) for line in ptx.splitlines())
    ptx = "\n".join(line for line in lines if line and not _DEBUG_LINE.match(line)) + "\n"
    names = dict.fromkeys(name for extern, name in _FUNCTION.findall(ptx) if not extern)
    numbers = {name: f"kernel_{number}" for number, name in enumerate(names)}
    if numbers:
        longest_first = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        symbol = re.compile(rf"(?<![\w$%.])({longest_first})(?=_param_\d+(?![\w$])|\$|(?![\w$]))")
        ptx = symbol.sub(lambda match: numbers[match.group(1)], ptx)
    return ptx


def digest(ptx: str) -> str:
    """Return the digest of normalised PTX."""
    return hashlib.sha256(normalised(ptx).encode()).hexdigest()[:HEX_DIGITS]


def compiler_of(ptx: str) -> str:
    """Return the compiler that PTX names in its first comment."""
    found = _COMPILER.search(ptx)
    return found.group(1) if found else "unknown"


def write(path: Path, kernels: Iterable[Kernel], compilers: Iterable[str]) -> None:
    """Write a file of digests: one line per kernel, in a fixed order; fields are named once per type."""
    fields: dict[str, list[str]] = {}
    rows = []
    for kernel in kernels:
        row: list[Any] = [kernel.op, kernel.arch]
        for part in (kernel.spec, kernel.config):
            names = fields.setdefault(part["type"], [name for name in part if name != "type"])
            if set(names) != set(part) - {"type"}:
                raise ValueError(describe(part["type"], f"the fields {', '.join(names)}", ", ".join(part)))
            row += [part["type"], [part[name] for name in names]]
        rows.append(json.dumps([*row, kernel.digest], separators=(",", ":")))
    header = {"format": FORMAT, "compilers": sorted(set(compilers)), "fields": dict(sorted(fields.items()))}
    lines = json.dumps(header)[:-1] + ', "kernels": [\n' + ",\n".join(sorted(rows)) + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines, encoding="utf-8")


def read(path: Path) -> tuple[list[Kernel], list[str]]:
    """Return the kernels of a file of digests, and the compilers that made them; of a file of specs, no digests."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, list):
            return [Kernel(entry["spec"], entry["config"], entry["arch"]) for entry in content], []
        if content["format"] != FORMAT:
            raise ValueError(describe("format", str(FORMAT), str(content["format"]), "record it again"))
        kernels = []
        for op, arch, spec, spec_values, config, config_values, found in content["kernels"]:
            parts = (
                {"type": kind, **dict(zip(content["fields"][kind], values, strict=True))}
                for kind, values in ((spec, spec_values), (config, config_values))
            )
            kernels.append(Kernel(*parts, arch, op, found))
        return kernels, content["compilers"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected what `record` writes: {type(error).__name__}: {error}") from None


def cached(folder: Path) -> list[Kernel]:
    """Return the kernels of this package in a folder of compiled kernels."""
    command = [sys.executable, "-m", "cute_ssm", "cache", "ls", "--json"]
    environment = {**os.environ, "CUTE_SSM_CACHE_DIR": str(folder)}
    entries = json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
    kernels = []
    for kernel in (Kernel(entry["spec"], entry["config"], entry["arch"]) for entry in entries):
        try:
            resolved(kernel)
        except ValueError as error:  # of a package that registered its own, or of another version
            print(f"left out: {error}", file=sys.stderr)
        else:
            kernels.append(kernel)
    return kernels


def declared(targets: Sequence[str]) -> list[Kernel]:
    """Return the kernels of the declared workloads."""
    calls = [workload for op in workloads.OPERATORS for workload in workloads.of_operator(op)]
    found = plan.of_workloads(calls, [archs.by_name(name) for name in targets])
    return [as_kernel(*kernel) for kernel in found]


def as_kernel(spec: Any, config: Any, arch: Any) -> Kernel:
    """Return a kernel of `plan` as one of a file."""
    return Kernel(**json.loads(json.dumps(plan.as_entry(spec, config, arch))), op=spec.op)


def renamed(kernel: Kernel, names: Mapping[str, str]) -> Kernel:
    """Return a kernel with some types and fields called by other names."""
    spec, config = (
        {names.get(name, name): names.get(value, value) if name == "type" else value for name, value in part.items()}
        for part in (kernel.spec, kernel.config)
    )
    return kernel._replace(spec=spec, config=config)


def resolved(kernel: Kernel, names: Mapping[str, str] = NOTHING) -> plan.Kernel:
    """Return spec, config and target of a kernel.

    Raises
    ------
    ValueError
        The current code does not know a type or a field; the message names it and the kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.json"
        path.write_text(json.dumps([renamed(kernel, names).entry]), encoding="utf-8")
        try:
            (found,) = plan.read(str(path), ())
        except ValueError as error:
            words = str(error).rpartition(f"{plan.FORM}: ")[2]
            raise ValueError(f"{kernel.text()}: {words} (a new name: --renamed OLD=NEW)") from None
    return found


def compiled(kernels: Sequence[plan.Kernel]) -> Iterator[str]:
    """Yield the PTX of kernels, from the cache on disk or the compiler."""
    for number, kernel in enumerate(kernels, 1):
        if sys.stderr.isatty():
            print(f"\r{number} of {len(kernels)}", end="", file=sys.stderr, flush=True)
        yield runtime.emulated(*kernel).ptx
        runtime.forget()  # not hundreds of them in memory
    if sys.stderr.isatty():
        print(file=sys.stderr)


def chosen(kernels: Iterable[Kernel], options: argparse.Namespace) -> list[Kernel]:
    """Return the kernels that the options select, each once, evenly spread if they are to be few.

    Raises
    ------
    ValueError
        None is left.
    """
    kernels = list({kernel.id: kernel for kernel in kernels}.values())
    ops = sorted({kernel.op for kernel in kernels})
    kernels = [k for k in kernels if options.op in ("", k.op) and k.arch in (options.arch or [k.arch])]
    kernels = [kernel for kernel in kernels if options.spec_filter in kernel.text()]
    if not kernels:
        raise ValueError(describe("kernels", "some that the options select", "none", f"operators: {', '.join(ops)}"))
    count = min(options.limit or len(kernels), len(kernels))
    return [kernels[(2 * i + 1) * len(kernels) // (2 * count)] for i in range(count)]


def record(options: argparse.Namespace) -> int:
    """Compile kernels and write their digests."""
    if not (options.workloads or options.cache or options.specs):
        raise ValueError(describe("kernels", "--workloads, --cache FOLDER, or --specs FILE", "none of these"))
    kernels = declared(options.arch or TARGETS) if options.workloads else []
    kernels += cached(options.cache) if options.cache else []
    kernels += read(options.specs)[0] if options.specs else []
    current = (resolved(kernel, dict(options.renamed)) for kernel in kernels)
    kernels = chosen((as_kernel(*kernel) for kernel in current), options)
    found, compilers = [], set()
    for kernel, ptx in zip(kernels, compiled([resolved(kernel) for kernel in kernels])):
        found.append(kernel._replace(digest=digest(ptx)))
        compilers.add(compiler_of(ptx))
        dump(options.dump, kernel, ptx)
    write(options.file, found, compilers)
    print(f"{len(found)} kernels -> {options.file}")
    return 0


def compare(options: argparse.Namespace) -> int:
    """Compile recorded kernels again, and print those whose PTX is another."""
    kernels, recorded_with = read(options.file)
    kernels = chosen(kernels, options)
    now = [resolved(kernel, dict(options.renamed)) for kernel in kernels]
    differing, compilers = 0, set()
    for kernel, ptx in zip(kernels, compiled(now)):
        if digest(ptx) != kernel.digest:
            differing += 1
            compilers.add(compiler_of(ptx))
            print(f"differs: {kernel.id} {kernel.text()}", flush=True)
            dump(options.dump, kernel, ptx)
    print(f"{len(kernels)} kernels: {len(kernels) - differing} equal, {differing} different")
    if not compilers <= set(recorded_with):
        print(f"recorded with {', '.join(recorded_with)}, compiled with {', '.join(compilers)}: record again")
    return 1 if differing else 0


def dump(folder: Path | None, kernel: Kernel, ptx: str) -> None:
    """Write normalised PTX into a folder, if there is one."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{kernel.id}.ptx").write_text(normalised(ptx), encoding="utf-8")


def pair(text: str) -> tuple[str, str]:
    """Return both sides of ``OLD=NEW``."""
    old, _, new = text.partition("=")
    if not (old and new):
        raise argparse.ArgumentTypeError(f"expected OLD=NEW, got {text!r}")
    return old, new


def main(argv: list[str] | None = None) -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ways = parser.add_subparsers(dest="way", required=True)
    for name, way in (("record", record), ("compare", compare)):
        sub = ways.add_parser(name, help=way.__doc__.rstrip("."))
        sub.set_defaults(run=way)
        sub.add_argument("file", type=Path, metavar="FILE", help="the file of digests")
        sub.add_argument("--op", default="", help="kernels of this operator only")
        sub.add_argument("--arch", nargs="+", choices=archs.ARCHS, help="kernels of these targets only")
        sub.add_argument("--spec-filter", default="", metavar="TEXT", help="kernels whose line contains this only")
        sub.add_argument("--limit", type=int, metavar="N", help="at most so many kernels, evenly spread")
        sub.add_argument("--dump", type=Path, metavar="FOLDER", help="write normalised PTX: FOLDER/<id>.ptx")
        if way is record:
            sub.add_argument("--workloads", action="store_true", help="kernels of the declared workloads")
            sub.add_argument("--cache", type=Path, metavar="FOLDER", help="kernels of a cache folder, read from it")
            sub.add_argument("--specs", type=Path, metavar="FILE", help="kernels of a file of digests, or of specs")
        sub.add_argument(
            "--renamed", nargs="+", type=pair, default=[], metavar="OLD=NEW", help="types and fields of other names"
        )
    options = parser.parse_args(argv)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit: expected at least 1, got {options.limit}")
    if getattr(options, "cache", None):
        os.environ["CUTE_SSM_CACHE_DIR"] = str(options.cache)
    try:
        return options.run(options)
    except (ValueError, CuteSsmError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
