"""A machine model: how long a call would take on a GPU, from what its warps did in the emulator.

    import machine

    keys = {"batch": 256, "nheads": 16, "state_dtype": "float16"}       # as for cute_ssm.workloads.build
    modelled = machine.time_op("selective_state_update", keys, "H200")  # any batch; large ones are extrapolated
    modelled.us, modelled.of_roof, modelled.kernels[0].timing.stalls

    config = {"rows": 32, "stages": 3}                                  # fields to override: the objective of a tuner
    machine.time_op("selective_state_update", keys, "B200", config)
    machine.time_call(workloads.build(op, keys).run, "B200")            # any code that launches kernels, replayed whole

How: `record` runs the call in ``ptxsim``, but only the CTAs that one SM of the machine would get, and keeps what every
warp did (`trace`).  `lower` gives each instruction a pipe, a latency and issue slots, and puts basic blocks into the
order that a compiler would.  `replay` runs these records on one SM: in order, scoreboarded, with the CTAs that fit.
`constants` holds all that is known of H200 and B200, with sources.  The time is that of the SM with most CTAs, plus a
constant per launch.

What it is for: choices between configs, because overlap counts and not only totals.  It is fitted to nothing: the
constants are published figures, ``fitted`` says so in every result, and no number of this model is a measurement.
"""

from .constants import B200, H200, MACHINES, Machine
from .model import (
    KernelTime,
    Modelled,
    bytes_of,
    machine_of,
    places,
    record,
    resources,
    time_call,
    time_launch,
    time_op,
)
from .replay import Replay, Timing
from .trace import Trace

__all__ = [
    "B200",
    "H200",
    "MACHINES",
    "KernelTime",
    "Machine",
    "Modelled",
    "Replay",
    "Timing",
    "Trace",
    "bytes_of",
    "machine_of",
    "places",
    "record",
    "resources",
    "time_call",
    "time_launch",
    "time_op",
]
