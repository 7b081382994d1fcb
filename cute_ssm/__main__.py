"""The command line: ``python -m cute_ssm env | cache | warmup | tune | demo``."""

from __future__ import annotations

import argparse
import json
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m cute_ssm", description="State-space-model decode kernels.")
    parser.add_argument("--version", action="version", version=f"cute_ssm {cute_ssm.__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    env = commands.add_parser("env", help="versions, GPUs, cache, what would run where, and what is wrong")
    env.add_argument("--json", action="store_true", help="print one JSON object")
    env.set_defaults(run=_env)

    cache = commands.add_parser("cache", help="list or delete the compiled kernels on disk")
    cache.add_argument("action", choices=("ls", "clear"))
    cache.add_argument("--all", action="store_true", help="of every version of the package, not only of this one")
    cache.add_argument("--json", action="store_true", help="list them as a file of specs, for warmup and bundles")
    cache.set_defaults(run=_cache)

    warmup = commands.add_parser("warmup", help="compile the kernels of declared calls into the cache")
    workloads.add_arguments(warmup)
    warmup.set_defaults(run=workloads.main)

    tune = commands.add_parser("tune", help="search configs of calls, and merge the best into a table")
    tuner.add_arguments(tune)
    tune.set_defaults(run=tuner.main)

    demo = commands.add_parser("demo", help="generate text with a small Mamba-2 model")
    cli.add_arguments(demo)
    demo.set_defaults(run=cli.main)

    options = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int | None] = options.run
    try:
        return run(options) or 0
    except (CuteSsmError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


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
