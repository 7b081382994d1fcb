"""The PTX of compiled objects, which hold machine code alone: kept at compilation, by the digest of that code."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from ptxsim import cubin

from .driver import Driver
from .startup.after_import import after_import


class Compiler:
    """Stands for ``cutlass.cute.compile``; what it returns writes the PTX to a folder when it is exported.

    With PTX kept, an object is byte for byte what it is without.
    """

    def __init__(self, real: Any, folder: Path):
        self._real, self._folder = real, folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __getitem__(self, options: Any) -> Compiler:
        return Compiler(self._real[options], self._folder)

    def __call__(self, *arguments: Any, options: str | None = None, **keywords: Any) -> Any:
        with tempfile.TemporaryDirectory() as dump:
            keep = f"{options or ''} --keep-ptx --dump-dir {dump}"
            compiled = self._real(*arguments, options=keep, **keywords)
        export, ptx = compiled.export_to_c, compiled.__ptx__

        def exported(*arguments: Any, **keywords: Any) -> Any:
            result = export(*arguments, **keywords)
            path = Path(arguments[0] if arguments else keywords["object_file_path"])
            name = cubin.digest(cubin.of_object(path.read_bytes()))
            draft = self._folder / f"{name}.{os.getpid()}"  # other processes read the folder
            draft.write_text(ptx)
            os.replace(draft, self._folder / name)
            return result

        compiled.export_to_c = exported
        return compiled


def install(driver: Driver) -> None:
    """Let every compile of this process tell the driver its PTX."""

    def replace() -> None:
        cute = sys.modules["cutlass.cute"]
        cute.compile = Compiler(cute.compile, driver.ptx)  # type: ignore[attr-defined]

    after_import("cutlass.cute", replace)
