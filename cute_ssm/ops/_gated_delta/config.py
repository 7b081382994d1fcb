"""The config of the kernels of the gated delta rule, and the rule that chooses one.

The bits of a result depend on the spec alone, which determines `sequential`; `rows` and `warps` only distribute rows of
the state.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, Protocol

from cute_ssm.arch import Arch
from cute_ssm.ops._gated_delta.layout import PART_BYTES, TILE, part_bytes
from cute_ssm.ops._gated_delta.spec import GatedDeltaSpec, Sizes
from cute_ssm.spec import Config
from cute_ssm.tuning import apply_override, tables

MAX_TILES = 4  # of a warp
MAX_WARPS = 8  # of a CTA
MAX_ROWS = 128  # of a CTA, by the rule


class SizedSpec(Protocol):
    """A spec of the family."""

    @property
    def sizes(self) -> Sizes: ...

    def text(self) -> str: ...


@dataclass(frozen=True)
class GatedDeltaRuleConfig(Config):
    """Config of all kernels of the gated delta rule.

    Attributes
    ----------
    rows : int
        Rows of one head's state that a CTA works on: a divisor of V.
    warps : int
        Warps of a CTA, each of which works on ``rows / warps`` rows.
    sequential : int
        1: process one token after the other, up to `Sizes.sequential_tokens`.  0: process all tokens by products.
    """

    FREE: ClassVar[tuple[str, ...]] = ("rows", "warps")
    KEY: ClassVar[tuple[str, ...]] = ("state_dtype", "K", "V", "tokens")

    rows: int
    warps: int
    sequential: int = 0

    def tiles(self) -> int:
        """Return the number of tiles of each warp."""
        return self.rows // (TILE * self.warps)

    def shared_bytes(self, spec: SizedSpec) -> int:
        """Return the bytes of shared memory of one CTA."""
        if self.sequential:
            return 0
        end = 0
        for size in part_bytes(spec.sizes, self.rows).values():
            end = -(-end // PART_BYTES) * PART_BYTES + size
        return end

    def check(self, spec: SizedSpec, arch: Arch) -> None:
        """Raise `UnsupportedSpecError` if no kernel can run with this config."""
        sizes = spec.sizes
        even = 1 <= self.warps <= MAX_WARPS and self.rows % (TILE * self.warps) == 0
        fitting = {
            "rows": self.rows >= TILE and sizes.V % self.rows == 0,
            "warps": even and self.tiles() <= (1 if sizes.one_tile else MAX_TILES),
            "shared memory": self.shared_bytes(spec) <= arch.shared_bytes,
            "sequential": not self.sequential or sizes.tokens <= sizes.sequential_tokens,
        }
        self.refuse((name for name, good in fitting.items() if not good), spec, arch)

    @classmethod
    def space(cls, spec: GatedDeltaSpec, arch: Arch) -> dict[str, tuple[int, ...]]:
        """Return the values that the tuner tries for each field of `FREE`; not all combinations are valid."""
        return {"rows": row_choices(spec.V, 256), "warps": tuple(range(1, MAX_WARPS + 1))}


def choose(spec: GatedDeltaSpec, arch: Arch, heads: int, sm_count: int) -> GatedDeltaRuleConfig:
    """Return the config for ``heads`` (request, value head) pairs on ``sm_count`` SMs.

    A tuning table takes precedence over the rule, and `tuning.override` over both.
    """
    return apply_override(
        tables.tuned(_choose(spec.sizes, heads, sm_count), spec, arch, heads, GatedDeltaRuleConfig.FREE)
    )


def choose_untuned(spec: SizedSpec, heads: int, sm_count: int) -> GatedDeltaRuleConfig:
    """Return the config of the rule alone, for kernels that are not tuned; `tuning.override` takes precedence."""
    return apply_override(_choose(spec.sizes, heads, sm_count))


def row_choices(V: int, most: int) -> tuple[int, ...]:
    """Return the numbers of rows that a CTA may have: multiples of a tile up to ``most`` that divide V, ascending."""
    return tuple(rows for rows in range(TILE, most + 1, TILE) if V % rows == 0)


def warp_choice(tiles: int, most: int) -> int:
    """Return the largest divisor of ``tiles`` up to ``most``, or ``tiles`` if a warp would get too many of them."""
    warps = max(n for n in range(1, most + 1) if tiles % n == 0)
    return warps if tiles // warps <= MAX_TILES else tiles


@functools.lru_cache(maxsize=4096)
def _choose(sizes: Sizes, heads: int, sm_count: int) -> GatedDeltaRuleConfig:
    """Choose 128 rows if that makes two CTAs for every SM, otherwise fewer, down to one tile for each of two warps.

    A warp has two tiles, so that one arrives while the other is multiplied, or one tile of 256 columns; over several
    chunks of tokens it has one, in registers.  A single token
    takes the sequential path: with few requests, the latency of the longest chain of instructions determines the time,
    and that path is shorter; with many, memory determines it, and the additional instructions are hidden.  For two
    tokens, that path takes three times the instructions of products.
    """
    wide = sizes.K > 128  # a tile fills the registers of a warp
    most = MAX_ROWS
    if sizes.pending_tokens and wide and sizes.tokens <= 8:
        most = 4 * TILE  # with eight warps of one tile each, sm_100a spills; with four warps and more tokens, sm_90a
    choices = list(row_choices(sizes.V, most))
    rows = choices.pop()
    while choices and rows > 2 * TILE and heads * (sizes.V // rows) < 2 * sm_count:
        rows = choices.pop()
    sequential = sizes.sequential_tokens > 0 and sizes.tokens == 1
    warps = rows // TILE if sizes.one_tile else warp_choice(rows // TILE, MAX_WARPS if wide else 4)
    return GatedDeltaRuleConfig(rows, warps, sequential=int(sequential))
