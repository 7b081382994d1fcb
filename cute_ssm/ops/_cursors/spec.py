"""`CursorSpec`: fields that the specs over the cursors of a batch share."""

from __future__ import annotations

from dataclasses import dataclass

from cute_ssm.spec import Spec


@dataclass(frozen=True)
class CursorSpec(Spec):
    """Base of the specs of `commit` and `build_work_items` (`cute_ssm.serving`).

    Attributes
    ----------
    ring : bool
        Cursors are first rows of rings (``ring_start``); otherwise indices of active buffers (``cache_buf_idx``).
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
