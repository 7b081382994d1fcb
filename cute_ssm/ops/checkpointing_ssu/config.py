"""The config of `CheckpointingSSU`, the shared memory that it needs, and the rule that chooses one.

No field of a config changes a bit of a result: the spec alone fixes the order of sums.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from cute_ssm.arch import WARP, Arch
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.ops.checkpointing_ssu.spec import CheckpointingSSUSpec
from cute_ssm.spec import ITEMSIZE, Config
from cute_ssm.tuning import apply_override, tables

ROWS = 16  # of a matrix product; tiles are multiples of it
TOKENS = 8  # columns of a matrix product: new tokens that it takes
STEP = 16  # positions of a product over the history
ROW_PAD = 16  # bytes after a row of inputs: eight rows then use every bank once
ALIGNMENT = 1024  # of the tiles in shared memory, and the slack for it
SM_REGISTERS = 65536
REGISTERS = 224  # per thread: the need of the consumers
SM_SHARED = 228 * 1024
CTA_RESERVED = 1024
FLIGHT = 40 * 1024  # bytes of states that an SM keeps in flight where there is work
CONSUMERS = 4  # per SM: one for each of its schedulers
FEW_CONSUMERS = 2  # of a CTA with one unit and an SM to itself: loading its bytes takes longer than two consumers need
SPLITS = (1, 2, 4, 8)
UNEVEN = 1.25  # how much longer the busiest SM may take if units are larger for it
PAIR_UNITS = 4  # units per SM from which two launches cost less than one kernel with the code for both kinds of steps
ALL_UNITS, READ_UNITS, WRITE_UNITS = "all", "read", "write"  # which units a kernel works on
FUSED, DYNAMIC, PAIR = range(3)


class Role(enum.IntEnum):
    """Role of a warp: its number, and of consumers that of the first, where a prep warp exists."""

    PRODUCER = 0
    PREP = 1
    CONSUMER = 2


@dataclass(frozen=True)
class CheckpointingSSUConfig(Config):
    """Knobs of `CheckpointingSSU`.

    Attributes
    ----------
    form : int
        0, fused: a CTA for every unit.  1, dynamic: persistent CTAs.  2, pair: two launches of persistent CTAs, one
        for the sequences whose steps write the state and one for the others; these need a list of work.
    d_split : int
        Tiles of a head's state, `dim` / `d_split` rows each.
    tiles : int
        Tiles of a unit.  They belong to one group of heads; a unit is one or more whole heads, or a part of one.
    consumers : int
        Warps that share a unit's tiles.
    depth : int
        Stages of each consumer's pipeline of tiles.
    unit_stages : int
        1 or 2 buffers for everything else of a unit.
    ctas_per_sm : int
        CTAs of a persistent grid per SM; it bounds the registers of a thread.
    write_tiles, write_consumers, write_depth, write_ctas_per_sm : int
        The same for the launch of a pair that writes states; 0: the value of the other launch.
    """

    FREE: ClassVar[tuple[str, ...]] = (
        "form", "d_split", "tiles", "consumers", "depth", "unit_stages", "ctas_per_sm",
        "write_tiles", "write_consumers", "write_depth", "write_ctas_per_sm",
    )  # fmt: skip
    KEY: ClassVar[tuple[str, ...]] = (
        "state_dtype", "heads", "groups", "dim", "dstate", "tokens", "window", "history", "work_items", "philox_rounds",
    )  # fmt: skip

    form: int
    d_split: int
    tiles: int
    consumers: int
    depth: int
    unit_stages: int
    ctas_per_sm: int
    write_tiles: int = 0
    write_consumers: int = 0
    write_depth: int = 0
    write_ctas_per_sm: int = 0

    def _launch_config(self, works_on: str) -> LaunchConfig:
        """Return the knobs of the kernel that works on `ALL_UNITS`, `READ_UNITS` or `WRITE_UNITS`."""
        writes = works_on == WRITE_UNITS
        return LaunchConfig(
            works_on=works_on,
            d_split=self.d_split,
            tiles=(self.write_tiles if writes else 0) or self.tiles,
            consumers=(self.write_consumers if writes else 0) or self.consumers,
            depth=(self.write_depth if writes else 0) or self.depth,
            ctas_per_sm=(self.write_ctas_per_sm if writes else 0) or self.ctas_per_sm,
            unit_stages=self.unit_stages,
            fused=self.form == FUSED,
        )

    @property
    def launch_configs(self) -> tuple[LaunchConfig, ...]:
        """The knobs of each kernel of a call, in the order of their launches."""
        kinds = (WRITE_UNITS, READ_UNITS) if self.form == PAIR else (ALL_UNITS,)
        return tuple(self._launch_config(works_on) for works_on in kinds)

    @property
    def launches(self) -> int:
        """Kernels that one call launches."""
        return len(self.launch_configs)

    def check(self, spec: CheckpointingSSUSpec, arch: Arch) -> None:
        """Raise `UnsupportedSpecError` if the kernel cannot run so."""
        fitting = {
            "form": self.form in (FUSED, DYNAMIC) or (self.form == PAIR and spec.work_items),
            "d_split": self.d_split >= 1 and spec.dim % (self.d_split * ROWS) == 0,
            "unit_stages": self.unit_stages in (1, 2),
            "ctas_per_sm": min(launch.ctas_per_sm for launch in self.launch_configs) >= 1,
        }
        problems = [name for name, good in fitting.items() if not good]
        for launch in self.launch_configs if not problems else ():
            problems += launch.problems(spec, arch)
        self.refuse(problems, spec, arch, " (form 2 needs work_items)" if "form" in problems else "")

    @classmethod
    def space(cls, spec: CheckpointingSSUSpec, arch: Arch) -> dict[str, tuple[int, ...]]:
        """Return the values that the tuner tries for each field of `FREE`; some combinations are not valid."""
        splits = tuple(s for s in SPLITS if spec.dim % (s * ROWS) == 0)
        tiles = sorted({heads * split for heads in _divisors(spec.heads_per_group) for split in splits})
        values = {
            "form": (FUSED, DYNAMIC, PAIR) if spec.work_items else (FUSED, DYNAMIC),
            "d_split": splits,
            "tiles": tuple(tiles),
            "consumers": (1, 2, 4, 8),
            "depth": (1, 2, 4),
            "unit_stages": (1, 2),
            "ctas_per_sm": (1, 2, 3, 4),
        }
        if spec.work_items:
            values |= {f"write_{name}": (0, *values[name]) for name in ("tiles", "consumers", "depth", "ctas_per_sm")}
        return values

    def inert(self) -> tuple[str, ...]:
        """Return the fields that have no effect with the others; the tuner does not change them."""
        return ("unit_stages", "ctas_per_sm") if self.form == FUSED else ()


@dataclass(frozen=True)
class LaunchConfig:
    """Knobs of one kernel (`CheckpointingSSUConfig`).

    Attributes
    ----------
    works_on : {"all", "read", "write"}
        All units, those whose state is only read, or those whose state is written.
    d_split, tiles, consumers, depth, ctas_per_sm, unit_stages : int
        As in `CheckpointingSSUConfig`.
    fused : bool
        Each CTA has exactly one unit, and its producer does the work of the prep warp.
    """

    works_on: str
    d_split: int
    tiles: int
    consumers: int
    depth: int
    ctas_per_sm: int
    unit_stages: int
    fused: bool = False

    @property
    def first_consumer(self) -> Role:
        """The number of the first warp that is a consumer."""
        return Role.PREP if self.fused else Role.CONSUMER

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return WARP * (self.first_consumer + self.consumers)

    @property
    def tiles_per_consumer(self) -> int:
        """Tiles of a unit that each consumer works on."""
        return self.tiles // self.consumers

    @property
    def tile_stages(self) -> int:
        """Stages of the pipelines of all consumers."""
        return self.consumers * self.depth

    def problems(self, spec: CheckpointingSSUSpec, arch: Arch) -> list[str]:
        """Return the names of the knobs that do not fit the spec or the target."""
        tiles_of_group = spec.heads_per_group * self.d_split
        whole = self.tiles >= 1 and (self.tiles % self.d_split == 0 or self.d_split % self.tiles == 0)
        good = {
            "tiles": whole and tiles_of_group % self.tiles == 0,
            "consumers": 1 <= self.consumers <= 30 and self.tiles % self.consumers == 0,
            "depth": self.depth in (1, 2, 4, 8),
        }
        bad = [name for name, fits in good.items() if not fits]
        shared = 0 if bad else self.shared_bytes(spec)
        if shared > arch.shared_bytes or self.ctas_per_sm * (shared + CTA_RESERVED) > SM_SHARED:
            bad.append("shared memory")
        return bad

    def layout(self, spec: CheckpointingSSUSpec) -> UnitLayout:
        """Return the layout of a unit's data in shared memory."""
        return unit_layout(spec, self.works_on, self.tiles, self.d_split)

    def zero_offset(self, spec: CheckpointingSSUSpec) -> int:
        """Return the offset of the row of zeros, which follows the buffers of units."""
        return self.unit_stages * self.layout(spec).unit_bytes

    def shared_bytes(self, spec: CheckpointingSSUSpec) -> int:
        """Return the shared memory of one CTA in bytes."""
        layout = self.layout(spec)
        tiles = self.tile_stages * layout.tile_bytes
        barriers = 16 * (self.tile_stages + self.unit_stages)
        return tiles + self.zero_offset(spec) + layout.zero_bytes + barriers + ALIGNMENT


