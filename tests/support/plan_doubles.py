"""What tests put in place of an operator's plans: kernels that note their calls, and stores that note their keys."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any


class Recorder:
    """A plan's kernel that notes its calls, or refuses like the kernel's own entry."""

    def __init__(self, refuse: bool = False):
        self.calls: list[tuple[Any, ...]] = []
        self.refuse = refuse

    def __call__(self, *arguments: Any) -> None:
        if self.refuse:
            raise ValueError("Mismatched strides[0]")
        self.calls.append(arguments)


class Keys(dict):
    """Plans that note the key that was looked up last."""

    last: Any = None

    def get(self, key: Any, default: Any = None) -> Any:
        self.last = key
        return super().get(key, default)


def last_key(module: ModuleType, run: Callable[[], object]) -> Any:
    """Return the key that a call looks up; the operator of `module` then has an empty store of plans."""
    module._path.plans = keys = Keys()
    run()
    return keys.last
