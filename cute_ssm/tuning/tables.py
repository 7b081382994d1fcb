"""Tuned configs: rows of JSON files, looked up by spec, target and the logarithm of the amount of work.

A file is a list of rows ``{"op": ..., "arch": "sm_90a", "heads": 512, "spec": {...}, "config": {...}}``.  A row is for
calls whose spec has its ``op`` and all fields of its ``spec``; of the rows for a call, those that name the most fields
come first, and of them the one with the least ``|log2(heads / work)|``.  Only fields that move work and change no
result may be in ``config``; an empty one says that the rule is best.  Files are those of the folder
CUTE_SSM_TUNING_DIR, in the order of their names, and then the package's own.

A row may have ``"evidence"``: ``how`` it was found ("measured" or "modelled"), ``on`` what, ``us`` and ``rule_us``, the
microseconds with this config and with that of the rule, and what else the tuner knows.  Nothing is chosen by it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from cute_ssm import env
from cute_ssm.arch import Arch
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.spec import Config, Spec

ConfigT = TypeVar("ConfigT", bound=Config)
Row = dict[str, Any]
BUNDLED = Path(__file__).parent / "tables.json"
FIELDS = {"op": str, "arch": str, "heads": int, "spec": dict, "config": dict}
EVIDENCE = "evidence"
_local = threading.local()  # .lookups: lists of those who watch


@dataclass(frozen=True)
class Lookup:
    """One question to the tables: what the rule chose, for what, and which fields a row may set."""

    rule: Config
    spec: Spec
    arch: Arch
    heads: int
    free: tuple[str, ...]


@functools.cache
def rows() -> tuple[Row, ...]:
    """Return the rows of all files, in the order of search; read once, `forget` makes the next call read again."""
    folder = env.settings().tuning_dir
    paths = [*(sorted(folder.glob("*.json")) if folder is not None else []), BUNDLED]
    return tuple(row for path in paths for row in read(path))


def forget() -> None:
    """Forget the files and what was chosen by them."""
    rows.cache_clear()
    _nearest.cache_clear()


def tuned(config: ConfigT, spec: Spec, arch: Arch, heads: int, free: Collection[str]) -> ConfigT:
    """Return the config with the tuned fields of the nearest row, or as it is.

    Memorised: callers need not, and `watching` sees every call.

    Parameters
    ----------
    config : Config
        What the rule chose.
    spec, arch, heads
        The call, the target, and the amount of work.
    free : collection of str
        Fields that a row may set.
    """
    for lookups in _local.__dict__.get("lookups", ()):
        lookups.append(Lookup(config, spec, arch, heads, tuple(free)))
    return cast(ConfigT, _nearest(config, spec, arch, heads, tuple(free)))


@contextmanager
def watching() -> Iterator[list[Lookup]]:
    """Give the list of questions that this thread asks inside the context."""
    watchers = _local.__dict__.setdefault("lookups", [])
    found: list[Lookup] = []
    watchers.append(found)
    try:
        yield found
    finally:
        watchers[:] = [watcher for watcher in watchers if watcher is not found]


@functools.lru_cache(maxsize=4096)
def _nearest(config: Config, spec: Spec, arch: Arch, heads: int, free: tuple[str, ...]) -> Config:
    op = getattr(spec, "op", None)
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    known = [
        row
        for row in rows()
        if row["op"] == op and row["arch"] == arch.name and all(fields.get(k) == v for k, v in row["spec"].items())
    ]
    if not known or heads < 1:
        return config
    row = min(known, key=lambda row: (-len(row["spec"]), abs(math.log2(row["heads"] / heads))))
    try:
        if not set(row["config"]) <= set(free):
            raise UnsupportedSpecError(f"config: expected fields among {', '.join(free)}")
        changed = dataclasses.replace(config, **row["config"])
        changed.check(spec, arch)
    except (UnsupportedSpecError, TypeError) as error:
        env.logger().warning("a row of tuned configs is ignored: %s: %s", row, error)
        return config
    return changed


def merge(path: Path, found: Iterable[Row]) -> int:
    """Put rows into a file, in place of those for the same calls, and return how many rows it has then.

    A row that was measured is not replaced by one that was not.

    Raises
    ------
    ValueError
        If the file exists and is no table.
    OSError
        If it cannot be written.
    """
    table: dict[str, Row] = {}
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, list) or not all(map(_is_row, content)):
            raise ValueError(f"{path}: expected a table of configs, got something else; name another file")
        table = {_identity(row): row for row in content}
    for row in found:
        if not _is_row(row):
            raise ValueError(f"expected a row of a table, got {row}")
        old = table.get(_identity(row))
        if old is None or _measured(row) or not _measured(old):
            table[_identity(row)] = row
    ordered = sorted(table.values(), key=_identity)
    text = ",\n".join(json.dumps(row) for row in ordered)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(f"[\n{text}\n]\n" if ordered else "[]\n", encoding="utf-8")
    os.replace(temporary, path)
    return len(ordered)


def withdraw(path: Path, margin: float) -> int:
    """Give the calls of a file back to the rule whose configs were modelled and gain less than ``margin``.

    Their rows stay, with an empty config.  Returns how many these were.
    """
    found = read(path)
    weak = [row for row in found if row["config"] and not _measured(row) and gain(row) < margin]
    for row in weak:
        row["config"] = {}
        row[EVIDENCE] = {**row[EVIDENCE], "us": row[EVIDENCE]["rule_us"], "margin": margin}
    if weak:
        merge(path, found)
    return len(weak)


def gain(row: Row) -> float:
    """Return by how much a row's config is faster than the rule's, relatively, as its evidence says; 0 without any."""
    evidence = row.get(EVIDENCE, {})
    return 1 - evidence["us"] / evidence["rule_us"] if {"us", "rule_us"} <= set(evidence) else 0.0


def _identity(row: Row) -> str:
    return json.dumps([row["op"], row["arch"], sorted(row["spec"].items()), f"{row['heads']:012d}"])


def _measured(row: Row) -> bool:
    return bool(row.get(EVIDENCE, {}).get("how") == "measured")


def read(path: Path) -> list[Row]:
    """Return the rows of a file; what is wrong in it is logged and left out."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        env.logger().warning("%s is ignored: %s", path, error)
        return []
    if not isinstance(content, list):
        env.logger().warning("%s is ignored: expected a JSON list, got %s", path, type(content).__name__)
        return []
    good = [row for row in content if _is_row(row)]
    if len(good) < len(content):
        expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in FIELDS.items())
        env.logger().warning("%s: %d rows are ignored: expected %s", path, len(content) - len(good), expected)
    return good


def _is_row(row: object) -> bool:
    if not isinstance(row, dict) or set(row) - {EVIDENCE} != set(FIELDS):
        return False
    fitting = all(isinstance(row[name], kind) for name, kind in FIELDS.items())
    fitting = fitting and isinstance(row.get(EVIDENCE, {}), dict)
    return fitting and not isinstance(row["heads"], bool) and row["heads"] > 0
