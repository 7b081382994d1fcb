"""Plans: how calls run, by everything that the choice depends on, so that a repeated call makes no choice again."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

from cute_ssm.env import logger, settings
from cute_ssm.tuning import overridden

P = TypeVar("P")

MOST_PLANS = 4096

# What a kernel's entry raises before anything is launched: strides or alignment are others than last time, or an
# argument is bad.  The operator then examines the arguments one by one.
REFUSALS = (TypeError, ValueError)


class Plans(dict[Hashable, P]):
    """Plans by key, at most `MOST_PLANS`, which bounds the memory that varying shapes take.

    A key holds everything that a kernel is chosen by, and what its own entry does not check before it launches.
    """

    noted = False  # that a plan refused a call in which the checks found nothing wrong

    def remember(self, key: Hashable, plan: P) -> None:
        """Keep a plan, unless its config is one of `tuning.override`, or its arguments have no key."""
        if key is None or overridden():
            return
        if key in self:
            if not self.noted and settings().log != "off":
                self.noted = True
                logger().info("a plan refused arguments that are right: calls like this one are examined anew: %r", key)
        elif len(self) >= MOST_PLANS:
            self.clear()
        self[key] = plan
