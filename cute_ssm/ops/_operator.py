"""`Operator`: what the package knows of one operator."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from cute_ssm.spec import Config, Spec


@dataclass(frozen=True)
class Operator:
    """One operator: a folder in `cute_ssm.ops`, whose ``__init__.py`` makes its descriptor, ``OPERATOR``.

    Registry, public names, warm-up, bundles, tuner, counters, benchmarks and the checks on a GPU read descriptors, so
    that adding an operator adds a folder and one line in `cute_ssm.ops.OPERATORS`.  Making a descriptor imports its
    spec and config alone; the other modules of the folder, and with them torch and the compiler, are imported when
    they are asked for.

    Attributes
    ----------
    package : str
        The folder, as a module: ``cute_ssm.ops.<name>``.
    functions : tuple of str
        Public functions of the folder's ``operator.py``.
    spec : type of Spec
        What its kernel is specialised on.
    config : type of Config
        What may change the kernel's speed and nothing else.
    kernel : str
        Name of the kernel class in the folder's ``kernel.py``.
    home : str
        Module whose public names `functions` are.
    workload : bool
        Whether the folder has a ``workload.py``: calls to warm up, tune, count and time; see `cute_ssm.workloads`.
    """

    package: str
    functions: tuple[str, ...]
    spec: type[Spec]
    config: type[Config]
    kernel: str
    home: str = "cute_ssm"
    workload: bool = True

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.package.rpartition(".")[2]

    @property
    def kernel_path(self) -> str:
        """The kernel class as ``"module:Class"``."""
        return f"{self.package}.kernel:{self.kernel}"

    def module(self, name: str) -> Any:
        """Import a module of the folder."""
        return import_module(f"{self.package}.{name}")

    def function(self, name: str) -> Any:
        """Import a public function."""
        return getattr(self.module("operator"), name)
