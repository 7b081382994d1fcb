"""Folders of the repository."""

from __future__ import annotations

from pathlib import Path

SUPPORT = Path(__file__).parent  # modules that tests share
ROOT = SUPPORT.parents[1]