@dataclass(frozen=True)
class UnitLayout:
    """Sizes and offsets, in bytes, of the parts of a unit's buffer in shared memory.

    Attributes
    ----------
    tile_rows, tile_bytes : int
        Rows and bytes of a tile of the state.
    heads : int
        Heads that a unit has tiles of.
    rows : int
        Positions: of pending tokens first, then of new ones.
    width, x_pitch, column_pitch : int
        Bytes of a row of x, z or out; from one of them to the next; from one row of B or C to the next.
    record : int
        Bytes of a head's record: (running sum in powers of two, dt') of every position, and what follows.
    skip, base, weights : int
        Offsets in a record: of D, of the exponent of the old state's decay in a state that is written, and of the
        weights of pending tokens in it.
    x, z, b, c, records, scales, header : int
        Offsets in the buffer; `out` replaces z.
    unit_bytes, zero_bytes : int
        Size of the buffer; size of the row of zeros that is read in place of absent rows.
    """

    tile_rows: int
    tile_bytes: int
    heads: int
    rows: int
    width: int
    x_pitch: int
    column_pitch: int
    record: int
    skip: int
    base: int
    weights: int
    x: int
    z: int
    b: int
    c: int
    records: int
    scales: int
    header: int
    unit_bytes: int
    zero_bytes: int

    @property
    def head_bytes(self) -> int:
        """Bytes of one head in a row of x."""
        return self.width // self.heads


