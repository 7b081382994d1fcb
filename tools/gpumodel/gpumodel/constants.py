"""The constants of the machine model, all in this file, each with its source.

They are figures from the vendor's documents, from public microbenchmarks and from public benchmarks of kernels; none is
fitted to a measurement of this project (``fitted`` is False).  Where fitted.json lies beside this file, its constants
replace those of the machines in `MACHINES`.  `dataclasses.replace` makes a machine with others.

Sources, by the letter in a comment:

A  CUDA C++ Programming Guide, "Arithmetic Instructions", throughput table of compute capabilities 9.0 and 10.0: results
   per clock and SM.  128 for float32 add, multiply and fma; 64 for 32-bit integers, logic, comparisons, minimum and
   maximum; 16 for special functions; 32 for shuffles.  A warp instruction of r results per clock occupies its pipe for
   32 * 4 / r clocks in each of the four sub-partitions.
B  The same guide, "Technical Specifications per Compute Capability": registers, shared memory, warps, CTAs of an SM.
C  Data sheets: H100 SXM (3.35 TB/s, 132 SMs, boost 1.98 GHz, L2 50 MB), H200 (4.8 TB/s, otherwise as the H100), HGX
   B200 (8 TB/s, 148 SMs, boost 1.965 GHz, L2 126 MB), HGX B300 (8 TB/s, 148 SMs, boost 2.03 GHz).
D  Luo et al., "Dissecting the NVIDIA Hopper Architecture through Microbenchmarking and Multiple Level Analysis", 2025,
   and its forerunner of 2024: latencies of shared memory, L1, L2, DRAM, mma.sync and TMA, and the share of the tensor
   peak that mma.sync reaches.  For an H100; taken for an H200 too.
E  Bandwidth of published kernels: vLLM pull request 44251, H200, float32 state: 3.76 TB/s; vLLM pull request 43083,
   B200, float32 state: 6.63 TB/s (its float16 table, 4.07 TB/s, is bound by instructions); FlashInfer pull request
   2588, gated delta rule, B200: 6.84 TB/s.  A kernel's bandwidth is a lower bound of the memory's.
F  Fitted to the published times of sources E, of vLLM pull request 31722 and of TensorRT-LLM pull request 14203; no
   microbenchmark is known.
G  A guess of the right order of magnitude; fit these first.
H  "CUDA Performance Study - H100 SXM5", CUDA 12.8: latencies of L2 and DRAM in clocks of 1.98 GHz.
I  Instruction caches: Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", 2018 (a cache
   in each sub-partition, 128 KiB of an SM, then the L2); Huerta et al., "Analyzing Modern NVIDIA GPU cores", 2025
   (32 KiB and 128 KiB for Ampere, a stream buffer of 16 entries).  No figures for Hopper or Blackwell are known.
K  Dao-AILab/quack, notes on the pipes of the GPU and on coalescing (H100 SXM and B300).
M  SemiAnalysis, microbench-blackwell (B200, 1.965 GHz): bandwidth of cp.async and of TMA by bytes in flight.
N  te42kyfo/gpu-benches, "h200" and "h100_pcie": bandwidth of the L2 by size of the data, latencies, small kernels.
Q  ademeure/QuickRunCUDA, b300_clean (B300, sm_103a, 2.03 GHz): DRAM by direction, pipes, synchronisation, launches.
   Taken for a B200 too, unless a source for it is named.
S  Listings of machine code of this project's kernels, beside their PTX.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

FITTED = Path(__file__).with_name(
    "fitted.json"
)  # {machine: {"constants": {name: value}, "error": median error that is left, ...}}: those of measured times


@dataclass(frozen=True)
class Pipe:
    """How a class of instructions executes: clocks that one occupies its pipe, and clocks until its result is ready.

    ``other`` is a second pipe that executes these instructions too; each goes where there is room first.
    """

    name: str
    occupancy: float
    latency: float
    other: str = ""


@dataclass(frozen=True)
class Machine:
    """One GPU.  Times are in clocks of the SM, bandwidths in bytes per clock, of one SM unless they say otherwise."""

    name: str
    arch: str
    sms: int
    ghz: float
    dram_bytes: float  # per second, nominal, of the GPU
    dram_efficiency: float  # share of it that a copy reaches: half reads, half writes
    dram_read_efficiency: float  # reads alone, by loads and cp.async
    dram_bulk_efficiency: float  # reads alone, by bulk copies
    dram_write_efficiency: float  # writes alone
    fitted: bool = False

    # limits of an SM (B)
    schedulers: int = 4
    registers: int = 65536
    register_unit: int = 256  # allocation granularity of registers, per warp
    shared_bytes: int = 233472
    shared_per_cta: int = 1024  # reserved by the system
    max_warps: int = 64
    max_ctas: int = 32
    l1_bytes: int = 262144  # shared memory and L1 together

    # memory
    dram_latency: float = 570  # H: idle, 288 ns; queues add to it as more bytes are in flight
    dram_load: float = 1  # M: weight of what queues add, see `memory.loaded`
    l2_latency: float = 262  # H, N: 260-265, of the near part of the L2
    l2_far_latency: float = 440  # N: 400-478, of the far part
    l2_far_share: float = 0.5  # Q: lines are spread over both parts by a hash of their address
    l2_near_bytes: float = 25e6  # N: the near part holds copies of what the far part has, up to this
    l2_bytes: float = 50e6  # C
    l1_latency: float = 40  # H; D
    l2_port: float = 64  # A nominal; about two thirds of it is reached by all SMs at once (see l2_share)
    l2_share: float = 40  # N: 37-40 bytes per clock of each SM when all SMs read from L2
    l2_write_cost: float = 1.0  # G: of a byte written to the L2, relative to one that is read
    tma_latency: float = 170  # D: of a bulk copy, in addition to that of a load
    tma_rate: float = 128  # G: bytes per clock of the copy engine
    tma_copy: float = 4  # G: least clocks of the copy engine per copy
    bulk_slots: int = 8  # S: a bulk copy of one lane: ELECT, 3 R2UR, 2 PLOP3, UBLKCP, BRA
    bulk_trip: float = 28  # G: clocks of a trip of the loop over the lanes that issue bulk copies
    store_latency: float = 250  # G: until a write is acknowledged
    shared_read_latency: float = 120  # G: until a bulk store has read its source, in addition to n_bytes / tma_rate
    shared_latency: float = 29  # H, Q
    matrix_latency: float = 33  # D: ldmatrix
    lines_per_clock: float = 1  # F: 128-byte lines of a load or store that the L1 looks up
    load_queue: float = 300  # G: most clocks that a load waits behind bulk copies, which queue in the copy engine

    # synchronisation
    barrier: float = 22  # Q: bar.sync, and
    barrier_warp: float = 2  # Q: for each warp of the barrier
    mbarrier_wait: float = 27  # Q: 54 for an arrival and a test
    mbarrier_wake: float = 12  # G: of a warp that waits
    warp_barrier: float = 5  # Q: 3-6
    fence: float = 12  # Q: 9-16
    gpu_fence: float = 285  # Q: 277-292 in an idle memory; it waits for the warp's own writes, too
    branch: float = 6  # until the next instruction of the warp; G

    # start of CTAs and kernels
    cta_start: float = 350  # G: from the end of a CTA to the first instruction of the next one
    cta_ns: float = 0.54  # Q: nanoseconds that the GPU takes to dispatch a CTA of 32 threads,
    cta_threads: float = 0.35  # Q: and the share more for one of 1024
    launch_us: float = 1.1  # F; N: 1.3 for small kernels.  Of an empty kernel in a CUDA graph, start to start
    stream_launch_us: float = 2.0  # Q: without a graph
    profiler_us: float = 2.0  # G: of an empty kernel that runs alone, as a profiler records it
    pdl_launch_us: float = 0.2  # F: of a kernel whose launch and start overlap the end of the one before
    window: int = 256  # S: instructions that ptxas looks ahead when it schedules a basic block

    # code
    code_l0_bytes: int = 32768  # I: instruction cache of a sub-partition
    code_l1_bytes: int = 131072  # I: of an SM
    code_l1_latency: float = 30  # G: of a jump to code that is in the SM's cache only
    code_l1_rate: float = 64  # G: bytes per clock from the SM's cache to those of the sub-partitions
    code_ahead: float = 2048  # I: bytes that are fetched ahead, 16 lines
    code_growth: float = 1.15  # S: machine instructions per issue slot of the PTX, where the machine code is not given

    # matrix pipe: clocks of one sub-partition for m16n8k16 of 16-bit operands
    mma_clocks: float = 6.5  # D: 62 % of 512 multiply-adds per clock
    mma_latency: float = 33  # D
    wgmma_share: float = 0.62  # D: clocks of wgmma, relative to those of mma.sync
    pipes: dict[str, Pipe] = field(default_factory=lambda: dict(PIPES), hash=False)

    @property
    def dram_rate(self) -> float:
        """Bytes per clock of the GPU that a copy reaches."""
        return self.dram_bytes * self.dram_efficiency / (self.ghz * 1e9)

    @property
    def dram_peak(self) -> float:
        """Bytes per clock of the GPU in the direction that is fastest."""
        best = max(
            self.dram_efficiency, self.dram_read_efficiency, self.dram_bulk_efficiency, self.dram_write_efficiency
        )
        return self.dram_bytes * best / (self.ghz * 1e9)

    def dram_rate_of(self, read: float, written: float, bulk: float = 0) -> float:
        """Bytes per clock of the GPU that a kernel reaches which reads and writes so many bytes.

        ``bulk`` of the bytes read are read by bulk copies.  Reads take the time that they take alone.  A write takes
        what makes equal parts of both as fast as a copy, and less only where nothing is read.
        """
        nominal = self.dram_bytes / (self.ghz * 1e9)
        if not read:
            return nominal * (self.dram_write_efficiency if written else self.dram_efficiency)
        alone = ((read - bulk) / self.dram_read_efficiency + bulk / self.dram_bulk_efficiency) / read
        mixed = 2 / self.dram_efficiency - alone
        return nominal * (read + written) / (read * alone + written * mixed)

    def microseconds(self, clocks: float) -> float:
        """Clocks as microseconds."""
        return clocks / (self.ghz * 1e3)


PIPES = {  # A for the occupancy, D for the latency, unless a letter says otherwise
    "int": Pipe("alu", 2, 4.5),
    "add": Pipe("alu", 2, 4.5, other="fma"),  # S, Q: IADD3, or IMAD with a constant factor; additions and shl
    "imad": Pipe("fma", 2, 4.5),
    "imad.hi": Pipe("fma", 4, 13),  # Q
    "fp32": Pipe("fma", 1, 4),
    "fp32x2": Pipe("fma", 2, 4),
    "widen": Pipe("fma", 2, 4.5),  # S: bf16 to float32, IMAD.U32
    "compare": Pipe("alu", 2, 4.5),
    "half": Pipe("fma", 1, 4.5),
    "pack": Pipe("alu", 2, 5),  # to and from packed halves and eight-bit floats
    "unpack": Pipe("alu", 2, 5),  # from eight-bit floats to halves
    "convert": Pipe("xu", 8, 14),  # integers and floats: on the pipe of special functions
    "sfu": Pipe("xu", 8, 18),
    "ex2": Pipe("xu", 8, 18),
    "bits": Pipe("xu", 8, 24),  # Q: popc, brev, clz, bfind
    "fp64": Pipe("fp64", 2, 8),
    "special": Pipe("xu", 2, 20),  # special registers
    "vote": Pipe("alu", 2, 22),  # Q
    "redux": Pipe("adu", 8, 44),  # K, Q
    "shuffle": Pipe("lsu", 1, 24),  # K: one a clock and SM, as a wavefront of shared memory
    "control": Pipe("branch", 1, 0),
}
PIPES_100 = {  # Q
    **PIPES, "pack": Pipe("alu", 4, 4), "unpack": Pipe("alu", 2, 4),
}  # fmt: skip
PIPES_103 = {**PIPES_100, "ex2": Pipe("xu", 4, 18)}  # Q: 32 exponentials per clock, and 16 of the others

# S: issue slots of operations that are not exactly one machine instruction: register moves are eliminated, 64-bit
# arithmetic takes several.
SLOTS = {
    "mov": 0, "cvta": 0, "ld.param": 0, "cvt.64": 0, "wide": 1, "add.64": 2, "logic.64": 2, "shift.64": 2, "setp.64": 2,
    "selp.64": 2, "minmax.64": 4, "mul.64": 4, "mad.64": 4, "div.32": 18, "div.64": 80, "div.f32": 9, "sqrt.f32": 8,
    "div.approx": 2, "ex2": 3, "lg2": 3, "bfe": 2, "bfind": 2, "cvt.joined": 0, "cvt.bf16.high": 2,
}  # fmt: skip

H100 = Machine(
    "H100", "sm_90a", sms=132, ghz=1.83, dram_bytes=3.35e12,  # C; clocks under load G
    dram_efficiency=0.90,  # K: between 0.86 and 0.95
    dram_read_efficiency=0.86, dram_bulk_efficiency=0.86, dram_write_efficiency=0.95,  # K
)  # fmt: skip
H200 = Machine(
    "H200", "sm_90a", sms=132, ghz=1.83, dram_bytes=4.8e12,  # C; clocks under load G
    dram_efficiency=0.81,  # E: above 0.78
    dram_read_efficiency=0.84, dram_bulk_efficiency=0.84, dram_write_efficiency=0.85,  # N: above 0.81, board unknown
    dram_latency=587,  # F: `gpumodel.validate`, state updates and gated delta rules; D: 480-560 in an idle memory
    stream_launch_us=7.29,  # F: the same, a gated delta rule between two events; N: 2.5 one after the other
)  # fmt: skip
B200 = Machine(
    "B200", "sm_100a", sms=148, ghz=1.85, dram_bytes=8.0e12,  # C; clocks under load G
    dram_efficiency=0.85,  # E: 0.83 and 0.855
    dram_read_efficiency=0.836, dram_bulk_efficiency=0.907, dram_write_efficiency=0.91,  # M, M; Q
    dram_latency=740, tma_latency=60,  # M
    l1_latency=43,  # Q: 42-47
    l2_latency=300, l2_far_latency=640, l2_near_bytes=60e6, l2_bytes=126e6,  # Q; E: times of warm calls rise from 60 MB
    l2_share=70, l2_port=85,  # Q: 60-77 of all SMs, up to 89 of one
    launch_us=0.7,  # Q: 0.56-0.82
    mma_clocks=8.5, mma_latency=20,  # Q
    pipes=PIPES_100,  # Q
)  # fmt: skip
B300 = replace(
    B200, name="B300", arch="sm_103a", ghz=1.92,  # Q
    dram_efficiency=0.835, dram_read_efficiency=0.85, dram_bulk_efficiency=0.911, dram_write_efficiency=0.912,  # Q
    pipes=PIPES_103,  # Q
)  # fmt: skip


def value_of(machine: Machine, field: str) -> Any:
    """Return a field of a machine, or of one of its pipes."""
    if not field.startswith("pipes."):
        return getattr(machine, field)
    _, pipe, part = field.split(".")
    return getattr(machine.pipes[pipe], part)


def with_value(machine: Machine, field: str, value: float) -> Machine:
    """Return the machine with another value of a field."""
    if not field.startswith("pipes."):
        return replace(machine, **{field: value})
    _, pipe, part = field.split(".")
    pipes = {**machine.pipes, pipe: replace(machine.pipes[pipe], **{part: value})}
    return replace(machine, pipes=pipes)


def fitted(machine: Machine, path: Path = FITTED) -> Machine:
    """Return a machine with the constants that a file of fitted ones has for it, if there are any."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if machine.name not in stored:
        return machine
    for field_name, value in stored[machine.name]["constants"].items():
        machine = with_value(machine, field_name, value)
    return replace(machine, fitted=True)


MACHINES = {machine.name: fitted(machine) for machine in (H200, B200, H100, B300)}
