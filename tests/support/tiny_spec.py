"""Spec and config of `tiny_kernel`, and its registration; imports no compiler."""

from __future__ import annotations

from dataclasses import dataclass

from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.runtime import registry
from cute_ssm.spec import Config, Spec


@dataclass(frozen=True)
class TinySpec(Spec):
    dtype: str = "float32"
    factor: float = 2.0

    @property
    def op(self) -> str:
        return "tiny"

    def text(self) -> str:
        return f"tiny-{self.dtype}"

    def check(self) -> None:
        if self.dtype not in ("float32", "float16"):
            raise UnsupportedSpecError(f"dtype: expected float32 or float16, got {self.dtype}")


@dataclass(frozen=True)
class TinyConfig(Config):
    threads: int = 128


registry.register(TinySpec, "tiny_kernel:Tiny")
