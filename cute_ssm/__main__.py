"""The command line: ``cute-ssm env | cache | warmup | tune | demo``, or ``python -m cute_ssm ...``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import cute_ssm
from cute_ssm.demo import cli
from cute_ssm.errors import CuteSsmError
from cute_ssm.tuner import cli as tuner
from cute_ssm.workloads import cli as workloads

if TYPE_CHECKING:
    from cute_ssm.runtime import doctor

SCRIPT = "cute-ssm"  # that pip installs


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 2 for bad input, 141 if the reader of its output closed the pipe."""
    options = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int | None] = options.run
    try:
        code = run(options) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # without this the interpreter reports an error when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (CuteSsmError, ValueError) as error:
        print(f"{program()}: {error}", file=sys.stderr)
        return 2


def program() -> str:
    """Return how the command line was called: by the installed script, or as a module."""
    return SCRIPT if os.path.basename(sys.argv[0]) == SCRIPT else "python -m cute_ssm"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program(),
        description="State-space-model decode kernels: check an installation, compile kernels before the first call,\n"
        "search their configs, and run a small language model.",
        epilog=f"`{program()} COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cute_ssm {cute_ssm.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, summary: str, description: str, *examples: str) -> argparse.ArgumentParser:
        shown = "\n".join(f"  {program()} {name} {example}".rstrip() for example in examples)
        return commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=f"examples:\n{shown}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    env = add(
        "env",
        "check the installation: versions, GPUs, cache, what runs where",
        "Print versions, GPUs, the cache of compiled kernels, environment variables and what runs where. For each\n"
        "problem, print the command that fixes it. The exit code is 1 if something is broken.",
        "",
        "--json",
    )
    env.add_argument("--json", action="store_true", help="print one JSON object")
    env.set_defaults(run=_env)

    cache = add(
        "cache",
        "list or delete compiled kernels on disk",
        "List the compiled kernels in the cache folder, which `env` names, or delete them. Other files in that folder\n"
        "are left alone.",
        "ls",
        "ls --json > specs.json",
        "clear --all",
    )
    cache.add_argument("action", choices=("ls", "clear"), help="ls lists kernels, clear deletes them")
    cache.add_argument("--all", action="store_true", help="kernels of all versions of cute_ssm (default: this version)")
    cache.add_argument("--json", action="store_true", help="with ls: print a file of specs for warmup")
    cache.set_defaults(run=_cache)

    warmup = add(
        "warmup",
        "compile kernels before they are needed",
        "Compile kernels into the cache, so that no call of a service has to: those of known models, of one model, or\n"
        "those that a file of specs lists. The exit code is 1 if a kernel does not compile.",
        "--specs nemotron-3-super --batches 1,8,64",
        "--specs specs.json --arch sm_90a --arch sm_100a --jobs 8",
    )
    workloads.add_arguments(warmup)
    warmup.set_defaults(run=workloads.main)

    tune = add(
        "tune",
        "search the configs of an operator's calls",
        "Search launch configs for calls of an operator, and merge those that beat the default config into a table,\n"
        "which later calls read. On a GPU configs are timed; elsewhere the machine model or counters of the emulator\n"
        "rank them, for which ptxsim and gpumodel must be installed.",
        "selective_state_update --shapes nheads=16 batch=1,64 --minutes 10",
        "selective_scan --arch sm_90a --objective model --out table.json",
    )
    tuner.add_arguments(tune)
    tune.set_defaults(run=tuner.main)

    demo = add(
        "demo",
        "generate text with a small Mamba-2 model",
        "Generate text with a small Mamba-2 model whose weights are in the package, verifying several drafted tokens\n"
        "per step. Needs the extra 'demo', and ptxsim for --backend emulate.",
        "",
        "--backend emulate --tokens 20",
        "--draft 0 --temperature 0",
    )
    cli.add_arguments(demo)
    demo.set_defaults(run=cli.main)
    return parser


def _env(options: argparse.Namespace) -> int:
    from cute_ssm.runtime import doctor

    facts = doctor.gather()
    found = doctor.problems(facts)
    if options.json:
        print(json.dumps(doctor.as_dict(facts), indent=1))
    else:
        print(_text(facts, found))
    return int(any(problem.broken for problem in found))


def _text(facts: doctor.Facts, found: list[doctor.Problem]) -> str:
    """Return the report as people read it."""
    from cute_ssm import env
    from cute_ssm.runtime import doctor, shelves

    lines = ["versions"]
    lines += _table(doctor.versions(facts))
    lines += ["", "devices", *_table({"driver": f"CUDA {facts.driver_cuda}" if facts.driver_cuda else "none"})]
    lines += _table({f"cuda:{i}": f"{g.name}, {g.arch or g.capability}" for i, g in enumerate(facts.gpus)})
    lines += ["", "what runs", *_table(doctor.backends(facts))]
    items = shelves.listing(facts.cache_dir)
    state = "writable" if facts.cache_writable else "not writable"
    size = _size(sum(item.size for item in items))
    folder = "off" if facts.cache_dir is None else f"{facts.cache_dir} ({state}): {len(items)} kernels, {size}"
    lines += ["", "cache", *_table({"folder": folder})]
    lines += [f"  bundle  {path}: {count} kernels" for path, count in facts.bundles.items()]
    lines += ["", "environment"]
    lines += _table(
        {row.name: facts.variables.get(row.name, f"- (default: {row.default}): {row.meaning}") for row in env.VARIABLES}
    )
    lines += ["", "nothing is wrong" if not found else "what is wrong"]
    for problem in found:
        lines += [f"  {'BROKEN' if problem.broken else 'note'}: {problem.what}", f"    fix: {problem.fix}"]
    return "\n".join(lines)


def _cache(options: argparse.Namespace) -> int:
    from cute_ssm import env
    from cute_ssm.runtime import shelves

    root = env.settings().cache_dir
    version = None if options.all else cute_ssm.__version__
    if root is None:
        print("the disk cache is off")
        return 0
    if options.action == "clear":
        try:
            count, size = shelves.clear(root, version)
        except OSError as error:
            print(f"cannot clear {root}: {error}", file=sys.stderr)
            return 1
        print(f"{root}: {count} files deleted, {_size(size)}")
        return 0
    items = [item for item in shelves.listing(root) if version in (None, item.version)]
    if options.json:
        parts = ("spec", "config", "arch")
        whole = [item.record for item in items if all(part in item.record for part in parts)]
        specs = {json.dumps({part: record[part] for part in parts}): None for record in whole}  # each once
        print(json.dumps([json.loads(spec) for spec in specs], indent=1))
        return 0
    for item in items:
        where = f"{item.version} {item.arch} {item.stack}"
        print(f"{where}  {item.created:20}  {_size(item.size):>9}  {item.name}")
    print(f"{root}: {len(items)} kernels, {_size(sum(item.size for item in items))}")
    return 0


def _table(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [f"  {name:{width}}  {value}" for name, value in rows.items()]


def _size(count: int) -> str:
    return f"{count / 1024:.1f} KiB" if count < 1 << 20 else f"{count / (1 << 20):.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
