"""Findings of racecheck, and the error that tells them, those of one cause together."""

from __future__ import annotations

import re
from typing import NamedTuple

from .errors import RaceError

SHOWN = 10  # causes of one error
MORE = 4  # further places of one cause


class Finding(NamedTuple):
    """``where``: the memory concerned, '' for shared memory; ``lines``: PTX lines, the earlier access first."""

    kind: str
    where: str
    lines: tuple
    text: str


def cause(finding, sources):
    """What findings of one cause have in common: kind, memory, and the functions that access it.

    Without a line table nothing is known of functions, and every pair of instructions is a cause of its own.
    """
    chains = [sources.at(line) for line in finding.lines]
    if not all(chains):
        return finding.kind, finding.where, finding.lines
    return finding.kind, finding.where, *(re.sub(r":\d+", "", chain) for chain in chains)


def race_error(program, findings, then=""):
    """The RaceError of a launch; ``then`` says what else went wrong."""
    sources = program.loaded.sources
    groups = {}
    for finding in findings:
        groups.setdefault(cause(finding, sources), []).append(finding)
    lines = [f"racecheck: {len(findings)} finding(s) in kernel {program.kernel.name}"]
    if len(groups) < len(findings):
        lines[0] += f", of {len(groups)} cause(s)"
    for group in list(groups.values())[:SHOWN]:
        if len(group) > 1:
            lines.append(f"{len(group)} findings of one cause, first:")
        lines.append(group[0].text)
        if len(group) > 1:
            places = ["; ".join(map(sources.place, finding.lines)) for finding in group[1 : 1 + MORE]]
            lines += [f"    also at: {place}" for place in places]
            if len(group) > 1 + MORE:
                lines.append(f"    and {len(group) - 1 - MORE} more")
    if len(groups) > SHOWN:
        lines.append(f"and {len(groups) - SHOWN} causes more")
    return RaceError("\n".join([*lines, then] if then else lines))
