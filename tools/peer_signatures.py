"""Signatures that `cute_ssm.compat` follows: names, order and defaults, read from the sources of other packages.

    python tools/peer_signatures.py flashinfer-python=FOLDER fla-core=FOLDER   # where the packages are unpacked
    python tools/peer_signatures.py --check                                    # packages that are installed

The first form rewrites the table of the packages that it names, in ``tests/compat/signatures.json``.  The second reads
the packages of the table that are installed, without importing them, and fails if one has other signatures.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parents[1] / "tests" / "compat" / "signatures.json"


def read(source: str, name: str) -> str:
    """Return the parameters of a function in a source, without their types.

    Raises
    ------
    LookupError
        No such function at the top level.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            for arg in ast.walk(node.args):
                if isinstance(arg, ast.arg):
                    arg.annotation = None
            return ast.unparse(node.args)
    raise LookupError(name)


def signatures(folder: Path, functions: Iterable[str]) -> dict[str, str]:
    """Return the functions of a package with their parameters as the sources in a folder have them."""
    found = {}
    for path in functions:
        file, _, name = path.partition("::")
        found[path] = read((folder / file).read_text(encoding="utf-8"), name)
    return found


def differences(package: dict[str, Any], found: dict[str, str], version: str) -> list[str]:
    """Return a line for each function that is not as in the table."""
    return [
        f"{path}: {version} has ({found[path]}), the table, of {package['version']}, ({wanted})"
        for path, wanted in package["functions"].items()
        if found[path] != wanted
    ]


def installed(name: str) -> tuple[Path, str] | None:
    """Return the folder that holds an installed package's modules, and its version; None if it is not installed."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(distribution.locate_file(""))), distribution.version


def main(argv: list[str] | None = None) -> int:
    """Read the command line; rewrite the table, or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("packages", nargs="*", metavar="PACKAGE=FOLDER")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    table = json.loads(TABLE.read_text())
    for given in options.packages:
        name, _, folder = given.partition("=")
        if name not in table:
            parser.error(f"{name}: expected one of {', '.join(table)}")
        table[name]["functions"] = signatures(Path(folder), table[name]["functions"])
    if options.packages:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    wrong = []
    for name, package in table.items() if options.check else ():
        place = installed(name)
        if place is not None:
            wrong += differences(package, signatures(place[0], package["functions"]), f"{name} {place[1]}")
    print("\n".join(wrong), end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
