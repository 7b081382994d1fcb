"""Functions that take the parameters of other packages' ones, as the table of signatures has them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def signature(package: dict[str, Any], path: str) -> inspect.Signature:
    """That of a function or hook of a package of the table."""
    text = (package["functions"] | package.get("hooks", {}))[path]
    scope = {name.partition("::")[2]: value for name, value in package.get("constants", {}).items()}
    exec(f"def function({text}): ...", scope)  # the text is a constant of this repository
    return inspect.signature(scope["function"])


def function(package: dict[str, Any], path: str, body: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A function with these parameters that passes them, by name, to a body; a variadic one as it is."""
    found = signature(package, path)

    def double(*args: Any, **kwargs: Any) -> Any:
        bound = found.bind(*args, **kwargs)
        bound.apply_defaults()
        return None if body is None else body(**bound.arguments)

    double.__name__ = double.__qualname__ = path.rpartition(".")[2].rpartition(":")[2]
    double.__signature__ = found  # type: ignore[attr-defined]
    return double
