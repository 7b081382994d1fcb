"""Plans: what calls run by, kept by all that the choice depends on, so that a steady state decides nothing again."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

from cute_ssm.tuning import overridden

P = TypeVar("P")

MOST_PLANS = 4096

# What a plan's kernel, or the arguments it is given, may raise before anything is launched: other strides or alignment
# than last time, or a bad argument.  The operator then examines the arguments one by one.
REFUSALS = (TypeError, ValueError, IndexError, AttributeError)


class Plans(dict[Hashable, P]):
    """Plans by key, `MOST_PLANS` at most: sizes come and go.

    A key holds everything that a kernel is chosen by, and what its own entry does not check before it launches.
    """

    def remember(self, key: Hashable, plan: P) -> None:
        """Keep a plan, unless its config is one of `tuning.override`, or its arguments have no key."""
        if key is None or overridden():
            return
        if len(self) >= MOST_PLANS and key not in self:
            self.clear()
        self[key] = plan
