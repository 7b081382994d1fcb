"""`prefer_shared`: set how much of an SM's cache a launch uses as shared memory.

``preferred_smem_carveout`` of the DSL's ``launch`` has no effect in nvidia-cutlass-dsl 4.8.1: only the DSL's own
executor sets that function attribute, compiled host code does not.  The launch attribute takes effect.
"""

from cutlass import Int32
from cutlass._mlir import ir
from cutlass._mlir.dialects import cuda


def prefer_shared(percent: int = 100) -> None:
    """Request `percent` of the cache as shared memory for the launch that was traced last.

    The hardware rounds up to one of its own steps.  Without a request, the driver may choose a share that holds fewer
    CTAs than the SM has room for.
    """
    operations = list(ir.InsertionPoint.current.block.operations)
    launch = [operation for operation in operations if operation.operation.name == "cuda.launch_ex"][-1]
    config = [operation for operation in operations if operation.operation.name == "cuda.launch_cfg.create"][-1]
    with ir.InsertionPoint(launch):
        cuda.launch_cfg_shared_mem_carveout(config.operation.results[0], Int32(percent).ir_value())
