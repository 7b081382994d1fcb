"""The config of the kernels of the gated delta rule, and the choice of one.

The bits of a result depend on the spec alone: it decides `sequential`, and the other fields only move rows of the state
between warps.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, Protocol

from cute_ssm.arch import Arch
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.ops._gated_delta.spec import GatedDeltaSpec
from cute_ssm.spec import Config
from cute_ssm.tuning import apply_override, tables

TILE = 16  # rows of the state that a warp works on at a time
KEY_PAD = 8  # floats between rows of keys in shared memory: no access to them meets a bank twice
VALUE_PAD = 8  # elements between rows of values
MAX_TILES = 4  # of a warp
MOST_WARPS = 8  # of a CTA
MOST_ROWS = 128  # of a CTA
PART_BYTES = 128  # alignment of each part of shared memory
PENDING = 8  # tokens of a ring that are passed at once


class StepSpec(Protocol):
    """Any spec of the family: that of steps, or one that says which steps run over the same states."""

    @property
    def V(self) -> int: ...

    @property
    def steps(self) -> GatedDeltaSpec: ...

    def text(self) -> str: ...


@dataclass(frozen=True)
class GatedDeltaRuleConfig(Config):
    """Knobs of `GatedDeltaRule`, `GatedDeltaRuleReplay` and `MaterializeGatedDelta`.

    Attributes
    ----------
    rows : int
        Rows of one head's state that a CTA works on: a divisor of V.
    warps : int
        Warps of a CTA, which share the rows.
    sequential : int
        1: one token after the other, up to `GatedDeltaSpec.sequential_tokens` of them.  0: all tokens by products.
    """

    FREE: ClassVar[tuple[str, ...]] = ("rows", "warps")
    KEY: ClassVar[tuple[str, ...]] = ("state_dtype", "K", "V", "tokens")

    rows: int
    warps: int
    sequential: int = 0

    def tiles(self) -> int:
        """Tiles of rows of each warp."""
        return self.rows // (TILE * self.warps)

    def shared_bytes(self, spec: StepSpec) -> int:
        """Shared memory of one CTA."""
        if self.sequential:
            return 0
        end = 0
        for size in shared_parts(spec.steps, self.rows).values():
            end = -(-end // PART_BYTES) * PART_BYTES + size
        return end

    def check(self, spec: StepSpec, arch: Arch) -> None:
        """Raise `UnsupportedSpecError` if the kernel cannot run so."""
        even = 1 <= self.warps <= MOST_WARPS and self.rows % (TILE * self.warps) == 0
        problems = {
            "rows": self.rows >= TILE and spec.V % self.rows == 0,
            "warps": even and self.tiles() <= MAX_TILES,
            "shared memory": self.shared_bytes(spec) <= arch.shared_bytes,
            "sequential": not self.sequential or spec.steps.tokens <= spec.steps.sequential_tokens,
        }
        bad = [name for name, good in problems.items() if not good]
        if bad:
            raise UnsupportedSpecError(f"config: {', '.join(bad)} of {self} do not fit {spec.text()} on {arch.name}")

    @classmethod
    def space(cls, spec: GatedDeltaSpec, arch: Arch) -> dict[str, tuple[int, ...]]:
        """Return the values that the tuner tries for each field of `FREE`; not all combinations are valid."""
        return {"rows": row_choices(spec.V, 256), "warps": tuple(range(1, MOST_WARPS + 1))}


def chunk_tokens(spec: GatedDeltaSpec) -> int:
    """Return the tokens of a chunk: the smallest has four."""
    return max(spec.tokens, 4)


def zeros_at(tokens: int, K: int) -> int:
    """Return where a row of zeros lies behind keys and queries, in floats: on the banks of row 3.

    That row is absent whenever zeros are read in place of any.
    """
    return 2 * tokens * (K + KEY_PAD) + 3 * KEY_PAD


def shared_parts(spec: GatedDeltaSpec, rows: int) -> dict[str, int]:
    """Bytes of what a CTA keeps in shared memory: keys and queries, values, and the coefficients of each chunk.

    Pending tokens come before new ones; behind the keys of calls that write states lies a row of zeros.
    """
    tokens, pending = chunk_tokens(spec), spec.pending_tokens
    tables = sum(table_parts(PENDING, queries=False).values())
    zeros = 0
    if spec.zero_row:
        zeros = zeros_at(tokens, spec.K) + spec.K - 2 * tokens * (spec.K + KEY_PAD)
    return {
        "keys": ((pending + 2 * tokens) * (spec.K + KEY_PAD) + zeros) * 4,
        "values": (pending + max(tokens, 8)) * (rows + VALUE_PAD) * 2,
        **({"pending": pending // PENDING * tables} if pending else {}),
        **table_parts(tokens),
    }


def table_parts(tokens: int, queries: bool = True) -> dict[str, int]:
    """Bytes of the coefficients of a chunk of tokens."""
    table = tokens * (tokens + 4) * 4
    return {
        "weights": table + (tokens + 4) * 4,  # of tokens in the state after each, and before the first
        "solve": table,
        **({"mix": table} if queries else {}),
        "solution": 2 * table if tokens == 4 else table,  # there, the outputs' coefficients follow
        "vectors": 2 * tokens * 4,
    }


def choose(spec: GatedDeltaSpec, arch: Arch, heads: int, sm_count: int) -> GatedDeltaRuleConfig:
    """Return the config for ``heads`` (request, value head) pairs on ``sm_count`` SMs, as `tuning.override` has it."""
    return apply_override(tables.tuned(_choose(spec, heads, sm_count), spec, arch, heads, GatedDeltaRuleConfig.FREE))


def choose_materialize(spec: StepSpec, heads: int, sm_count: int) -> GatedDeltaRuleConfig:
    """Return the config of `MaterializeGatedDelta`: that of steps over the same states."""
    return apply_override(_choose(spec.steps, heads, sm_count))


def row_choices(V: int, most: int) -> tuple[int, ...]:
    """Return the rows that a CTA may work on, ascending: whole tiles that divide V, up to ``most``."""
    return tuple(rows for rows in range(TILE, most + 1, TILE) if V % rows == 0)


def warp_choice(tiles: int, most: int) -> int:
    """Return the largest number of warps up to ``most`` that share tiles evenly; more where each would get too many."""
    warps = max(n for n in range(1, most + 1) if tiles % n == 0)
    return warps if tiles // warps <= MAX_TILES else tiles


@functools.lru_cache(maxsize=4096)
def _choose(spec: GatedDeltaSpec, heads: int, sm_count: int) -> GatedDeltaRuleConfig:
    """128 rows if there are two such parts for every SM; else fewer, down to a tile for each of two warps.

    A warp has two tiles, of which one arrives while the other is multiplied, or one of 256 columns.  A single
    token is passed by itself: a call with few requests, which the length of the longest chain decides, is faster then,
    and one with many, which the memory decides, has time for the instructions that it takes more.  Two tokens would
    take thrice those of products.
    """
    wide = spec.K > 128  # a tile fills the registers of a warp: one each
    most = MOST_ROWS
    if spec.pending_tokens and wide and spec.tokens <= 8:
        most = 4 * TILE  # with eight warps of a tile each, sm_100a spills; with four and more tokens, sm_90a
    choices = list(row_choices(spec.V, most))
    rows = choices.pop()
    while choices and rows > 2 * TILE and heads * (spec.V // rows) < 2 * sm_count:
        rows = choices.pop()
    alone = spec.sequential_tokens > 0 and spec.tokens == 1
    warps = warp_choice(rows // TILE, MOST_WARPS if wide else 4)
    return GatedDeltaRuleConfig(rows, warps, sequential=int(alone))
