"""Call a function once a module has been imported, without importing it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def after_import(name: str, function: Callable[[], object]) -> None:
    """Call a function when a module has been imported: now, or when it is."""
    if name in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _After(name, function))


class _After:
    """A finder that takes part in one import."""

    def __init__(self, name: str, function: Callable[[], object]):
        self.name, self.function = name, function

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then(module: Any) -> None:
                execute(module)
                self.function()

            spec.loader.exec_module = then
        return spec
