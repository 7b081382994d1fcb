"""Compiled kernels on disk: ``<root>/<package version>/<target>/<tool-chain digest>/<readable name>-<digest>.o``.

Each object has a record, ``.json``, with spec, config, date, size and SHA-256; each folder of a digest has a
``meta.json`` with the versions that the digest stands for.  Files are replaced atomically while the key's lock is held.
Kernels for the emulator have the suffix ``.<digest of the emulator's format>.emulated``, and their own record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, ClassVar

import cute_ssm
from cute_ssm.arch import Arch
from cute_ssm.env import logger
from cute_ssm.runtime import registry, toolchain
from cute_ssm.spec import Config, Spec, digest

META = "meta.json"
BAD = ".bad-"
TEMPORARY = ".tmp-"
LOCK_TIMEOUT_S = 600.0  # a compile takes seconds; a process stopped in a debugger must not block others for ever
LOCK_POLL_S = 0.02
EMULATED = ".emulated"


class BadObjectError(Exception):
    """A stored object cannot be used."""


def record_path(path: Path) -> Path:
    """Return the path of the record of an object, a shared library, or an emulated kernel."""
    return path.with_name(f"{path.name}.json") if path.suffix == EMULATED else path.with_suffix(".json")


@dataclass(frozen=True)
class Key:
    """Everything that a compile depends on, apart from the tool-chain."""

    spec: Spec
    config: Config
    arch: Arch

    @cached_property
    def name(self) -> str:
        """Stem of the file names."""
        return f"{self.spec.text()}-{self.digest}"

    @cached_property
    def digest(self) -> str:
        """Digest, 12 hexadecimal digits, of spec, config, target and, for external kernels, their source."""
        return digest(self.spec, self.config, self.arch, registry.fingerprint(self.spec))

    @property
    def function(self) -> str:
        """Name of the function in the object file."""
        return f"cute_ssm_{self.digest}"


class Store:
    """One folder of compiled kernels."""

    warned: ClassVar[set[Path]] = set()  # shared by all stores: one warning per folder and process

    def __init__(self, root: Path):
        self.root = root

    def folder(self, key: Key) -> Path:
        """Return the folder of a key's files."""
        return self.root / cute_ssm.__version__ / key.arch.name / toolchain.stack()

    def path(self, key: Key, suffix: str = ".o") -> Path:
        """Return the path of a key's object or shared library, which need not exist."""
        return self.folder(key) / f"{key.name}{suffix}"

    def read(self, key: Key, suffix: str = ".o") -> bytes | None:
        """Return an object, or None if there is none for this tool-chain.

        Raises
        ------
        BadObjectError
            If the object does not match its record, or the folder the tool-chain.
        """
        path = self.path(key, suffix)
        try:
            data = path.read_bytes()
            if not self._described(path.parent):
                raise BadObjectError(f"{META} in its folder is missing or of another tool-chain")
            record = json.loads(record_path(path).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            if path.exists():
                raise BadObjectError("it has no record") from None
            return None
        except OSError as error:
            self.warn_once("read", error)
            return None
        except ValueError as error:
            raise BadObjectError(f"unreadable record: {error}") from None
        if not isinstance(record, dict) or record.get("sha256") != hashlib.sha256(data).hexdigest():
            raise BadObjectError("its SHA-256 is not the one in its record")
        return data

    def write(self, key: Key, data: bytes, compile_s: float, suffix: str = ".o") -> bool:
        """Store an object or shared library while holding the key's lock; return whether that succeeded."""
        if toolchain.sources_changed():
            self.warn_once("write", "the sources of cute_ssm have changed since this process read them")
            return False
        path = self.path(key, suffix)
        record = {
            "kernel": registry.kernel_path(key.spec),
            "arch": key.arch.name,
            "spec": {"type": type(key.spec).__name__, **dataclasses.asdict(key.spec)},
            "config": {"type": type(key.config).__name__, **dataclasses.asdict(key.config)},
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "compile_s": round(compile_s, 3),
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._described(path.parent):
                _replace(path.parent / META, _json(toolchain.description()))
            _replace(path, data)
            _replace(record_path(path), _json(record))
        except OSError as error:
            self.warn_once("write", error)
            return False
        return True

    def quarantine(self, key: Key, reason: object, suffix: str = ".o") -> None:
        """Rename a bad object while holding the lock; it replaces an earlier bad one."""
        path = self.path(key, suffix)
        self.damaged(key, reason, suffix)
        try:
            os.replace(path, path.with_name(BAD + path.name))
            record_path(path).unlink(missing_ok=True)
        except OSError as error:
            self.warn_once("move", error)

    def damaged(self, key: Key, reason: object, suffix: str = ".o") -> None:
        """Warn that an object is compiled again, with the reason."""
        logger().warning("%s cannot be used and is compiled again: %s", self.path(key, suffix), reason)

    @contextlib.contextmanager
    def lock(self, key: Key) -> Iterator[bool]:
        """Hold a key's lock between processes; yields False if the folder cannot be written or locked."""
        file = self._locked(self.path(key).with_suffix(".lock"))
        try:
            yield file is not None
        finally:
            if file is not None:
                file.close()

    def warn_once(self, verb: str, error: object) -> None:
        """Warn, once per folder and process, that kernels are cached in memory only."""
        if self.root not in self.warned:
            self.warned.add(self.root)
            logger().warning(
                "cannot %s in the kernel cache %s (%s): kernels are cached in memory only; "
                "set CUTE_SSM_CACHE_DIR to a writable folder, or CUTE_SSM_CACHE=0",
                *(verb, self.root, error),
            )

    def _described(self, folder: Path) -> bool:
        """Return whether a folder's ``meta.json`` matches the running tool-chain."""
        try:
            meta = json.loads((folder / META).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except ValueError:
            meta = None
        return bool(meta == toolchain.description())

    def _locked(self, path: Path) -> IO[bytes] | None:
        if self.root in self.warned:
            return None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab")  # closed by lock()
        except OSError as error:
            self.warn_once("write", error)
            return None
        try:
            _flock(file)
        except (OSError, ImportError) as error:
            file.close()
            self.warn_once("lock", error)
            return None
        return file


def _flock(file: IO[bytes]) -> None:
    """Wait for an exclusive lock, which the operating system releases if its holder dies."""
    import fcntl

    deadline = time.monotonic() + LOCK_TIMEOUT_S
    waiting = False
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{file.name} has been locked for {LOCK_TIMEOUT_S:.0f} s") from None
        if not waiting:
            waiting = True
            logger().info("waiting for another process to compile %s", Path(file.name).stem)
        time.sleep(LOCK_POLL_S)


def _replace(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
