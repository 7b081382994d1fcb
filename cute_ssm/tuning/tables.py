"""Measured configs: rows of JSON files, looked up by spec, target and the logarithm of the amount of work.

A file is a list of rows ``{"op": ..., "arch": "sm_90a", "heads": 512, "spec": {...}, "config": {...}}``.  A row is for
calls whose spec has its ``op`` and all fields of its ``spec``; of the rows for a call, those that name the most fields
come first, and of them the one with the least ``|log2(heads / work)|``.  Only fields that move work and change no
result may be in ``config``.  Files are those of the folder CUTE_SSM_TUNING_DIR, in the order of their names, and then
the package's own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from cute_ssm import env
from cute_ssm.arch import Arch
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.spec import Config, Spec

ConfigT = TypeVar("ConfigT", bound=Config)
BUNDLED = Path(__file__).parent / "tables.json"
FIELDS = {"op": str, "arch": str, "heads": int, "spec": dict, "config": dict}


@functools.cache
def rows() -> tuple[dict[str, Any], ...]:
    """Return the rows of all files, in the order of search; read once, ``rows.cache_clear()`` forgets them."""
    folder = env.settings().tuning_dir
    paths = [*(sorted(folder.glob("*.json")) if folder is not None else []), BUNDLED]
    return tuple(row for path in paths for row in _read(path))


def tuned(config: ConfigT, spec: Spec, arch: Arch, heads: int, free: Collection[str]) -> ConfigT:
    """Return the config with the measured fields of the nearest row, or as it is.

    Parameters
    ----------
    config : Config
        What the heuristic chose.
    spec, arch, heads
        The call, the target, and the amount of work.
    free : collection of str
        Fields that a row may set.
    """
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
        changed.check(spec, arch)  # type: ignore[attr-defined]
    except (UnsupportedSpecError, TypeError) as error:
        env.logger().warning("a row of tuned configs is ignored: %s: %s", row, error)
        return config
    return changed


def _read(path: Path) -> list[dict[str, Any]]:
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
    if not isinstance(row, dict) or set(row) != set(FIELDS):
        return False
    fitting = all(isinstance(row[name], kind) for name, kind in FIELDS.items())
    return fitting and not isinstance(row["heads"], bool) and row["heads"] > 0
