"""Fetch the files of suites: ``python tools/peer_suites/run.py --fetch``."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from peer_suites.suites import Peer

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".peers"  # not in the repository: these files are other projects'


def fetch(name: str, peer: Peer, clone: Path | None = None) -> Path:
    """Put what a peer's suites need into ``FOLDER / name``, anew, and return it.

    Parameters
    ----------
    clone : Path, optional
        A clone of the peer's repository, instead of a new one.
    """
    target = FOLDER / name
    with tempfile.TemporaryDirectory() as scratch:
        if peer.repository is None:
            files = _of_distribution(peer, Path(scratch))
        else:
            files = _of_repository(peer, clone, Path(scratch))
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(files, target)
    return target


def _of_repository(peer: Peer, clone: Path | None, scratch: Path) -> Path:
    if clone is None:
        clone = scratch / "clone"
        command = ["git", "clone", "--quiet", "--filter=blob:none", "--no-checkout", str(peer.repository), str(clone)]
        subprocess.run(command, check=True)
    archive = ["git", "-C", str(clone), "archive", "--format=tar", str(peer.commit), *peer.folders]
    data = subprocess.run(archive, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(scratch / "files", filter="data")
    return scratch / "files"


def _of_distribution(peer: Peer, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    command += ["--no-build-isolation", "--dest", str(scratch), f"{peer.package}=={peer.version}"]
    subprocess.run(command, check=True, env={**os.environ, **peer.build})
    (archive,) = scratch.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        top = tar.getnames()[0].split("/")[0]
        wanted = tuple(f"{top}/{folder}/" for folder in peer.folders)
        tar.extractall(scratch, [each for each in tar if each.name.startswith(wanted)], filter="data")
    return scratch / top
