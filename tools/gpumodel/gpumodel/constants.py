"""The constants of the machine model, all in this file, each with its source.

None is fitted to a measurement of this project (``fitted`` is False).  The figures are rounded ones from the vendor's
documents and from published microbenchmarks.  Until they are fitted to runs on a GPU, use the model to compare kernels,
not to predict times.

Sources, by the letter in a comment:

A  CUDA C++ Programming Guide, "Arithmetic Instructions", throughput table of compute capabilities 9.0 and 10.0: results
   per clock and SM.  128 for float32 add, multiply and fma; 64 for 32-bit integers, logic, comparisons, minimum and
   maximum, and conversions; 16 for special functions; 32 for shuffles.  A warp instruction of r results per clock
   occupies its pipe for 32 * 4 / r clocks in each of the four sub-partitions.
B  The same guide, "Technical Specifications per Compute Capability": registers, shared memory, warps, CTAs of an SM.
C  Data sheets: H200 (4.8 TB/s, 132 SMs, boost 1.98 GHz), DGX B200 (8 TB/s per GPU, 148 SMs, boost 1.965 GHz).
D  Luo et al., "Dissecting the NVIDIA Hopper Architecture through Microbenchmarking and Multiple Level Analysis", 2025,
   and its forerunner of 2024: latencies of shared memory, L1, L2, DRAM, mma.sync and TMA, and the share of the tensor
   peak that mma.sync reaches.  For an H100; taken for an H200 too, and for a B200 where nothing else is known.
E  Published copies: 0.85-0.9 of the nominal bandwidth on an H200 (vLLM #43083: 4.07 TB/s).
G  A guess of the right order of magnitude; fit these first.
S  Listings of sm_90a machine code of this project's kernels, beside their PTX.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Pipe:
    """How a class of instructions executes: clocks that one occupies its pipe, and clocks until its result is ready."""

    name: str
    occupancy: float
    latency: float


@dataclass(frozen=True)
class Machine:
    """One GPU.  Times are in clocks of the SM, bandwidths in bytes per clock, of one SM unless they say otherwise."""

    name: str
    arch: str
    sms: int
    ghz: float
    dram_bytes: float  # per second, nominal, of the GPU
    dram_efficiency: float  # share of it that a copy reaches
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
    dram_latency: float = 600  # D: 480-560 for an idle memory; under load more
    l2_latency: float = 265  # D
    l1_latency: float = 40  # D
    l2_port: float = 64  # A nominal; about half of it is reached by all SMs at once (see l2_share)
    l2_share: float = 42  # G: bytes per clock of each SM when all SMs read from L2
    tma_latency: float = 170  # D: of a bulk copy, in addition to that of a load
    tma_rate: float = 128  # G: bytes per clock of the copy engine
    tma_copy: float = 4  # G: least clocks of the copy engine per copy
    store_latency: float = 250  # G: until a write is acknowledged
    shared_read_latency: float = 120  # G: until a bulk store has read its source, in addition to n_bytes / tma_rate
    shared_latency: float = 29  # D
    matrix_latency: float = 33  # D: ldmatrix
    lines_per_clock: float = 2  # G: 128-byte lines of a load or store that the L1 looks up

    # synchronisation, all G
    barrier: float = 20
    mbarrier_wait: float = 20
    mbarrier_wake: float = 12
    warp_barrier: float = 8
    fence: float = 12
    gpu_fence: float = 500
    branch: float = 6  # until the next instruction of the warp
    cta_start: float = 350  # from the end of a CTA to the first instruction of the next one
    cta_interval: float = 8  # between the first CTAs of an SM
    launch_us: float = 1.6  # of an empty kernel in a CUDA graph, start to start
    window: int = 256  # S: instructions that ptxas looks ahead when it schedules a basic block

    # matrix pipe: clocks of one sub-partition for m16n8k16 of 16-bit operands
    mma_clocks: float = 6.5  # D: 62 % of 512 multiply-adds per clock
    mma_latency: float = 33  # D
    pipes: dict[str, Pipe] = field(default_factory=lambda: dict(PIPES), hash=False)

    @property
    def dram_rate(self) -> float:
        """Bytes per clock of the GPU that a copy reaches."""
        return self.dram_bytes * self.dram_efficiency / (self.ghz * 1e9)

    def microseconds(self, clocks: float) -> float:
        """Clocks as microseconds."""
        return clocks / (self.ghz * 1e3)


PIPES = {  # A for the occupancy, D for the latency
    "int": Pipe("alu", 2, 4.5),
    "imad": Pipe("fma", 2, 4.5),
    "fp32": Pipe("fma", 1, 4),
    "fp32x2": Pipe("fma", 2, 4),
    "compare": Pipe("alu", 2, 4.5),
    "half": Pipe("fma", 1, 4.5),
    "pack": Pipe("alu", 2, 5),  # to and from packed halves and eight-bit floats
    "convert": Pipe("xu", 8, 14),  # integers and floats: on the pipe of special functions
    "sfu": Pipe("xu", 8, 18),
    "fp64": Pipe("fp64", 2, 8),
    "special": Pipe("xu", 2, 20),  # special registers
    "vote": Pipe("alu", 2, 12),
    "shuffle": Pipe("lsu", 1, 24),
    "control": Pipe("branch", 1, 0),
}

# S: issue slots of operations that are not exactly one machine instruction: register moves are eliminated, 64-bit
# arithmetic takes several.
SLOTS = {
    "mov": 0, "cvta": 0, "ld.param": 0, "cvt.64": 0, "wide": 1, "add.64": 2, "logic.64": 2, "shift.64": 2, "setp.64": 2,
    "selp.64": 2, "minmax.64": 4, "mul.64": 4, "mad.64": 4, "div.32": 18, "div.64": 80, "div.f32": 9, "sqrt.f32": 8,
    "div.approx": 2, "ex2": 3, "lg2": 3,
}  # fmt: skip

# C and E; the clocks under load and the B200's DRAM latency are G
H200 = Machine("H200", "sm_90a", sms=132, ghz=1.83, dram_bytes=4.8e12, dram_efficiency=0.88)
B200 = Machine("B200", "sm_100a", sms=148, ghz=1.85, dram_bytes=8.0e12, dram_efficiency=0.88, dram_latency=650)
MACHINES = {machine.name: machine for machine in (H200, B200)}
