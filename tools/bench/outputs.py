"""Where tools write, and which sources their results are of.

No tool writes a file that exists unless its path is given: what is committed changes when somebody says so.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMIT = ROOT / "COMMIT"  # of a kit: the commit, and the digest of its sources
RESULTS = Path(__file__).with_name("results")


def destination(given: Path | None, name: str, goes_on: bool = False) -> Path:
    """Return the file to write: the given one, else one of this name in the working directory, which must be new.

    Parameters
    ----------
    goes_on : bool
        Append to a file that exists instead of refusing it; files of `RESULTS` are refused even so.

    Raises
    ------
    ValueError
        The file exists, and was not given.
    """
    if given is not None:
        return given
    path = Path(name)
    if path.exists() and (not goes_on or path.resolve().parent == RESULTS.resolve()):
        raise ValueError(f"--out: expected a file, as {path.absolute()} exists; name it to overwrite it")
    return path


def commit() -> str:
    """Return the id of the commit that is counted or timed, with a mark if tracked files differ from it.

    Where there is no repository it is the one in the file `COMMIT`, which `tools/make_kit.sh` writes, as long as the
    sources are those of that file; else a digest of the sources stands for it.
    """
    paths = ("cute_ssm", "tools/count.py", "tools/ptxsim")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *paths)
    head = _git("rev-parse", "HEAD")
    if head is None or changed is None:
        from cute_ssm.runtime import toolchain

        sources = toolchain.sources_digest()
        packed = COMMIT.read_text().split() if COMMIT.is_file() else []
        return packed[0] if packed[1:] == [sources] else f"no commit, sources {sources}"
    return head + (" with changes" if changed else "")


def _git(*arguments: str) -> str | None:
    """Return what a command of git prints, or None where there is no git or no repository of this project."""
    try:
        done = subprocess.run(("git", *arguments), cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
        top = subprocess.run(
            ("git", "rev-parse", "--show-toplevel"), cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if Path(top.stdout.strip()).resolve() == ROOT else None
