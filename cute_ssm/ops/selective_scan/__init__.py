"""`cute_ssm.selective_scan` and `cute_ssm.selective_scan_fn`."""

from __future__ import annotations

from cute_ssm.ops._operator import Operator
from cute_ssm.ops.selective_scan.config import SelectiveScanConfig
from cute_ssm.ops.selective_scan.spec import SelectiveScanSpec

OPERATOR = Operator(
    package=__name__,
    functions=("selective_scan", "selective_scan_fn"),
    spec=SelectiveScanSpec,
    config=SelectiveScanConfig,
    kernel="SelectiveScan",
)
