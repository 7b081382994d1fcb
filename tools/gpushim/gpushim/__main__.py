"""``python -m gpushim [--devices sm_90a,sm_100a:148] [--folder .gpushim] COMMAND ...``: a command that has GPUs."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .checks import Device
from .inherit import environment, notes


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its code, or 1 where it is 0 and a launch was wrong that no driver refuses."""
    parser = argparse.ArgumentParser(prog="python -m gpushim", description=__doc__)
    parser.add_argument("--devices", default="sm_90a", help="ARCH or ARCH:SMS, with commas between them")
    parser.add_argument("--folder", default=".gpushim", help="keeps the PTX of kernels and the runtime library")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a program; Python processes below it have the GPUs")
    given = parser.parse_args(arguments)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        parser.error("COMMAND is missing")
    try:
        devices = [Device.parse(text) for text in given.devices.split(",")]
    except ValueError as error:
        parser.error(str(error))
    folder = Path(given.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(notes(folder), ignore_errors=True)
    code = subprocess.run(command, env=os.environ | environment(devices, folder)).returncode
    found = sorted(notes(folder).glob("*"))
    for note in found:
        print("gpushim:", note.read_text(), file=sys.stderr, end="")
    return code or bool(found)


if __name__ == "__main__":
    sys.exit(main())
