"""The spec of `cute_ssm.serving.commit`."""

from __future__ import annotations

from dataclasses import dataclass

from cute_ssm.ops._cursors.spec import CursorSpec


@dataclass(frozen=True)
class CommitSpec(CursorSpec):
    """A call of `cute_ssm.serving.commit`.

    Attributes
    ----------
    accepted_dtype : str
        Type of ``num_accepted_tokens``.
    seeds : bool
        ``rand_seed`` is given and advances too.
    unallocated : bool
        ``unallocated`` is given.
    """

    accepted_dtype: str
    seeds: bool
    unallocated: bool = False

    @property
    def op(self) -> str:
        return "serving_commit"
