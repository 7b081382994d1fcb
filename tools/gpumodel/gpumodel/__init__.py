"""A machine model: estimates how long kernels take on a GPU from what their warps did in the emulator `ptxsim`.

    import gpumodel

    modelled = gpumodel.time_call(lambda: kernel(x, y), "H200")    # a kernel of ptxsim.compile, on CPU tensors
    modelled.us, modelled.of_roof, modelled.kernels[0].timing.stalls

`record` runs a call in ``ptxsim``, but only the CTAs of one SM, and records what every warp did (`trace`).  `lower`
gives each instruction a pipe, a latency and issue slots, and orders basic blocks as a compiler would.  `replay` runs
the record on a model of the SM: in order, with a scoreboard, and as many CTAs at a time as are resident.  `constants`
has the figures of each GPU with their sources.  The modelled time is that of the SM with the most CTAs, plus a
constant per launch.  `timeline` draws the life of a CTA.

Use it to compare configs of a kernel: it accounts for overlap, not only for totals.  The constants are published
figures, and a few that fit published times; ``fitted`` tells whether some fit times that were measured for this
project.  No number of this model is a measurement.
"""

from .code import MachineCode
from .constants import B200, B300, H100, H200, MACHINES, Machine
from .memory import Residency
from .model import (
    Conditions,
    KernelTime,
    Modelled,
    bytes_of,
    is_steady,
    machine_of,
    record,
    resident_ctas,
    resources,
    sampling,
    time_call,
    time_launch,
    time_session,
)
from .replay import Replay, Setting, Timing
from .trace import Trace

__version__ = "0.1.0"

__all__ = [
    "B200",
    "B300",
    "H100",
    "H200",
    "MACHINES",
    "Conditions",
    "KernelTime",
    "Machine",
    "MachineCode",
    "Modelled",
    "Replay",
    "Residency",
    "Setting",
    "Timing",
    "Trace",
    "bytes_of",
    "is_steady",
    "machine_of",
    "record",
    "resident_ctas",
    "resources",
    "sampling",
    "time_call",
    "time_launch",
    "time_session",
]
