"""`prefer_shared`: how much of an SM's cache a launch wants as shared memory.

``preferred_smem_carveout`` of the DSL's ``launch`` reaches no launch of nvidia-cutlass-dsl 4.8.1: it is an attribute of
functions that the DSL's own executor would set, and compiled host code does not.  The launch attribute does.
"""

from cutlass import Int32
from cutlass._mlir import ir
from cutlass._mlir.dialects import cuda


def prefer_shared(percent: int = 100) -> None:
    """Make the launch that was traced last ask for `percent` of the cache as shared memory.

    The hardware takes the next larger of its own steps.  Without it the driver may choose a share that holds fewer CTAs
    than fit.
    """
    operations = list(ir.InsertionPoint.current.block.operations)
    launch = [operation for operation in operations if operation.operation.name == "cuda.launch_ex"][-1]
    config = [operation for operation in operations if operation.operation.name == "cuda.launch_cfg.create"][-1]
    with ir.InsertionPoint(launch):
        cuda.launch_cfg_shared_mem_carveout(config.operation.results[0], Int32(percent).ir_value())
