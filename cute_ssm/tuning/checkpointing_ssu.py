"""The config of `kernels.checkpointing_ssu`, the shared memory that it needs, and the choice of one.

No field of a config changes a bit of a result: what sums depend on is fixed by the spec.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from cute_ssm.arch import Arch
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.spec import ITEMSIZE, CheckpointingSSUSpec, Config
from cute_ssm.tuning import apply_override, tables

FREE = ("form", "d_split", "tiles", "consumers", "depth", "unit_stages", "ctas_per_sm")
FREE += ("write_tiles", "write_consumers", "write_depth", "write_ctas_per_sm")
WARP = 32
ROWS = 16  # of a matrix product: what a tile is made of
TOKENS = 8  # columns of a matrix product: new tokens are taken so many at a time
STEP = 16  # positions of a product over the history
ROW_PAD = 16  # bytes after a row of inputs: eight of them then meet every bank once
BARRIERS = 1024  # and slack for alignment
SM_THREADS, SM_REGISTERS = 2048, 65536
SM_SHARED = 228 * 1024
CTA_RESERVED = 1024
FLIGHT = 40 * 1024  # bytes of states that an SM keeps in flight where there is work
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
        return Half(part, self.d_split, *knobs, self.unit_stages)

    @property
    def halves(self) -> tuple[Half, ...]:
        """The kernels that are launched, in order."""
        return tuple(self.half(part) for part in (PARTS[2:0:-1] if self.form == PAIR else PARTS[:1]))

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

    @property
    def threads(self) -> int:
        """Producer, prep warp and consumers."""
        return WARP * (2 + self.consumers)

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
        if not bad and self.shared_bytes(spec) > arch.shared_bytes:
            bad.append("shared memory")
        return bad

    def layout(self, spec: CheckpointingSSUSpec) -> UnitLayout:
        """Return where a unit's data lie in shared memory."""
        return unit_layout(spec, self.part, self.tiles, self.d_split)

    def shared_bytes(self, spec: CheckpointingSSUSpec) -> int:
        """Shared memory of one CTA."""
        layout = self.layout(spec)
        ring = self.consumers * self.depth * layout.tile_bytes
        return ring + self.unit_stages * layout.unit_bytes + layout.zero_bytes + BARRIERS


