"""What Python runs first below ``python -m gpushim``: `gpushim` is installed when a process has imported torch."""

import importlib.util
import json
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

_HERE = os.path.dirname(__file__)
_PACKAGES = json.loads(os.environ["GPUSHIM"])["packages"]


class _Finder:
    """Finds gpushim and ptxsim where no other finder does, and imports gpushim after torch."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in _PACKAGES and PathFinder.find_spec(name) is None:
            folder = Path(_PACKAGES[name])
            return importlib.util.spec_from_file_location(
                name, folder / "__init__.py", submodule_search_locations=[str(folder)]
            )
        spec = PathFinder.find_spec(name) if name == "torch" else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then_gpushim(module):
                execute(module)
                importlib.import_module("gpushim")

            spec.loader.exec_module = then_gpushim
        return spec


sys.meta_path.insert(0, _Finder)
_next = PathFinder.find_spec("sitecustomize", [folder for folder in sys.path if folder != _HERE])
if _next is not None and _next.loader is not None:  # the one that this file hides
    _next.loader.exec_module(importlib.util.module_from_spec(_next))
