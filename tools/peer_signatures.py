"""Signatures that `cute_ssm.compat` follows: names, order and defaults, read from the sources of other packages.

    python tools/peer_signatures.py flashinfer-python=FOLDER vllm=FOLDER  # where the packages are unpacked
    python tools/peer_signatures.py --check                               # packages that are installed

The first form rewrites the table of the packages that it names, in ``tests/compat/signatures.json``.  The second reads
the packages of the table that are installed, without importing them, and fails if one has other signatures.
Constants that are the default of a parameter are in the table with their values.  Functions and methods that
`cute_ssm.integrations` hooks into are in the table under ``hooks``.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parents[1] / "tests" / "compat" / "signatures.json"


def read(source: str, name: str) -> str:
    """Return the parameters of a function, or of a method ``Class.function``, in a source, without their types.

    Raises
    ------
    LookupError
        No such function at the top level, or in the class.
    """
    body: list[ast.stmt] = ast.parse(source).body
    *classes, function = name.split(".")
    for owner in classes:
        body = next((node.body for node in body if isinstance(node, ast.ClassDef) and node.name == owner), [])
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            for arg in ast.walk(node.args):
                if isinstance(arg, ast.arg):
                    arg.annotation = None
            return ast.unparse(node.args)
    raise LookupError(name)


def constant(source: str, name: str) -> Any:
    """Return the value that a source assigns to a name at the top level.

    Raises
    ------
    LookupError
        No such assignment, or not of a literal.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            if name in (target.id for target in node.targets if isinstance(target, ast.Name)):
                return node.value.value
    raise LookupError(name)


def found(folder: Path, package: dict[str, Any]) -> dict[str, Any]:
    """Return the functions, hooks and constants of a package of the table as the sources in a folder have them."""
    result = {}
    for kind, reader in (("functions", read), ("hooks", read), ("constants", constant)):
        for path in package.get(kind, ()):
            file, _, name = path.partition("::")
            result[path] = reader((folder / file).read_text(encoding="utf-8"), name)
    return result


def differences(package: dict[str, Any], other: dict[str, Any], version: str) -> list[str]:
    """Return a line for each function or constant of the table that is another in a version that was read."""
    return [
        f"{path}: {version} has ({other[path]}), the table, of {package['version']}, ({wanted})"
        for path, wanted in (package["functions"] | package.get("hooks", {}) | package.get("constants", {})).items()
        if other[path] != wanted
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
        package = table[name]
        values = found(Path(folder), package)
        for kind in ("functions", "hooks", "constants"):
            if kind in package:
                package[kind] = {path: values[path] for path in package[kind]}
    if options.packages:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    wrong = []
    for name, package in table.items() if options.check else ():
        place = installed(name)
        if place is not None:
            wrong += differences(package, found(place[0], package), f"{name} {place[1]}")
    print("\n".join(wrong), end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
