"""`cute_ssm.selective_scan` and `cute_ssm.selective_scan_fn`."""

from __future__ import annotations

from cute_ssm.ops._operator import Operator

OPERATOR = Operator(
    package=__name__,
    functions=("selective_scan", "selective_scan_fn"),
    spec="SelectiveScanSpec",
    config="SelectiveScanConfig",
    kernel="SelectiveScan",
)
