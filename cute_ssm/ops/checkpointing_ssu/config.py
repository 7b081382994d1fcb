"""The config of `kernels.checkpointing_ssu`, the shared memory that it needs, and the choice of one.

No field of a config changes a bit of a result: what sums depend on is fixed by the spec.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import ClassVar

from cute_ssm.arch import WARP, Arch
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.ops.checkpointing_ssu.spec import CheckpointingSSUSpec
from cute_ssm.spec import ITEMSIZE, Config
from cute_ssm.tuning import apply_override, tables

ROWS = 16  # of a matrix product: what a tile is made of
TOKENS = 8  # columns of a matrix product: new tokens are taken so many at a time
STEP = 16  # positions of a product over the history
ROW_PAD = 16  # bytes after a row of inputs: eight of them then meet every bank once
ALIGNMENT = 1024  # of a ring; slack for it
SM_REGISTERS = 65536
REGISTERS = 224  # of a thread: what the consumers need
SM_SHARED = 228 * 1024
CTA_RESERVED = 1024
FLIGHT = 40 * 1024  # bytes of states that an SM keeps in flight where there is work
CONSUMERS = 4  # of an SM: one for each of its schedulers
FEW_CONSUMERS = 2  # of a CTA that has an SM, and time for a single unit: its bytes take longer to come than two need
SPLITS = (1, 2, 4, 8)
UNEVEN = 1.25  # how much longer the busiest SM may take for the sake of larger units
PAIR_UNITS = 4  # units per SM from which two launches cost less than the code for both kinds of steps at once
PARTS = ("all", "keep", "write")
FUSED, DYNAMIC, PAIR = range(3)


@dataclass(frozen=True)
class CheckpointingSSUConfig(Config):
    """Knobs of `CheckpointingSSU`.

    Attributes
    ----------
    form : int
        0, fused: a CTA for every unit.  1, dynamic: persistent CTAs.  2, pair: two launches of persistent CTAs, made
        for the steps that write the state and for those that do not; they need a list of work.
    d_split : int
        Tiles of a head's state, `dim` / `d_split` rows each.
    tiles : int
        Tiles of a unit.  They belong to one group; a unit is whole heads, or a part of one.
    consumers : int
        Warps that share a unit's tiles.
    depth : int
        Stages of each consumer's ring of tiles.
    unit_stages : int
        1 or 2 buffers for everything else of a unit.
    ctas_per_sm : int
        Of a persistent grid; registers are bounded accordingly.
    write_tiles, write_consumers, write_depth, write_ctas_per_sm : int
        The same for the half of a pair that writes states; 0: as the other half.
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

    def half(self, part: str) -> Half:
        """Return the knobs of the kernel for a part of the steps."""
        knobs = (self.tiles, self.consumers, self.depth, self.ctas_per_sm)
        if part == "write":
            own = (self.write_tiles, self.write_consumers, self.write_depth, self.write_ctas_per_sm)
            knobs = tuple(a or b for a, b in zip(own, knobs))  # type: ignore[assignment]
        return Half(part, self.d_split, *knobs, self.unit_stages, self.form == FUSED)

    @property
    def halves(self) -> tuple[Half, ...]:
        """The kernels that are launched, in order."""
        return tuple(self.half(part) for part in (PARTS[2:0:-1] if self.form == PAIR else PARTS[:1]))

    @property
    def launches(self) -> int:
        """Kernels that one call launches."""
        return len(self.halves)

    def check(self, spec: CheckpointingSSUSpec, arch: Arch) -> None:
        """Raise `UnsupportedSpecError` if the kernel cannot run so."""
        problems = {
            "form": self.form in (FUSED, DYNAMIC) or (self.form == PAIR and spec.work_items),
            "d_split": self.d_split >= 1 and spec.dim % (self.d_split * ROWS) == 0,
            "unit_stages": self.unit_stages in (1, 2),
            "ctas_per_sm": min(half.ctas_per_sm for half in self.halves) >= 1,
        }
        bad = [name for name, good in problems.items() if not good]
        for half in self.halves if not bad else ():
            bad += half.problems(spec, arch)
        if bad:
            reason = " (form 2 needs work_items)" if "form" in bad else ""
            raise UnsupportedSpecError(
                f"config: {', '.join(bad)} of {self} do not fit {spec.text()} on {arch.name}{reason}"
            )

    @classmethod
    def space(cls, spec: CheckpointingSSUSpec, arch: Arch) -> dict[str, tuple[int, ...]]:
        """Return the values that the tuner tries for each field of `FREE`; not all combinations are valid."""
        splits = tuple(s for s in SPLITS if spec.dim % (s * ROWS) == 0)
        tiles = sorted({heads * split for heads in _divisors(spec.heads // spec.groups) for split in splits})
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
        """Return the fields that mean nothing beside the others: the tuner leaves them as they are."""
        return ("unit_stages", "ctas_per_sm") if self.form == FUSED else ()


@dataclass(frozen=True)
class Half:
    """Knobs of one kernel (`CheckpointingSSUConfig`), for a ``part`` of the steps: "all", or those that "keep" states
    or "write" them."""

    part: str
    d_split: int
    tiles: int
    consumers: int
    depth: int
    ctas_per_sm: int
    unit_stages: int
    single: bool = False  # a CTA has one unit, and its producer is the prep warp as well

    @property
    def helpers(self) -> int:
        """Warps that are no consumers."""
        return 1 if self.single else 2

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return WARP * (self.helpers + self.consumers)

    def problems(self, spec: CheckpointingSSUSpec, arch: Arch) -> list[str]:
        """Return the names of the knobs that do not fit."""
        tiles_of_group = spec.heads // spec.groups * self.d_split
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
        """Return where a unit's data lie in shared memory."""
        return unit_layout(spec, self.part, self.tiles, self.d_split)

    def shared_bytes(self, spec: CheckpointingSSUSpec) -> int:
        """Shared memory of one CTA."""
        layout = self.layout(spec)
        ring = self.consumers * self.depth * layout.tile_bytes
        barriers = 16 * (self.consumers * self.depth + self.unit_stages)
        return ring + self.unit_stages * layout.unit_bytes + layout.zero_bytes + barriers + ALIGNMENT


@dataclass(frozen=True)
class UnitLayout:
    """Bytes of a unit's buffer in shared memory, and the offsets of its parts.

    Attributes
    ----------
    tile_rows, tile_bytes : int
        Of a tile of the state.
    heads : int
        Heads that a unit has tiles of.
    rows : int
        Positions, history first and then new tokens.
    width, x_pitch, column_pitch : int
        Bytes of a row of x, z or out; distance of two; distance of two rows of B or C.
    record, skip, base, weights : int
        Bytes of a head's decays: (running sum in powers of two, dt') of every position; where D follows them, the
        exponent of the decay of a state that is written, and the weights of the history in it.
    x, z, b, c, records, scales, meta : int
        Offsets.
    unit_bytes, zero_bytes : int
        A buffer; the row of zeros that is read in place of absent rows.
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
    meta: int
    unit_bytes: int
    zero_bytes: int


@functools.lru_cache(maxsize=1024)
def unit_layout(spec: CheckpointingSSUSpec, part: str, tiles: int, d_split: int) -> UnitLayout:
    """Lay out the shared memory of units of `tiles` tiles for a part of the steps."""
    tile_rows = spec.dim // d_split
    heads = max(1, tiles // d_split)
    rows = spec.window + (0 if part == "keep" else spec.tokens)
    width, columns = tiles * tile_rows * 2, spec.dstate * 2
    x_pitch, column_pitch = width + ROW_PAD, columns + ROW_PAD
    token_rows = -(-spec.tokens // TOKENS) * TOKENS
    skip = -(-rows // STEP) * STEP * 8
    record = skip + 16 + (0 if part == "keep" else -(-spec.window // STEP) * STEP * 4)
    sizes = {
        "x": rows * x_pitch,
        "z": token_rows * x_pitch,
        "b": rows * column_pitch,
        "c": spec.tokens * column_pitch,
        "records": heads * record,
        "scales": tiles * tile_rows * 4 if spec.scaled else 0,
        "meta": 32,
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


@functools.lru_cache(maxsize=4096)
def _choose(
    spec: CheckpointingSSUSpec, arch: Arch, batch: int, sm_count: int, d_split: int | None
) -> CheckpointingSSUConfig:
    """Choose by the amount of work.

    What heads of a group share is computed once for a unit, so units are as large as they can be while work is spread
    evenly, by whole heads; and every SM should have `CONSUMERS` consumers and `FLIGHT` bytes of states on their way.

    Beside copies of unaligned rows there are no registers for loops over units of quantised states (sm_90a: up to 800
    bytes spilled), so that every unit has a CTA; nor, where they are rounded stochastically, for several heads.
    """
    found, loops = [], spec.aligned or not spec.scaled
    fits = loops or not spec.philox_rounds
    for split in [d_split] if d_split else [s for s in SPLITS if spec.dim % (s * ROWS) == 0]:
        for heads in _divisors(spec.heads // spec.groups if fits else 1):
            units = batch * (spec.heads // heads)
            busiest = -(-units // sm_count) * heads  # heads of the SM that has most
            for consumers in [n for n in _divisors(heads * split) if n <= CONSUMERS]:
                config = _largest_ring(spec, arch, split, heads * split, consumers, loops and units > sm_count)
                if config is None:
                    continue
                half = config.halves[0]
                ctas = min(config.ctas_per_sm, -(-units // sm_count))
                flight = ctas * consumers * config.depth * half.layout(spec).tile_bytes
                wanted = CONSUMERS if units > sm_count else min(FEW_CONSUMERS, heads)
                lacking = abs(wanted - ctas * consumers)
                order = (lacking, flight < FLIGHT and units > sm_count, -heads, split, -flight)
                found.append((busiest, order, config, units))
    if not found:
        raise UnsupportedSpecError(f"no config fits {spec.text()} with d_split = {d_split} on {arch.name}")
    even = min(busiest for busiest, _, _, _ in found) * UNEVEN
    _, _, config, units = min((entry for entry in found if entry[0] <= even), key=lambda entry: entry[1])
    if config.form == DYNAMIC and spec.work_items and units >= PAIR_UNITS * sm_count:
        return dataclasses.replace(config, form=PAIR)
    return config


def _largest_ring(
    spec: CheckpointingSSUSpec, arch: Arch, split: int, tiles: int, consumers: int, persistent: bool
) -> CheckpointingSSUConfig | None:
    """Return the config with the deepest rings that still lets an SM hold CTAs with `CONSUMERS` consumers in all."""
    threads = WARP * (2 + consumers)
    most = min(-(-CONSUMERS // consumers), SM_REGISTERS // (threads * REGISTERS)) if persistent else 1
    for ctas in range(max(most, 1), 0, -1):
        for unit_stages in (2, 1) if persistent else (1,):
            for depth in (4, 2, 1):
                half = Half("all", split, tiles, consumers, depth, ctas, unit_stages)
                if depth <= tiles // consumers * unit_stages and not half.problems(spec, arch):
                    form = DYNAMIC if persistent else FUSED
                    return CheckpointingSSUConfig(form, split, tiles, consumers, depth, unit_stages, ctas)
    return None
