"""`Operator`: what the package knows of one operator."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from cute_ssm.spec import Config, Spec


class Operator(NamedTuple):
    """One operator: a folder in `cute_ssm.ops`, whose ``__init__.py`` makes its descriptor, ``OPERATOR``.

    Registry, public names, warm-up, bundles, tuner, counters, benchmarks and the checks on a GPU read descriptors, so
    that adding an operator adds a folder and one line in `cute_ssm.ops.OPERATORS`.  Making a descriptor imports
    nothing; the modules of the folder, and with them torch and the compiler, are imported when they are asked for.

    Attributes
    ----------
    package : str
        The folder, as a module: ``cute_ssm.ops.<name>``.
    functions : tuple of str
        Public functions of the folder's ``operator.py``.
    spec, config, kernel : str
        Names of its classes in the folder's ``spec.py``, ``config.py`` and ``kernel.py``; or ``"module:Class"``, where
        operators share one.
    home : str
        Module whose public names `functions` are.
    workload : bool
        Whether the folder has a ``workload.py``: calls to warm up, tune, count and time; see `cute_ssm.workloads`.
    """

    package: str
    functions: tuple[str, ...]
    spec: str
    config: str
    kernel: str
    home: str = "cute_ssm"
    workload: bool = True

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.package.rpartition(".")[2]

    @property
    def public_name(self) -> str:
        """Full name of its first public function, the one that the calls of a workload are of."""
        return f"{self.home}.{self.functions[0]}"

    @property
    def spec_class(self) -> type[Spec]:
        """What its kernel is specialised on."""
        found: type[Spec] = self._class("spec", self.spec)
        return found

    @property
    def config_class(self) -> type[Config]:
        """What may change the kernel's speed and nothing else."""
        found: type[Config] = self._class("config", self.config)
        return found

    @property
    def kernel_path(self) -> str:
        """The kernel class as ``"module:Class"``."""
        return self.kernel if ":" in self.kernel else f"{self.package}.kernel:{self.kernel}"

    def module(self, name: str) -> Any:
        """Import a module of the folder."""
        return import_module(f"{self.package}.{name}")

    def function(self, name: str) -> Any:
        """Import a public function."""
        return getattr(self.module("operator"), name)

    def _class(self, file: str, name: str) -> Any:
        module, _, shared = name.partition(":")
        return getattr(import_module(module), shared) if shared else getattr(self.module(file), name)
