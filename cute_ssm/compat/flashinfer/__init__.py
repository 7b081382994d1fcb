"""Modules named like FlashInfer's."""
