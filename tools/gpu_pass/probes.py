"""Kernels that measure a GPU's arithmetic, and one that is long: their specs; `probe_kernels` has the code.

They go through the package's runtime, so that a bundle holds them and a machine without the compiler runs them.
"""

from __future__ import annotations

from dataclasses import dataclass

from cute_ssm.arch import Arch
from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.runtime import registry
from cute_ssm.spec import Config, Spec

FUNCTIONS = ("ex2", "rcp", "rsqrt", "lg2")
OPERANDS = {"float16": (4, 2), "bfloat16": (4, 2), "tf32": (4, 2)}  # words per lane of A and B
LONG_INSTRUCTIONS = 16384  # of 16 bytes: more than the instruction caches of an SM hold


@dataclass(frozen=True)
class ProbeConfig(Config):
    """Nothing may change."""

    def check(self, spec: Spec, arch: Arch) -> None:
        """Every probe runs everywhere."""


@dataclass(frozen=True)
class _Probe(Spec):
    @property
    def op(self) -> str:
        return "probe"


@dataclass(frozen=True)
class ApproximateSpec(_Probe):
    """``out[f, i]``: the f-th of `FUNCTIONS` of ``x[f, i]``, by the approximate instruction."""

    def text(self) -> str:
        return "approximate"


@dataclass(frozen=True)
class MatrixSpec(_Probe):
    """``d[i]``: the fragments of one matrix instruction, of ``a[i]``, ``b[i]`` and ``c[i]``, a warp each."""

    operands: str = "float16"

    def text(self) -> str:
        return f"matrix-{self.operands}"

    def check(self) -> None:
        if self.operands not in OPERANDS:
            raise UnsupportedSpecError(describe("operands", " or ".join(OPERANDS), repr(self.operands)))


@dataclass(frozen=True)
class LongSpec(_Probe):
    """A kernel of `instructions` that do nothing of use, so that caches of instructions hold nothing else after it."""

    instructions: int = LONG_INSTRUCTIONS

    def text(self) -> str:
        return f"long-{self.instructions}"

    def check(self) -> None:
        if self.instructions <= 0 or self.instructions % 256:
            raise UnsupportedSpecError(describe("instructions", "a positive multiple of 256", self.instructions))


def register() -> None:
    """Make the probes known to the runtime."""
    for spec, name in ((ApproximateSpec, "Approximate"), (MatrixSpec, "Matrix"), (LongSpec, "Long")):
        registry.register(spec, f"gpu_pass.probe_kernels:{name}")


def kernels(arch: Arch) -> list[tuple[Spec, Config, Arch]]:
    """Return the kernels of all probes."""
    register()
    specs = [ApproximateSpec(), *(MatrixSpec(operands) for operands in OPERANDS), LongSpec()]
    return [(spec, ProbeConfig(), arch) for spec in specs]
