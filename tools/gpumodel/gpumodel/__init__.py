"""A machine model: how long kernels would take on a GPU, from what their warps did in the emulator `ptxsim`.

    import gpumodel

    modelled = gpumodel.time_call(lambda: kernel(x, y), "H200")    # a kernel of ptxsim.compile, on CPU tensors
    modelled.us, modelled.of_roof, modelled.kernels[0].timing.stalls

How: `record` runs the call in ``ptxsim``, but only the CTAs that one SM of the machine would get, and keeps what every
warp did (`trace`).  `lower` gives each instruction a pipe, a latency and issue slots, and puts basic blocks into the
order that a compiler would.  `replay` runs these records on one SM: in order, scoreboarded, with the CTAs that fit.
`constants` holds all that is known of H200 and B200, with sources.  The time is that of the SM with most CTAs, plus a
constant per launch.  `timeline` draws the life of a CTA.

What it is for: choices between configs, because overlap counts and not only totals.  It is fitted to nothing: the
constants are published figures, ``fitted`` says so in every result, and no number of this model is a measurement.
"""

from .constants import B200, H200, MACHINES, Machine
from .model import (
    KernelTime,
    Modelled,
    bytes_of,
    is_steady,
    machine_of,
    places,
    record,
    resources,
    sampling,
    time_call,
    time_launch,
    time_session,
)
from .replay import Replay, Timing
from .trace import Trace

__version__ = "0.1.0"

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
    "is_steady",
    "machine_of",
    "places",
    "record",
    "resources",
    "sampling",
    "time_call",
    "time_launch",
    "time_session",
]
