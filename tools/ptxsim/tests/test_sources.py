"""Call chains of operations: those that a walk from each operation out to the compile finds."""

from __future__ import annotations

import random
import sys

from ptxsim import sources


def brute(frame, caller, is_framework):
    """((file, function), line) of the innermost functions, generated code being part of the function around it."""
    chain, line = [], 0
    while frame is not None and frame.f_code.co_filename != caller:
        if not is_framework(frame):
            line = line or frame.f_lineno
            if not sources._GENERATED.search(frame.f_code.co_name):
                chain.append((frame.f_code.co_filename, frame.f_code.co_name, line))
                line = 0
        frame = frame.f_back
    return chain[: sources.DEPTH]


CALLER = "compiler.py"
PROGRAM = """
def operation(check):
    return check()

def framework(call, check):
    return call(check)

def leaf(check):
    operation(check)
    operation(check); operation(check)

def inner(check):
    for _ in range(rng.randint(0, 2)):
        leaf(check)
    def then_block_3(check):
        operation(check)
        framework(leaf, check)
        operation(check)
    framework(then_block_3, check)
    leaf(check)

def outer(check, depth=0):
    framework(inner, check)
    inner(check)
    if depth < 3 and rng.random() < 0.7:
        outer(check, depth + 1)
        operation(check)
        framework(inner, check)
"""


def test_chains_are_those_of_a_walk_over_all_frames():
    def framework(frame):
        return frame.f_code.co_name in ("framework", "operation", "check")

    found, places, most = [], [], [0]
    frames = sources.Frames(CALLER, framework, lambda: True, lambda *place: places.append(place) or place)

    def transform(loc):  # the DSL applies a transform two calls below the operation
        return frames.locate(loc)

    def check():
        file, line, number = transform(None)
        most[0] = max(most[0], len(frames.held))
        found.append((file, line, number, brute(sys._getframe(1), CALLER, framework)))

    scope = {"rng": random.Random(0)}
    exec(compile(PROGRAM, "program.py", "exec"), scope)
    compiled = compile("outer(check)", CALLER, "exec")
    for _ in range(20):
        exec(compiled, {**scope, "check": check})
    chains = {number: chain for chain, number in frames.chains.items()}
    assert len(found) > 500 and len(chains) > 20
    for file, line, number, want in found:
        chain = chains[number]
        got = [(*code[:2], at) for code, at in zip(chain[::2], chain[1::2], strict=True)]
        assert got == want
        assert (file, line) == ("program.py", want[0][2])
    assert frames.locate("given") == "given"
    assert most[0] < 40, "frames that have returned are not held"
