"""The config of `SelectiveStep`, and how one is chosen.

`lanes` and `matmul` change the bits of a result, so they are chosen from the spec and the bound of a sequence's tokens
alone: a sequence's result does not depend on the batch it is part of.  The other fields only distribute work, and may
depend on the amount of work.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

from cute_ssm.arch import WARP, Arch
from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.ops.selective_state_update.spec import SelectiveStateUpdateSpec
from cute_ssm.spec import ITEMSIZE, Config
from cute_ssm.tuning import apply_override, tables

PIPELINE_STAGES = 3  # of a persistent warp: one unit arrives, one is updated, one leaves
ACCESS_BYTES = 16
UNIT_BYTES = 20480  # largest unit: 3 or 4 pipelines fill an SM, 48 to 64 KiB are always arriving
HEAVY_WARPS = 8  # of up to 255 registers a thread, per SM
RESIDENT_CTAS = 16  # of one warp, per SM: more do not raise the use of memory bandwidth
CTA_BYTES = 1024 + 128  # shared memory of a CTA besides its pipelines
PRODUCT_TOKENS = 8  # columns of a tensor-core product
STAGED_ALIGNMENT = 128
STAGED_TOKENS = 8  # tokens whose B and C are in shared memory at once
PRODUCT_LANES = 4  # lanes that share a row of a product's operands
SHARED_ROWS = 16  # columns from which lanes share a row of the state
FULL = 0.85  # units per SM below which units are made smaller


@dataclass(frozen=True)
class SelectiveStepConfig(Config):
    """How `SelectiveStep` distributes its work.

    Attributes
    ----------
    lanes : int
        Lanes that share a row of the state: a power of two.
    rows : int
        Rows of a unit, the work that a warp takes at a time: a divisor of dim, and a multiple of a block.
    block : int
        Rows that a warp updates at once, up to one per lane; fewer where they would not fit the registers.
    warps : int
        Warps of a CTA, each with units and a pipeline of its own.
    stages : int
        Stages of a warp's pipeline.  3: the grid is persistent.  1: the grid has a warp for every unit.
    ctas_per_sm : int
        Upper bound of the persistent grid, per SM.
    matmul : int
        1: update by up to `PRODUCT_TOKENS` tokens at once, outputs by tensor core (`TokenProducts`).
    """

    FREE: ClassVar[tuple[str, ...]] = ("rows", "block", "warps", "stages", "ctas_per_sm")
    KEY: ClassVar[tuple[str, ...]] = (
        "state_dtype", "input_dtype", "dim", "dstate", "A_tied", "update_state", "tokens", "intermediates",
        "philox_rounds",
    )  # fmt: skip

    lanes: int
    rows: int
    block: int
    warps: int
    stages: int
    ctas_per_sm: int
    matmul: int = 0

    @property
    def block_rows(self) -> int:
        """Rows of a block: `block`, or the largest divisor of it that divides `rows`."""
        return math.gcd(self.block, self.rows)

    def unit_bytes(self, spec: SelectiveStateUpdateSpec) -> int:
        """Bytes of one unit, a multiple of 16."""
        return self.rows * spec.dstate * ITEMSIZE[spec.state_dtype]

    def shared_bytes(self, spec: SelectiveStateUpdateSpec) -> int:
        """Shared memory of one CTA: pipelines with their barriers, and, aligned, the staged rows of B and C."""
        pipelines = self.warps * self.stages * (self.unit_bytes(spec) + 8)
        staged = self.warps * staged_bytes(spec, self.lanes, self.matmul)
        return -(-pipelines // STAGED_ALIGNMENT) * STAGED_ALIGNMENT + staged if staged else pipelines

    def check(self, spec: SelectiveStateUpdateSpec, arch: Arch) -> None:
        """Raise `UnsupportedSpecError` if the kernel cannot run so."""
        block = self.block_rows
        steps = block * self.lanes // WARP
        fitting = {
            "lanes": self.lanes in (1, 2, 4, 8, 16, 32) and 1 <= steps <= self.lanes,
            "rows": self.rows >= 8 and spec.dim % self.rows == 0,
            "block": block in (8, 16, 32),
            "warps": 1 <= self.warps <= 32,
            "stages": self.stages in (1, PIPELINE_STAGES),
            "matmul": not self.matmul or (can_multiply(spec) and self.lanes == PRODUCT_LANES and block % 16 == 0),
            "ctas_per_sm": self.ctas_per_sm >= 1,
            "shared memory": self.shared_bytes(spec) <= arch.shared_bytes,
        }
        self.refuse((name for name, good in fitting.items() if not good), spec, arch)

    @classmethod
    def space(cls, spec: SelectiveStateUpdateSpec, arch: Arch) -> dict[str, tuple[int, ...]]:
        """Return the values that the tuner tries for each field of `FREE`; not all combinations are valid."""
        row_bytes = spec.dstate * ITEMSIZE[spec.state_dtype]
        rows = [n for n in range(8, spec.dim + 1, 8) if spec.dim % n == 0 and n * row_bytes <= arch.shared_bytes // 2]
        return {
            "rows": tuple(rows),
            "warps": (1, 2, 4, 8),
            "stages": (1, PIPELINE_STAGES),
            "ctas_per_sm": (1, 2, 3, 4, 6, 8, 12),
            "block": (8, 16, 32),
        }

    def fits(self, spec: SelectiveStateUpdateSpec, arch: Arch) -> bool:
        """Whether all CTAs of a persistent grid are resident; those that are not would start when others end."""
        resident = self.ctas_per_sm * (self.shared_bytes(spec) + CTA_BYTES)
        return self.stages == 1 or resident <= arch.shared_bytes

    def inert(self) -> tuple[str, ...]:
        """Return the fields that have no effect with these values of the others; the tuner does not vary them."""
        return ("ctas_per_sm",) if self.stages == 1 else ()


def staged_bytes(spec: SelectiveStateUpdateSpec, lanes: int, matmul: int) -> int:
    """Shared memory of a warp for float32 rows of B, or of B and C, of `STAGED_TOKENS` tokens.

    Rows have space for the columns of all lanes, idle ones included.
    """
    if spec.tokens == "one":
        return 0
    vector = state_vector(spec)
    return (1 if matmul else 2) * STAGED_TOKENS * -(-spec.dstate // (vector * lanes)) * vector * lanes * 4


def can_multiply(spec: SelectiveStateUpdateSpec) -> bool:
    """Whether `TokenProducts` implements a spec: 16-bit operands, one decay per head, only the last state written."""
    return (
        spec.tokens != "one"
        and spec.decay_tied
        and {spec.state_dtype, spec.input_dtype} <= {"bfloat16", "float16"}
        and spec.dim % 16 == 0
        and spec.dstate % 32 == 0
        and not spec.writes_every_state
    )


def widest_block(spec: SelectiveStateUpdateSpec) -> int:
    """Rows that a warp updates at once at most: one per lane if dim allows."""
    return math.gcd(spec.dim, WARP)


def state_vector(spec: SelectiveStateUpdateSpec) -> int:
    """Elements of the widest access, up to 16 bytes, whose size divides that of a row of the state."""
    return math.gcd(spec.dstate, ACCESS_BYTES // ITEMSIZE[spec.state_dtype])


def block_of(spec: SelectiveStateUpdateSpec, lanes: int, rows: int) -> int:
    """Rows of a block: as many as the unit has and the registers can hold.

    With several tokens or with scales, a lane holds its part of a block in float32.  The bounds on those registers
    were measured as the largest that do not spill at 255 registers: 128 with one decay per head and only the last
    state written, 32 with both Philox and scales, 64 otherwise.
    """
    block = math.gcd(rows, widest_block(spec))
    if spec.tokens == "one" and not spec.scaled:
        return block
    plain = spec.tokens == "one" or (spec.decay_tied and not spec.writes_every_state)
    vector = state_vector(spec)
    columns = -(-spec.dstate // (vector * lanes)) * vector
    most = 128 if plain and not spec.philox_rounds else 32 if spec.scaled and spec.philox_rounds else 64
    while block * lanes // WARP * columns > most and block > max(8, WARP // lanes):
        block //= 2
    return block


def input_vector(spec: SelectiveStateUpdateSpec, itemsize: int) -> int:
    """Elements of one access to a row of B, C or A if rows are aligned: as in `state_vector`, up to 16 bytes."""
    return min(state_vector(spec), ACCESS_BYTES // itemsize)


def bank_conflicts(spec: SelectiveStateUpdateSpec, lanes: int) -> int:
    """Excess wavefronts of a warp's access to a block.

    Without conflicts, a wavefront serves 128 bytes: a quarter of a warp at 16 bytes a lane.
    """
    access = state_vector(spec) * ITEMSIZE[spec.state_dtype]
    pitch = spec.dstate * ITEMSIZE[spec.state_dtype]
    stride, steps = WARP // lanes, widest_block(spec) * lanes // WARP
    group = min(WARP, 128 // access)
    excess = 0
    for first in range(0, WARP, group):
        words: dict[int, set[int]] = {}
        for lane in range(first, first + group):
            row = lane % lanes % steps * stride + lane // lanes
            start = row * pitch + lane % lanes * access
            for word in range(start // 4, -(-(start + access) // 4)):
                words.setdefault(word % 32, set()).add(word)
        excess += max(len(found) for found in words.values()) - 1
    return excess


@functools.lru_cache(maxsize=1024)
def lanes_of(spec: SelectiveStateUpdateSpec) -> int:
    """Lanes per row: fewest idle lanes, then fewest bank conflicts, then about 16 columns a lane, then fewest lanes.

    A lane has a row to itself only where dstate is below `SHARED_ROWS`, as most such rows are one access.
    """
    accesses = spec.dstate // state_vector(spec)

    def cost(lanes: int) -> tuple[float, int, int, int]:
        per_lane = -(-accesses // lanes)
        columns = per_lane * state_vector(spec)
        idle = per_lane * lanes / accesses
        return (idle if columns <= 32 else math.inf, bank_conflicts(spec, lanes), abs(columns - 16), lanes)

    choices = (2, 4, 8, 16, 32) if spec.dstate >= SHARED_ROWS else (1, 2, 4, 8, 16, 32)
    return min((n for n in choices if n * widest_block(spec) >= WARP), key=cost)


def choose(
    spec: SelectiveStateUpdateSpec, arch: Arch, heads: int, sm_count: int, tokens: int = 1
) -> SelectiveStepConfig:
    """Return the config for ``heads`` (sequence, head) pairs on ``sm_count`` SMs; `tuning.override` takes precedence.

    ``tokens`` is an upper bound of the tokens of a sequence.

    Raises
    ------
    UnsupportedSpecError
        If an override sets `matmul` for more tokens than `TokenProducts` takes.
    """
    config = apply_override(_tuned(spec, arch, heads, sm_count, tokens in range(2, PRODUCT_TOKENS + 1)))
    if config.matmul and tokens > PRODUCT_TOKENS:
        raise UnsupportedSpecError(
            describe("config.matmul", f"0 with more than {PRODUCT_TOKENS} tokens", config.matmul)
        )
    return config


def _tuned(
    spec: SelectiveStateUpdateSpec, arch: Arch, heads: int, sm_count: int, few_tokens: bool
) -> SelectiveStepConfig:
    """Choose from the tables of measured configs, or else by the amount of work."""
    return tables.tuned(_choose(spec, arch, heads, sm_count, few_tokens), spec, arch, heads, SelectiveStepConfig.FREE)


@functools.lru_cache(maxsize=4096)
def _choose(
    spec: SelectiveStateUpdateSpec, arch: Arch, heads: int, sm_count: int, few_tokens: bool
) -> SelectiveStepConfig:
    """Choose by the amount of work.

    Units are as large as `UNIT_BYTES` allows while (nearly) every SM still gets one.  If all units are resident at
    once as CTAs of one warp, every unit gets such a CTA; otherwise warps are persistent, unless that spills.
    """
    matmul = int(few_tokens and can_multiply(spec))
    lanes = PRODUCT_LANES if matmul else lanes_of(spec)
    block = widest_block(spec)
    smallest = max(16 if matmul else 8, WARP // lanes)
    sizes = [r for r in (8, 16, 32) if smallest <= r <= block]
    sizes += [r for r in range(2 * block, spec.dim + 1, block) if spec.dim % r == 0]
    row_bytes = spec.dstate * ITEMSIZE[spec.state_dtype]
    cta_bytes = CTA_BYTES + staged_bytes(spec, lanes, matmul)
    fitting = [r for r in sizes if r * row_bytes <= UNIT_BYTES] or sizes[:1]
    rows = ([r for r in fitting if heads * (spec.dim // r) >= FULL * sm_count] or fitting[:1])[-1]
    block = math.gcd(rows, 16 if spec.philox_rounds else 32) if matmul else block_of(spec, lanes, rows)
    units = heads * (spec.dim // rows)
    alone = min(RESIDENT_CTAS, arch.shared_bytes // (rows * row_bytes + cta_bytes))
    # ptxas 12.9 spills 80 to 300 bytes of the products of 32 rows if they are in a loop over units, on sm_100a alone
    unlooped = matmul and block > 16 and arch.packed_f32
    if units <= alone * sm_count or unlooped:
        return SelectiveStepConfig(lanes, rows, block, warps=1, stages=1, ctas_per_sm=alone, matmul=matmul)
    persistent = max(1, min(RESIDENT_CTAS, arch.shared_bytes // (PIPELINE_STAGES * rows * row_bytes + cta_bytes)))
    if spec.tokens != "one" or spec.scaled or spec.philox_rounds:
        persistent = min(persistent, HEAVY_WARPS)
    warps = 2 if persistent >= 4 else 1
    return SelectiveStepConfig(
        lanes, rows, block, warps, PIPELINE_STAGES, ctas_per_sm=persistent // warps, matmul=matmul
    )
