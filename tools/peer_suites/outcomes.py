"""What becomes of a case of a suite."""

PASSED = "passed"
NO_KERNEL = "passed without a kernel"  # no launch: a refusal, or a test of the host
NOT_APPLICABLE = "not applicable"
SKIPPED = "skipped by the suite"
TOO_LONG, TOO_LARGE = "over the time", "over the memory"
LEFT_OUT = "left out"
FAILED, STALE = "failed", "rule is stale"
NOT_SHOWN = (SKIPPED, TOO_LONG, TOO_LARGE)  # a case ran, or was to, and says nothing
