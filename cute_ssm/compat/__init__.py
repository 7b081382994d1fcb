"""Signatures and conventions of other packages, thin over this one's operators."""
