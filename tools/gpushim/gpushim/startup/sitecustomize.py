"""What Python runs first below ``python -m gpushim``: gpushim is imported, and has devices, once torch has been."""

import importlib.util
import json
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from after_import import after_import


class _Beside:
    """Finds gpushim and ptxsim where no other finder does."""

    packages = json.loads(os.environ["GPUSHIM"])["packages"]

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in cls.packages:
            file = Path(cls.packages[name], "__init__.py")
            return importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])


sys.meta_path.append(_Beside)
after_import("torch", lambda: importlib.import_module("gpushim"))

_here = os.path.dirname(__file__)
_next = PathFinder.find_spec("sitecustomize", [folder for folder in sys.path if folder != _here])
if _next is not None and _next.loader is not None:  # the one that this file hides
    _next.loader.exec_module(importlib.util.module_from_spec(_next))
