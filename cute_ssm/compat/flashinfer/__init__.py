"""Modules with the names of FlashInfer's modules."""
