"""Faults of operators: what they check, choose and memorise."""

from faults import Fault

PDL = "tests/ops/test_launches.py::"
PLANS = "tests/ops/test_plans.py::"

FAULTS = [
    Fault(
        "True reads early",
        "cute_ssm/ops/checkpointing_ssu/arguments.py",
        "        return WAIT_FIRST\n",
        "        return EARLY_READS\n",
        (PDL + "test_kinds_of_launch",),
    ),
    Fault(
        "states are read before the wait that comes first",
        "cute_ssm/ops/checkpointing_ssu/kernel.py",
        "        if const_expr(self.spec.pdl == WAIT_FIRST):\n            cute.arch.griddepcontrol_wait()\n",
        "",
        (PDL + "test_checkpointing_uses_memory_after_the_wait",),
    ),
    Fault(
        "histories are read early",
        "cute_ssm/ops/checkpointing_ssu/producer.py",
        "        if const_expr(self.early_reads):\n            cute.arch.griddepcontrol_wait()\n"
        "        if unit.active:",
        "        if unit.active:",
        (PDL + "test_checkpointing_uses_memory_after_the_wait",),
    ),
    Fault(
        "no wait of a kernel without work",
        "cute_ssm/ops/checkpointing_ssu/producer.py",
        "cute.arch.griddepcontrol_wait()  # for a CTA without units, which has not waited",
        "pass",
        (PDL + "test_a_kernel_of_a_pair_that_has_nothing_to_do_waits",),
    ),
    Fault(
        "a step does not wait",
        "cute_ssm/ops/selective_state_update/kernel.py",
        "        cute.arch.griddepcontrol_wait()\n",
        "",
        (PDL + "test_kernels_prefer_shared_memory_to_cache[selective_state_update]",),
    ),
    Fault(
        "a step leaves the cache as it is",
        "cute_ssm/ops/selective_state_update/kernel.py",
        "        launch.prefer_shared()\n",
        "",
        (PDL + "test_kernels_prefer_shared_memory_to_cache[selective_state_update]",),
    ),
    Fault(
        "a fault of a plan is a refusal",
        "cute_ssm/ops/_plans.py",
        "REFUSALS = (TypeError, ValueError)",
        "REFUSALS = (TypeError, ValueError, AttributeError)",
        (PLANS + "test_only_what_an_entry_raises_is_a_refusal[selective_scan]",),
    ),
    Fault(
        "a flag is missing in the key of plans",
        "cute_ssm/ops/selective_state_update/operator.py",
        "x.device, dt_softplus, disable_state_update,",
        "x.device, disable_state_update,",
        (PLANS + "test_a_call_runs_the_kernel_of_its_own_kind_whatever_plans_there_are",),
    ),
    Fault(
        "plans for narrow rows do not know their layout",
        "cute_ssm/ops/_gated_delta/arguments.py",
        "    return q.stride(), k.stride(), v.stride(), ",
        "    return ",
        (PLANS + "test_a_call_runs_the_kernel_of_its_own_kind_whatever_plans_there_are",),
    ),
    Fault(
        "what requires grad is not noticed beside what is no tensor",
        "cute_ssm/ops/_library.py",
        "found = requires_grad(values)",
        "found = False",
        (
            "tests/ops/test_gradients.py::"
            "test_what_requires_grad_is_noticed_beside_what_is_no_tensor_and_whatever_levels_are_called",
        ),
    ),
    Fault(
        "a time in the future is an edit",
        "cute_ssm/runtime/toolchain.py",
        " and at != _AHEAD.get(file)",
        "",
        ("tests/runtime/test_runtime_cache.py::test_a_time_in_the_future_is_no_edit_until_it_changes",),
    ),
]
