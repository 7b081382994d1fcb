"""What tests of machine code need beside the emulator: the extra 'sass'."""

from __future__ import annotations

import pytest


def needed() -> None:
    """Skip the test where machine code cannot be read; CI installs what reads it."""
    pytest.importorskip("scipy", reason="machine code is counted with scipy")
    sass = pytest.importorskip("ptxsim.sass")
    try:
        sass.disassembler()
    except sass.DisassemblerError as error:
        pytest.skip(str(error))
