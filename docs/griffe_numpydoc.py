"""Renders this package's docstrings as they are written: types in words, `name::` blocks, links between functions."""

from __future__ import annotations

import re
from typing import Any

import griffe

import cute_ssm

FIELD = re.compile(r"^(\s*[\w*, \\`]+ : )(?=.*[,/])", re.M)  # "x : Tensor, (batch, dim), float32/float16"
LITERAL = re.compile(r" ?::$", re.M)
# Names that share a text, "x, z, out\n    As for ...": the parser would give all of them the type of the first.
GROUP = re.compile(r"^( *)(\w+(?:, \w+)+)\n((?:\1 +\S.*(?:\n|\Z))+)", re.M)
NOT_PYTHON = "\u2060"  # no width; types that are no Python are shown as they stand

SERVING = ("StatePool", "build_work_items", "commit", "materialize", "materialize_gated_delta")


class Numpydoc(griffe.Extension):
    """Prepares docstrings for griffe's parser, which takes every type for an expression of Python."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class or function."""
        if obj.docstring is not None:
            text = GROUP.sub(self._one_by_one, obj.docstring.value)
            text = FIELD.sub(rf"\1{NOT_PYTHON}", text)
            text = LITERAL.sub(":", text)
            obj.docstring.value = re.sub(r"(?<!`)`((?:cute_ssm\.)?[\w.]+)`(?!`)", self._link, text)

    @staticmethod
    def _one_by_one(found: re.Match[str]) -> str:
        """Give each of several names an entry, unless they are exceptions."""
        indent, names, text = found.groups()
        if "Error" in names:
            return found[0]
        return "".join(f"{indent}{name}\n{text.rstrip()}\n" for name in names.split(", "))

    @staticmethod
    def _link(found: re.Match[str]) -> str:
        """Make a reference of the name of a public operator or serving function."""
        name = found[1].removeprefix("cute_ssm.")
        bare = name.removeprefix("serving.")
        if found[1].startswith("cute_ssm.") and name in cute_ssm.__all__:
            return f"[`{found[1]}`][cute_ssm.{name}]"
        if bare in SERVING and "." in found[1]:
            return f"[`{found[1]}`][cute_ssm.serving.{bare}]"
        return found[0]
