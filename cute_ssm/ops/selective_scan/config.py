"""The config of `SelectiveScan`, and the rule that chooses it.

The bits of a result depend on the spec and on `splits`; the other fields only distribute the work.  A sequence's result
does not depend on its position in a packed batch, or on how many lanes share its channels.  It depends on the other
sequences of a call only through the number of parts, which is 1 if channels fill the GPU or sequences are short.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from cute_ssm.arch import WARP, Arch
from cute_ssm.ops.selective_scan.spec import SelectiveScanSpec
from cute_ssm.spec import Config
from cute_ssm.tuning import apply_override, tables

BLOCK = 8  # tokens that a lane works on at a time: 16 bytes of a 16-bit row
QUAD = 4  # neighbouring states that stay together
MAX_WARPS = 8  # of a CTA
LANES = 8  # of a channel, at most
LANE_STATES = 16  # of a lane, unless all lanes are in use: a state and its rate take two registers
COLUMN_PIECES = 4  # blocks of B and C that a thread loads at once, at most
BUSY_WARPS = 8  # per SM: with fewer, CTAs are smaller
SPLITS = (1, 2, 4, 8, 16, 32)  # of a sequence
PART_TOKENS = 128  # of a part, at least
SPLIT_GAIN = 1.3  # least gain of splits by `duration`: exceeds its error, as splitting changes results


class Work(NamedTuple):
    """Counted cost of a channel and a token.

    Attributes
    ----------
    per_state, fixed : float
        Instructions per state, and apart from states.
    per_lane : float
        Further instructions of each lane that shares the channel.
    functions : int
        Calls of the special function unit, apart from one per state.
    """

    per_state: float
    fixed: float
    per_lane: float
    functions: int


SCAN_WORK, CARRY_WORK = Work(5.7, 18.0, 13.5, 3), Work(4.6, 9.0, 9.0, 1)
SPECIAL_CLOCKS = 8  # of the special function unit for one function of a warp
# With the rest, `duration` agrees to 20 % with `gpumodel`, which was fitted to no measurement
LATENCY, STALLS = 80, 1.15  # clocks that a warp waits per token; factor that waits add to its instructions
PART_CLOCKS = 4000  # of a part before its first token
ROW_CLOCKS = 150  # of folding a row of `carried`: a quarter of the latency of L2, as four loads are in flight together
LAUNCH_CLOCKS = 3000  # of a second launch


@dataclass(frozen=True)
class SelectiveScanConfig(Config):
    """Knobs of `SelectiveScan`.

    Attributes
    ----------
    lanes : int
        Lanes that share a channel, each with a part of its states: a power of two up to `chains`.
    warps : int
        Warps of a CTA; they share the tokens' B and C.
    tokens : int
        Tokens of B and C that are staged at a time: a multiple of 8.
    ctas_per_sm : int
        Upper bound of the persistent grid, per SM.
    splits : int
        Parts of a sequence that are scanned at once, after a pass that computes what each carries to the next.
    """

    FREE: ClassVar[tuple[str, ...]] = ("lanes", "warps", "tokens", "ctas_per_sm")
    KEY: ClassVar[tuple[str, ...]] = ("input_dtype", "state_dtype", "dstate", "has_z", "query_dtype")

    lanes: int
    warps: int
    tokens: int
    ctas_per_sm: int
    splits: int = 1

    @property
    def launches(self) -> int:
        """Number of kernels that one call launches: two if sequences are scanned in parts."""
        return 1 if self.splits == 1 else 2

    def channels(self) -> int:
        """Return the number of channels of a CTA."""
        return WARP * self.warps // self.lanes

    def column_pieces(self, spec: SelectiveScanSpec) -> int:
        """Return how many blocks of B and C each thread brings per tile."""
        return -(-2 * padded_states(spec) * self.tokens // (BLOCK * WARP * self.warps))

    def shared_bytes(self, spec: SelectiveScanSpec) -> int:
        """Return the shared memory of one CTA in bytes: two tiles of B and C in float32."""
        return 2 * self.tokens * 2 * padded_states(spec) * 4

    def check(self, spec: SelectiveScanSpec, arch: Arch) -> None:
        """Raise `UnsupportedSpecError` if the kernel cannot run so."""
        fitting = {
            "lanes": self.lanes in lane_choices(spec),
            "warps": 1 <= self.warps <= MAX_WARPS,
            "tokens": self.tokens >= BLOCK and self.tokens % BLOCK == 0,
            "pieces": self.column_pieces(spec) <= 2 * COLUMN_PIECES,
            "ctas_per_sm": self.ctas_per_sm >= 1,
            "splits": self.splits >= 1,
            "shared memory": self.shared_bytes(spec) <= arch.shared_bytes,
        }
        self.refuse((name for name, good in fitting.items() if not good), spec, arch)

    @classmethod
    def space(cls, spec: SelectiveScanSpec, arch: Arch) -> dict[str, tuple[int, ...]]:
        """Return the values that the tuner tries for each field of `FREE`; not all combinations are valid."""
        return {
            "lanes": tuple(lane_choices(spec)),
            "warps": (1, 2, 4, 8),
            "tokens": (8, 16, 32, 64),
            "ctas_per_sm": (1, 2, 3, 4, 6, 8, 12),
        }


def chains(spec: SelectiveScanSpec) -> int:
    """Return the number of partial sums of h . C, a power of two, which is the most lanes that can share a channel."""
    quads = -(-spec.dstate // QUAD)
    return min(1 << (quads - 1).bit_length(), LANES if spec.dstate > 4 * LANE_STATES else 4)


def padded_states(spec: SelectiveScanSpec) -> int:
    """Return dstate rounded up so that every chain has the same number of quads."""
    multiple = QUAD * chains(spec)
    return -(-spec.dstate // multiple) * multiple


def lane_choices(spec: SelectiveScanSpec) -> list[int]:
    """Return how many lanes may share a channel, fewest first."""
    powers = (1, 2, 4, LANES)
    return [n for n in powers if n <= chains(spec) and (padded_states(spec) <= n * LANE_STATES or n == LANES)]


def carried_columns(spec: SelectiveScanSpec) -> int:
    """Return how many floats of a channel a part carries: whole quads of states, and a quad for the sum of delta'."""
    return -(-spec.dstate // QUAD) * QUAD + QUAD


def resident_warps(spec: SelectiveScanSpec, lanes: int, splits: int) -> int:
    """Return how many warps the registers of an SM hold; splits need registers to fold several rows at once."""
    return 8 if padded_states(spec) * (2 if splits > 1 else 1) >= LANE_STATES * lanes else 12


def duration(spec: SelectiveScanSpec, lanes: int, splits: int, channels: int, length: int, sm_count: int) -> float:
    """Return the estimated duration of a call in clocks.

    Per token, a warp waits `LATENCY`, and issues its instructions or occupies the special function unit, whichever
    takes longer, once for each warp on its quarter of an SM.  Every part except a sequence's last is scanned twice, the
    first time without outputs; the busiest SM has no last part.  Memory traffic is left out: at 16 states it takes half
    the time of the instructions, and splits add 70 to 90 % of the instructions but only half of the traffic.
    """
    warps = max(1.0, channels * lanes * splits / (WARP * 4 * sm_count))  # of a quarter
    at_once = min(warps, resident_warps(spec, lanes, splits) / 4)

    def of_token(work: Work) -> float:
        instructions = (work.per_state * spec.dstate + work.fixed) / lanes + work.per_lane
        special = SPECIAL_CLOCKS * (spec.dstate + work.functions) / lanes
        return (LATENCY + STALLS * max(instructions, special) * at_once) * warps / at_once

    tokens = length / splits
    if splits == 1:
        return of_token(SCAN_WORK) * tokens + PART_CLOCKS
    both = of_token(SCAN_WORK) + of_token(CARRY_WORK)
    return both * tokens + 2 * PART_CLOCKS + ROW_CLOCKS * splits + LAUNCH_CLOCKS


def parallelism(
    spec: SelectiveScanSpec, channels: int, length: int, sm_count: int, splits: int | None = None
) -> tuple[int, int]:
    """Return the (lanes, splits) with the shortest duration; unsplit unless splits gain `SPLIT_GAIN` or are given."""

    def time(choice: tuple[int, int]) -> float:
        return duration(spec, *choice, channels, length, sm_count)

    def best(counts: list[int]) -> tuple[int, int]:
        return min(((lanes, n) for n in counts for lanes in lane_choices(spec)), key=time)

    if splits is not None:
        return best([splits])
    whole, split = best([1]), best([n for n in SPLITS if n == 1 or length >= n * PART_TOKENS])
    return split if time(split) * SPLIT_GAIN <= time(whole) else whole


def choose(
    spec: SelectiveScanSpec, arch: Arch, channels: int, per_group: int, length: int, sm_count: int
) -> SelectiveScanConfig:
    """Return the config of a call.

    Parameters
    ----------
    channels : int
        (Sequence, channel) pairs.
    per_group : int
        Channels of a sequence that share B and C.
    length : int
        Tokens of a sequence, on average.
    """
    args = (spec, arch, channels, per_group, length, sm_count)
    rule = _choose(*args)
    asked = apply_override(rule).splits
    if asked != rule.splits and asked > 0:  # another number of lanes may be better then
        rule = _choose(*args, splits=asked)
    return apply_override(tables.tuned(rule, spec, arch, channels, SelectiveScanConfig.FREE))


@functools.lru_cache(maxsize=4096)
def _choose(
    spec: SelectiveScanSpec,
    arch: Arch,
    channels: int,
    per_group: int,
    length: int,
    sm_count: int,
    splits: int | None = None,
) -> SelectiveScanConfig:
    """Return the rule's config: as few lanes per channel and parts, and as many warps per CTA, as keep all SMs busy."""
    lanes, splits = parallelism(spec, channels, length, sm_count, splits)
    resident = channels * lanes * splits / (WARP * sm_count)
    warps = 4 if resident >= BUSY_WARPS else 2 if resident >= BUSY_WARPS / 2 else 1
    while warps > 1 and WARP * (warps // 2) >= per_group * lanes:
        warps //= 2
    pieces = COLUMN_PIECES
    if padded_states(spec) > LANE_STATES * lanes:
        warps, pieces = MAX_WARPS, COLUMN_PIECES // 2  # fewer registers for B and C: the states need more
    rows = 2 * padded_states(spec)
    tokens = next((n for n in (32, 16) if rows * n <= pieces * BLOCK * WARP * warps), BLOCK)
    config = SelectiveScanConfig(lanes, warps, tokens, ctas_per_sm=1, splits=splits)
    fitting = arch.shared_bytes // (config.shared_bytes(spec) + 1024)
    return replace(config, ctas_per_sm=max(1, min(fitting, resident_warps(spec, lanes, splits) // warps)))
