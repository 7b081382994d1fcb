"""What specs over the cursors of a batch have in common."""

from __future__ import annotations

from dataclasses import dataclass

from cute_ssm.spec import Spec


@dataclass(frozen=True)
class CursorSpec(Spec):
    """What kernels over the cursors of a batch have in common (`cute_ssm.serving`).

    Attributes
    ----------
    ring : bool
        The cursor beside the number of pending tokens is the start of a ring; else the index of the active buffer.
    src_dtype : str or None
        Type of ``state_batch_indices``.  None: sequence b uses slot b.
    cu_dtype : str or None
        Type of ``cu_seqlens``.  None: all sequences have the same number of tokens.
    """

    ring: bool
    src_dtype: str | None
    cu_dtype: str | None

    def text(self) -> str:
        layout = "ring" if self.ring else "double"
        return f"{self.op}-{layout}-{self.src_dtype}-{self.cu_dtype}"
