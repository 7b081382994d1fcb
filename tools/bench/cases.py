"""What is measured: the calls of models that people serve, by batch.  `cute_ssm.workloads` declares them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cute_ssm import workloads

QUICK = (1, 16, 128)
SHOWN = (1, 8, 64, 512)  # batches of the tables in docs/performance
TITLES = {
    "codestral-mamba": "Codestral-Mamba",
    "falcon-mamba": "Falcon-Mamba",
    "nemotron-3-super": "Nemotron-3-Super",
    "nemotron-nano": "Nemotron-Nano",
    "qwen3-next": "Qwen3-Next",
    "qwen3.5": "Qwen3.5",
}


@dataclass(frozen=True)
class Case:
    """Calls of one operator for one model, which differ in their number of requests only."""

    model: str
    op: str
    keys: tuple[tuple[str, int | str], ...]
    batches: tuple[int, ...]

    @property
    def name(self) -> str:
        """Model, part of it that a GPU has, and what tells this case from the model's others; without the operator."""
        keys = dict(self.keys)
        defaults = workloads.parameters(self.op)
        words = [TITLES.get(self.model, self.model)]
        if self.model == "nemotron-3-super":
            words.append(f"TP{128 // int(keys.get('nheads', defaults['nheads']))}")
        for key in ("T", "length"):
            if key in defaults:
                words.append(f"{key}={keys.get(key, defaults[key])}")
        words.append(str(keys.get("state_dtype", defaults["state_dtype"])))
        words += [str(keys["rounding"])] if keys.get("rounding") == "stochastic" else []
        words += ["verify"] if keys.get("verify", defaults.get("verify")) else []
        return " ".join(words)

    def call(self, batch: int) -> dict[str, int | str]:
        """Parameters of the call with ``batch`` requests."""
        return {**dict(self.keys), workloads.batch_key(self.op): batch}

    def line(self, batch: int, **more: Any) -> dict[str, Any]:
        """Return a line of benchmarks."""
        return {
            "op": self.op, "model": self.model, "case": self.name, "keys": dict(self.keys), "batch": batch, **more,
        }  # fmt: skip


def declared(
    ops: Sequence[str] | None = None, models: Sequence[str] | None = None, batches: Sequence[int] | None = None
) -> Iterator[Case]:
    """Yield the cases, of some operators and models only if these are named.

    ``batches`` above what an operator is usually called with are left out.

    Raises
    ------
    ValueError
        No such operator or model.
    """
    for op in ops or ():
        workloads.parameters(op)
    for model in models or workloads.models():
        for workload in workloads.of_model(model):
            usual = workload.batches
            chosen = usual if batches is None else tuple(b for b in batches if b <= max(usual))
            if chosen and (ops is None or workload.op in ops):
                yield Case(model, workload.op, workload.keys, chosen)
