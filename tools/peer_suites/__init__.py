"""Test suites of other packages over `cute_ssm.compat`; see docs/peers.md."""
