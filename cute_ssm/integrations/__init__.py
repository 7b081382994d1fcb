"""Run models of other packages with this package's operators."""
