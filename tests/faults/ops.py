"""Faults of operators: what they check, choose and memorise."""

from faults import Fault

PDL = "tests/ops/test_launches.py::"

FAULTS = [
    Fault(
        "True reads early",
        "cute_ssm/ops/_checkpointing_arguments.py",
        "        return WAIT_FIRST\n",
        "        return EARLY_READS\n",
        (PDL + "test_kinds_of_launch",),
    ),
    Fault(
        "states are read before the wait that comes first",
        "cute_ssm/kernels/checkpointing_ssu.py",
        "        if const_expr(self.spec.pdl == WAIT_FIRST):\n            cute.arch.griddepcontrol_wait()\n",
        "",
        (PDL + "test_checkpointing_uses_memory_after_the_wait",),
    ),
    Fault(
        "histories are read early",
        "cute_ssm/kernels/checkpointing_ssu.py",
        "        if const_expr(self.early):\n            cute.arch.griddepcontrol_wait()\n        if live:",
        "        if live:",
        (PDL + "test_checkpointing_uses_memory_after_the_wait",),
    ),
    Fault(
        "no wait of a kernel without work",
        "cute_ssm/kernels/checkpointing_ssu.py",
        "cute.arch.griddepcontrol_wait()  # nothing has, if there was no unit",
        "pass",
        (PDL + "test_a_kernel_of_a_pair_that_has_nothing_to_do_waits",),
    ),
    Fault(
        "a step does not wait",
        "cute_ssm/kernels/selective_step.py",
        "        cute.arch.griddepcontrol_wait()\n",
        "",
        (PDL + "test_kernels_prefer_shared_memory_to_cache[selective_state_update]",),
    ),
    Fault(
        "a step leaves the cache as it is",
        "cute_ssm/kernels/selective_step.py",
        "        launch.prefer_shared()\n",
        "",
        (PDL + "test_kernels_prefer_shared_memory_to_cache[selective_state_update]",),
    ),
]
