"""List and delete compiled kernels on disk, of all tool-chains."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cute_ssm.arch import ARCHS
from cute_ssm.runtime.store import BAD, EMULATED, META, TEMPORARY, record_path

_OBJECTS = (".o", ".so", EMULATED)
_SUFFIXES = (*_OBJECTS, ".json", ".lock")


@dataclass(frozen=True)
class Item:
    """One stored object."""

    path: Path
    size: int
    created: str
    version: str
    arch: str
    stack: str
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """Readable name of the kernel, marked if it is for the emulator."""
        stem = self.path.stem
        return f"{stem.rpartition('.')[0]} (emulator)" if self.path.suffix == EMULATED else stem


def listing(root: Path | None) -> list[Item]:
    """Return all objects in a cache folder or a bundle, sorted by path."""
    found = []
    for folder in _folders(root):
        for path in sorted(path for suffix in _OBJECTS for path in folder.glob(f"*{suffix}")):
            if path.name.startswith("."):
                continue
            try:
                record = json.loads(record_path(path).read_bytes())
                size = path.stat().st_size
            except (OSError, ValueError):
                continue
            record = record if isinstance(record, dict) else {}
            created = str(record.get("created", ""))
            version, arch, stack = folder.parts[-3:]
            found.append(Item(path, size, created, version, arch, stack, record))
    return found


def clear(root: Path | None, version: str | None = None) -> tuple[int, int]:
    """Delete the files of the cache, of one package version or of all, and folders that are empty then.

    Only files that this package writes are deleted, so that a wrong folder loses nothing else.

    Returns
    -------
    tuple of int
        Number of deleted files, and their bytes.

    Raises
    ------
    OSError
        If a file cannot be deleted.
    """
    count = size = 0
    for folder in _folders(root):
        if version not in (None, folder.parts[-3]):
            continue
        for path in list(folder.iterdir()):
            if path.name == META or path.name.startswith((BAD, TEMPORARY)) or path.suffix in _SUFFIXES:
                size += path.stat().st_size
                path.unlink()
                count += 1
        with contextlib.suppress(OSError):  # kept if not empty or in use by another process
            for level in (folder, folder.parent, folder.parent.parent):
                level.rmdir()
    return count, size


def _folders(root: Path | None) -> Iterator[Path]:
    """Yield the folders ``version/target/digest`` that contain a ``meta.json``."""
    if root is None or not root.is_dir():
        return
    for meta in sorted(root.glob(f"*/*/*/{META}")):
        folder = meta.parent
        if folder.parent.name in ARCHS and re.fullmatch(r"[0-9a-f]{12}", folder.name):
            yield folder
