"""Python lines of PTX instructions.

`Frames` makes a CuTe DSL compile note who emitted every operation: the line table of the PTX (``.file``, ``.loc``) then
has the innermost line, and its column is the number of a short call chain, which `note` appends to the PTX as comments.
`SourceMap` reads that, and the plain line tables of other compilers.  The code is the same with and without.
"""

from __future__ import annotations

import bisect
import contextlib
import re
import sys
from pathlib import PurePath
from unittest import mock

DEPTH = 3  # functions of a call chain
MOST = 65535  # columns of a line table
NOTE = "// source "
STOP = ()  # in place of a frame: the end of a chain
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)")
_GENERATED = re.compile(r"(_block|_region|_body)_\d+$|<(listcomp|genexpr|dictcomp|setcomp)>$")


def short(path):
    """The last two parts of a path: what tells files of one tree apart."""
    return "/".join(PurePath(path).parts[-2:])


class Frames:
    """Call chains met during a compile; ``locate`` is a location transform of the DSL.

    Chains end at the file ``caller``, which compiles.  ``context`` says whether an operation is being made, and
    ``location`` makes a location of file, line and column.

    Operations that follow each other are mostly made by the same frames, and the callers of a frame stand still while
    it runs: ``held`` has the frames of the last operation, each with the chain of its callers.
    """

    def __init__(self, caller, is_framework, context, location):
        self.caller, self.is_framework, self.context, self.location = caller, is_framework, context, location
        self.codes, self.chains, self.held = {}, {}, {}

    @contextlib.contextmanager
    def installed(self, op):
        """Give every operation that is made its location; ``op`` is the DSL's module of that."""
        with mock.patch.object(op, "_get_caller_frame_info", lambda: None), op.loc_transform(self.locate):
            try:
                yield
            finally:
                self.held.clear()  # whose frames hold this object

    def code(self, frame):
        """(file, function, whether the function is part of the next one outwards), or None for the compiler's own."""
        code = frame.f_code
        if code.co_filename == self.caller:
            return STOP
        found = self.codes.get(code, False)
        if found is False:
            found = None
            if not self.is_framework(frame):
                found = (code.co_filename, code.co_name, _GENERATED.search(code.co_name) is not None)
            self.codes[code] = found
        return found

    def locate(self, loc):
        """The location of an operation that is being made, unless it has one: that of the operation it is part of."""
        if loc is not None or not self.context():
            return loc
        inner, tail, frame, held = [], (), sys._getframe(2), self.held
        while frame is not None:
            code = self.codes.get(frame.f_code, False)
            if code is False:
                code = self.code(frame)
            if code is STOP:
                break
            if code is not None:
                inner.append((frame, code))
                if frame in held:
                    tail = held[frame]
                    break
            frame = frame.f_back
        if not inner:
            return None
        while held and next(reversed(held)) is not frame:  # of frames that have returned
            held.popitem()
        for frame, code in reversed(inner):
            held[frame] = tail
            line = frame.f_lineno
            if not code[2]:
                tail = (code, line, *tail[: 2 * (DEPTH - 1)])
            elif tail:
                tail = (tail[0], line, *tail[2:])
        number = self.chains.setdefault(tail, len(self.chains) + 1)
        return self.location(inner[0][1][0], line, number if number <= MOST else 0)

    def note(self, ptx):
        """The PTX text, followed by the chains that it refers to."""
        used = {int(column) for _, _, column in _LOC.findall(ptx)}
        lines = [ptx.rstrip("\0\n")]
        for chain, number in self.chains.items():
            if number in used:
                text = " < ".join(
                    f"{short(file)}:{line} ({function})"
                    for (file, function, _), line in zip(chain[::2], chain[1::2], strict=True)
                )
                lines.append(f"{NOTE}{number}: {text}")
        return "\n".join(lines) + "\n"


class SourceMap:
    """What a PTX text says of its sources."""

    def __init__(self, text):
        self.files = {int(number): short(path) for number, path in _FILE.findall(text)}
        self.chains = {}
        if NOTE in text:
            notes = re.findall(rf"^{re.escape(NOTE)}(\d+): (.*)$", text, re.M)
            self.chains = {int(number): chain for number, chain in notes}
        self.lines, self.entries = [], []
        if self.files:
            for number, line in enumerate(text.splitlines(), 1):
                found = _LOC.match(line.lstrip()) if ".loc" in line else None
                if found:
                    self.lines.append(number)
                    self.entries.append(tuple(map(int, found.groups())))

    def at(self, line):
        """``file.py:line (function)`` of a PTX line, callers behind ``<``; or an empty string."""
        at = bisect.bisect_right(self.lines, line) - 1
        if at < 0:
            return ""
        file, row, column = self.entries[at]
        if self.chains.get(column):
            return self.chains[column]
        return f"{self.files.get(file, '?')}:{row}" if row else ""

    def place(self, line):
        """The source of a PTX line, if it is known, and the PTX line."""
        source = self.at(line)
        return f"{source} | PTX line {line}" if source else f"PTX line {line}"
