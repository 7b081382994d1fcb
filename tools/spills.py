"""Registers and spills of every kernel of the declared workloads, on every target.

    python tools/spills.py tools/digests/spills.json          # compiles the kernels that the file lacks
    python tools/spills.py tools/digests/spills.json --anew   # compiles all of them, a second each

The file gets a line for every declared kernel and loses those of others; the status is 1 if a kernel spills.  Kernels
are compiled for the emulator through the cache on disk; they do not run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import digest

from cute_ssm import arch as archs
from cute_ssm import runtime
from cute_ssm.errors import CuteSsmError

TARGETS = tuple(archs.ARCHS)


class Resources(NamedTuple):
    """What the machine code of a kernel needs: registers of a thread, and bytes that it spills."""

    op: str
    arch: str
    registers: int
    spill_bytes: int


def read(path: Path) -> dict[str, Resources]:
    """Return the recorded kernels by `digest.Kernel.id`."""
    return {name: Resources(*values) for name, values in json.loads(path.read_text(encoding="utf-8")).items()}


def write(path: Path, kernels: Mapping[str, Resources]) -> None:
    """Write a line for every kernel, in a fixed order."""
    lines = [
        f"{json.dumps(name)}: {json.dumps(kernels[name])}" for name in sorted(kernels, key=lambda n: (kernels[n], n))
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def measured(kernel: digest.Kernel) -> Resources:
    """Compile a kernel, or find it in the cache, and return what ptxas reports."""
    compiled = runtime.emulated(*digest.resolved(kernel))
    runtime.forget()  # not hundreds of them in memory
    registers = max(info.registers for info in compiled.kernels)
    return Resources(kernel.op, kernel.arch, registers, sum(info.spill_bytes for info in compiled.kernels))


def worst(recorded: Mapping[str, Resources], kernels: Iterable[digest.Kernel]) -> list[digest.Kernel]:
    """Return, of every operator and target, the kernel that was recorded with the most registers."""
    found: dict[tuple[str, str], digest.Kernel] = {}
    for kernel in sorted((k for k in kernels if k.id in recorded), key=lambda k: (recorded[k.id].registers, k.id)):
        found[kernel.op, kernel.arch] = kernel
    return list(found.values())


def main(argv: list[str] | None = None) -> int:
    """Compile, record, and print what spills."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE", help="the file of records, which need not exist")
    parser.add_argument("--anew", action="store_true", help="compile kernels that the file has, too")
    options = parser.parse_args(argv)
    kernels = {kernel.id: kernel for kernel in digest.declared(TARGETS)}
    before = read(options.file) if options.file.exists() and not options.anew else {}
    found: dict[str, Resources] = {}
    try:
        for number, (name, kernel) in enumerate(kernels.items(), 1):
            found[name] = before.get(name) or measured(kernel)
            if sys.stderr.isatty():
                print(f"\r{number} of {len(kernels)}", end="", file=sys.stderr, flush=True)
    except CuteSsmError as error:
        print(error, file=sys.stderr)
        return 2
    write(options.file, found)
    spilling = [name for name, resources in found.items() if resources.spill_bytes]
    for name in spilling:
        print(f"spills {found[name].spill_bytes} bytes: {kernels[name].text()}")
    print(f"{len(found)} kernels, {len(spilling)} of them spill -> {options.file}")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