@functools.lru_cache(maxsize=1024)
def unit_layout(spec: CheckpointingSSUSpec, works_on: str, tiles: int, d_split: int) -> UnitLayout:
    """Lay out the shared memory of units of `tiles` tiles for a kernel that works on these units."""
    tile_rows = spec.dim // d_split
    heads = max(1, tiles // d_split)
    rows = spec.window + (0 if works_on == READ_UNITS else spec.tokens)
    width, columns = tiles * tile_rows * 2, spec.dstate * 2
    x_pitch, column_pitch = width + ROW_PAD, columns + ROW_PAD
    token_rows = -(-spec.tokens // TOKENS) * TOKENS
    skip = -(-rows // STEP) * STEP * 8
    record = skip + 16 + (0 if works_on == READ_UNITS else -(-spec.window // STEP) * STEP * 4)
    sizes = {
        "x": rows * x_pitch,
        "z": token_rows * x_pitch,
        "b": rows * column_pitch,
        "c": spec.tokens * column_pitch,
        "records": heads * record,
        "scales": tiles * tile_rows * 4 if spec.scaled else 0,
        "header": 32,
    }
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // 128) * 128
    return UnitLayout(
        tile_rows=tile_rows,
        tile_bytes=tile_rows * spec.dstate * ITEMSIZE[spec.state_dtype],
        heads=heads,
        rows=rows,
        width=width,
        x_pitch=x_pitch,
        column_pitch=column_pitch,
        record=record,
        skip=skip,
        base=skip + 4,
        weights=skip + 16,
        **offsets,
        unit_bytes=end,
        zero_bytes=-(-(112 + max(width, columns)) // 128) * 128,
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def choose(
    spec: CheckpointingSSUSpec, arch: Arch, batch: int, sm_count: int, d_split: int | None = None
) -> CheckpointingSSUConfig:
    """Return the config for `batch` sequences on `sm_count` SMs, as `tuning.override` would have it.

    Raises
    ------
    UnsupportedSpecError
        If `d_split` is given and does not fit.
    """
    return apply_override(_tuned(spec, arch, batch, sm_count, d_split))


def _tuned(
    spec: CheckpointingSSUSpec, arch: Arch, batch: int, sm_count: int, d_split: int | None
) -> CheckpointingSSUConfig:
    config = _choose(spec, arch, batch, sm_count, d_split)
    return config if d_split else tables.tuned(config, spec, arch, batch * spec.heads, CheckpointingSSUConfig.FREE)


class _Candidate(NamedTuple):
    """A config, its number of units, the heads of the busiest SM, and its rank among those of even work."""

    config: CheckpointingSSUConfig
    units: int
    busiest: int
    rank: tuple[int, bool, int, int, int]


@functools.lru_cache(maxsize=4096)
def _choose(
    spec: CheckpointingSSUSpec, arch: Arch, batch: int, sm_count: int, d_split: int | None
) -> CheckpointingSSUConfig:
    """Choose by the amount of work.

    What heads of a group share is computed once for a unit.  So units are as large as they can be while the work, in
    whole heads, is spread evenly, and while every SM has `CONSUMERS` consumers and `FLIGHT` bytes of states in flight.

    With unaligned rows, loops over units of quantised states need too many registers (sm_90a: up to 800 bytes spilled),
    so each unit has a CTA of its own.  If these states are rounded stochastically, a unit has one head.
    """
    found, loops = [], spec.aligned or not spec.scaled
    fits = loops or not spec.philox_rounds
    for split in [d_split] if d_split else [s for s in SPLITS if spec.dim % (s * ROWS) == 0]:
        for heads in _divisors(spec.heads_per_group if fits else 1):
            units = batch * (spec.heads // heads)
            busiest = -(-units // sm_count) * heads  # heads of the SM that has most
            for consumers in [n for n in _divisors(heads * split) if n <= CONSUMERS]:
                config = _deepest_pipeline(spec, arch, split, heads * split, consumers, loops and units > sm_count)
                if config is None:
                    continue
                (launch,) = config.launch_configs
                ctas = min(config.ctas_per_sm, -(-units // sm_count))
                flight = ctas * consumers * config.depth * launch.layout(spec).tile_bytes
                wanted = CONSUMERS if units > sm_count else min(FEW_CONSUMERS, heads)
                lacking = abs(wanted - ctas * consumers)
                rank = (lacking, flight < FLIGHT and units > sm_count, -heads, split, -flight)
                found.append(_Candidate(config, units, busiest, rank))
    if not found:
        raise UnsupportedSpecError(f"no config fits {spec.text()} with d_split = {d_split} on {arch.name}")
    even = min(candidate.busiest for candidate in found) * UNEVEN
    best = min((candidate for candidate in found if candidate.busiest <= even), key=lambda candidate: candidate.rank)
    if best.config.form == DYNAMIC and spec.work_items and best.units >= PAIR_UNITS * sm_count:
        return dataclasses.replace(best.config, form=PAIR)
    return best.config


def _deepest_pipeline(
    spec: CheckpointingSSUSpec, arch: Arch, split: int, tiles: int, consumers: int, persistent: bool
) -> CheckpointingSSUConfig | None:
    """Return the config with the deepest pipelines with which an SM holds CTAs with `CONSUMERS` consumers in all."""
    threads = WARP * (2 + consumers)
    most = min(-(-CONSUMERS // consumers), SM_REGISTERS // (threads * REGISTERS)) if persistent else 1
    for ctas in range(max(most, 1), 0, -1):
        for unit_stages in (2, 1) if persistent else (1,):
            for depth in (4, 2, 1):
                launch = LaunchConfig(ALL_UNITS, split, tiles, consumers, depth, ctas, unit_stages)
                if depth <= launch.tiles_per_consumer * unit_stages and not launch.problems(spec, arch):
                    form = DYNAMIC if persistent else FUSED
                    return CheckpointingSSUConfig(form, split, tiles, consumers, depth, unit_stages, ctas)
    return None