@dataclass(frozen=True)
class UnitLayout:
    """Bytes of a unit's buffer in shared memory, and the offsets of its parts.

    Attributes
    ----------
    tile_rows, tile_bytes : int
        Of a tile of the state.
    heads : int
        Heads that a unit has tiles of.
    rows, steps : int
        Positions, history first and then new tokens, and products that cover them.
    width, x_pitch, column_pitch : int
        Bytes of a row of x, z or out; distance of two; distance of two rows of B or C.
    record : int
        Bytes of a head's decays: (running sum in powers of two, dt') of every position.
    x, z, b, c, records, scales, meta : int
        Offsets.
    unit_bytes, zero_bytes : int
        A buffer; the row of zeros that is read in place of absent rows.
    """

    tile_rows: int
    tile_bytes: int
    heads: int
    rows: int
    steps: int
    width: int
    x_pitch: int
    column_pitch: int
    record: int
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
    steps = -(-rows // STEP)
    width, columns = tiles * tile_rows * 2, spec.dstate * 2
    x_pitch, column_pitch = width + ROW_PAD, columns + ROW_PAD
    token_rows = -(-spec.tokens // TOKENS) * TOKENS
    record = steps * STEP * 8
    scale_bytes = tiles * tile_rows * 4 if spec.scaled else 0
    sizes = (rows * x_pitch, token_rows * x_pitch, rows * column_pitch, spec.tokens * column_pitch)
    sizes += (heads * record, scale_bytes, 32)
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // 128) * 128
    zero = -(-(112 + max(width, columns)) // 128) * 128
    tile_bytes = tile_rows * spec.dstate * ITEMSIZE[spec.state_dtype]
    return UnitLayout(
        tile_rows, tile_bytes, heads, rows, steps, width, x_pitch, column_pitch, record, *offsets, end, zero
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _resident(spec: CheckpointingSSUSpec, half: Half, registers: int) -> int:
    """CTAs that an SM holds."""
    per_thread = SM_REGISTERS // (half.threads * registers)
    return min(SM_SHARED // (half.shared_bytes(spec) + CTA_RESERVED), per_thread, SM_THREADS // half.threads)


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


@functools.lru_cache(maxsize=4096)
def _tuned(
    spec: CheckpointingSSUSpec, arch: Arch, batch: int, sm_count: int, d_split: int | None
) -> CheckpointingSSUConfig:
    config = _choose(spec, arch, batch, sm_count, d_split)
    return config if d_split else tables.tuned(config, spec, arch, batch * spec.heads, FREE)


@functools.lru_cache(maxsize=4096)
def _choose(
    spec: CheckpointingSSUSpec, arch: Arch, batch: int, sm_count: int, d_split: int | None
) -> CheckpointingSSUConfig:
    """Choose by the amount of work.

    Units are as large as they can be while every SM still gets one: the products of B and C, the same for all heads
    of a group, are computed once for a unit.  With less work than SMs, a head is a unit, and several warps share it.
    """
    per_group = spec.heads // spec.groups
    splits = [d_split] if d_split else [s for s in (1, 2, 4, 8) if spec.dim % (s * ROWS) == 0]
    candidates: list[tuple[tuple[float, ...], CheckpointingSSUConfig]] = []
    for split in splits:
        for heads in _divisors(per_group):
            candidates += _candidates(spec, arch, batch, sm_count, split, heads)
    if not candidates:
        raise UnsupportedSpecError(f"no config fits {spec.text()} with d_split = {d_split} on {arch.name}")
    return min(candidates, key=lambda entry: entry[0])[1]


def _candidates(
    spec: CheckpointingSSUSpec, arch: Arch, batch: int, sm_count: int, split: int, heads: int
) -> list[tuple[tuple[float, ...], CheckpointingSSUConfig]]:
    """Return the configs for units of `heads` heads that fit, with what they cost: the least is the best."""
    tiles = heads * split
    units = batch * (spec.heads // heads)
    found = []
    for consumers in (n for n in _divisors(tiles) if n <= 4):
        for depth in (1, 2, 4):
            for unit_stages in (1, 2):
                half = Half("all", split, tiles, consumers, depth, 1, unit_stages)
                if half.problems(spec, arch) or depth > tiles // consumers * unit_stages:
                    continue
                resident = max(1, _resident(spec, half, 224))
                waves = units / (sm_count * resident)
                persistent = waves > 1
                if persistent != (unit_stages == 2) and unit_stages == 2:
                    continue
                flight = resident * consumers * depth * half.layout(spec).tile_bytes
                idle = max(0.0, 1.0 - units / sm_count)  # SMs without a unit
                work = _unit_slots(heads, tiles, consumers) / heads
                short = max(0.0, 1.0 - flight / FLIGHT) if persistent else 0.0
                overlap = 0.0 if not persistent or unit_stages == 2 or resident > 1 else 0.5
                latency = 0.0 if persistent else tiles / consumers
                cost = (idle * 8 + short * 4 + overlap + work / 400 + latency, half.shared_bytes(spec), split)
                form = DYNAMIC if persistent else FUSED
                if persistent and spec.work_items and waves > 4:
                    form = PAIR
                ctas = resident if persistent else 1
                found.append((cost, CheckpointingSSUConfig(form, split, tiles, consumers, depth, unit_stages, ctas)))
    return found


def _unit_slots(heads: int, tiles: int, consumers: int) -> float:
    """Issue slots of a unit, by the counts of a no-write step of 6 tokens."""
    return 220.0 * consumers + 90.0 + 27.0 * heads + 265.0 * heads * (0.7 + 0.3 * math.sqrt(tiles / heads))
