"""State-space-model decode kernels in NVIDIA's CuTe DSL, for PyTorch tensors.

Importing this package loads neither the compiler nor CUDA and reads no environment; names are resolved on first use.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cute_ssm.ops.checkpointing_ssu.operator import checkpointing_ssu as checkpointing_ssu
    from cute_ssm.ops.checkpointing_ssu.operator import checkpointing_ssu_ring as checkpointing_ssu_ring
    from cute_ssm.ops.gated_delta_rule_mtp.operator import gated_delta_rule_mtp as gated_delta_rule_mtp
    from cute_ssm.ops.gated_delta_rule_replay.operator import gated_delta_rule_replay as gated_delta_rule_replay
    from cute_ssm.ops.selective_scan.operator import selective_scan as selective_scan
    from cute_ssm.ops.selective_scan.operator import selective_scan_fn as selective_scan_fn
    from cute_ssm.ops.selective_state_update.operator import selective_state_update as selective_state_update

__version__ = "0.1.0"
_IMPORTED = time.time()  # no module of this package has been read before

from cute_ssm.ops import operators  # noqa: E402

_PUBLIC = {name: operator for operator in operators() if operator.home == __name__ for name in operator.functions}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cute_ssm' has no attribute {name!r}")
    value = _PUBLIC[name].function(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
