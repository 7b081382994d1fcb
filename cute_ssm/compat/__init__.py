"""Thin wrappers of this package's operators with the signatures and conventions of other packages."""
