"""What ptxas reports about a compiled kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass

_KERNEL = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'(.*?)(?=Compiling entry function|\Z)", re.S)


@dataclass(frozen=True)
class KernelInfo:
    """Resources of one kernel; ``spill_bytes`` adds up spill stores and loads, ``shared_bytes`` is static."""

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    stack_bytes: int = 0


def parse(text):
    """KernelInfo of every entry function in the output of ``ptxas -v``."""
    out, text = [], " ".join(text.split())
    for name, _, body in _KERNEL.findall(text):

        def number(pattern, body=body):
            found = re.search(pattern, body)
            return int(found.group(1)) if found else 0

        if not re.search(r"Used \d+ registers", body):
            continue
        out.append(
            KernelInfo(
                name,
                number(r"Used (\d+) registers"),
                number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
                number(r"(\d+) bytes smem"),
                number(r"(\d+) bytes stack frame"),
            )
        )
    return out
