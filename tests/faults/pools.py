"""Faults of the gradient policy, of pools that are copied and kept, and of states of gated delta nets behind tokens."""

from faults import Fault

GRADIENTS = "tests/ops/test_gradients.py::"
EACH = GRADIENTS + "test_each_tensor_that_requires_grad_alone_is_refused_by_name"
POOLS = "tests/serving/test_serving_pool_state.py::"
COPY = POOLS + "test_a_copied_pool_continues_bit_for_bit_and_independently"
LIBRARY, STORAGE = "cute_ssm/ops/_library.py", "cute_ssm/serving/storage.py"
POOL, FOLD = "cute_ssm/serving/pool.py", "cute_ssm/ops/materialize_gated_delta/kernel.py"
GATED = "tests/ops/test_serving_out_of_range.py::test_rows_of_a_materialisation_of_gated_delta_nets"
STATES = "tests/ops/materialize_gated_delta/test_materialize_gated_delta.py::test_emulated"

FAULTS = [
    Fault(
        "step sizes are taken for weights",
        "cute_ssm/ops/_gradients.py",
        '("A", "A_log", "D",',
        '("A", "dt", "A_log", "D",',
        (EACH,),
    ),
    Fault(
        "eager calls do not look at gradients",
        LIBRARY,
        "            values = checked(values)\n        try:\n            run(*values)",
        "            pass\n        try:\n            run(*values)",
        (EACH,),
    ),
    Fault(
        "calls through the dispatcher do not look at gradients",
        LIBRARY,
        "            values = checked(values)\n        with",
        "            pass\n        with",
        (EACH,),
    ),
    Fault(
        "gradients do not pass from segment to segment",
        "cute_ssm/ops/selective_scan/reference.py",
        "        carry = next(grads)\n",
        "        next(grads)\n",
        (GRADIENTS + "test_gradcheck_of_the_recomputation_in_segments",),
    ),
    Fault(
        "D, dt_bias and z of a decode step do not count as needing gradients",
        "cute_ssm/integrations/_transformers_calls.py",
        "(state, hidden_states, dt, A, B, C, D, dt_bias, z),\n",
        "(state, hidden_states, dt, A, B, C),\n",
        ("tests/integrations/test_transformers.py::test_a_step_runs_unpatched_if_any_one_tensor_requires_grad",),
    ),
    Fault(
        "views are pickled beside the memory",
        STORAGE,
        '_DERIVED = ("prev_num_accepted_tokens", "cache_buf_idx", "ring_start", "_arguments")',
        "_DERIVED = ()",
        (COPY,),
    ),
    Fault("draws of seeds are not kept", STORAGE, '            "draws": self._draws,\n', "", (COPY,)),
    Fault(
        "a slot that is freed stays allocated on the device",
        POOL,
        "        self._unallocated[slot].fill_(True)\n",
        "",
        (POOLS + "test_a_commit_of_an_unallocated_slot_is_refused_by_name[mamba2-reference]",),
    ),
    Fault(
        "rows of unallocated slots are committed on a GPU",
        "cute_ssm/ops/commit/kernel.py",
        "active = tensors.unallocated[row.slot] == 0",
        "active = tensors.unallocated[row.slot] >= 0",
        (POOLS + "test_on_a_gpu_rows_of_unallocated_slots_are_left_alone",),
    ),
    Fault(
        "the first layer is written before A of the others is looked at",
        "cute_ssm/serving/_folds.py",
        "        check_A(name, tensor, pool.state.shape[2:])\n",
        "",
        (POOLS + "test_a_layer_that_cannot_be_folded_leaves_all_layers_as_they_are",),
    ),
    Fault(
        "sequences are copied to slots that nobody allocated",
        POOL,
        """        target._check_allocated("destination", destination)
        for name""",
        "        for name",
        (POOLS + "test_destinations_that_nobody_allocated_are_refused_by_name",),
    ),
    Fault(
        "any seed is kept",
        STORAGE,
        '        check_seed(seed, "state_dict: seed")\n',
        "",
        (POOLS + "test_a_state_dict_with_wrong_contents_changes_nothing",),
    ),
    Fault(
        "pools of other sizes are taken for destinations",
        POOL,
        "            check_fits(self, target)\n",
        "            pass\n",
        (POOLS + "test_pools_that_do_not_fit",),
    ),
    Fault(
        "values behind the folded tokens are read",
        "cute_ssm/ops/_gated_delta/pending.py",
        "stage_values(value, window, count, shared.values",
        "stage_values(value, window, used, shared.values",
        (STATES,),
    ),
    Fault("states without tokens are rounded anew", FOLD, "if pending.count == 0:", "if pending.count < 0:", (STATES,)),
    Fault(
        "slots beyond the pool are written",
        FOLD,
        "and in_range(target, tensors.out.shape[0])",
        "and target >= 0",
        (GATED,),
    ),
    Fault(
        "more tokens than the window are folded", FOLD, "in_range(available, window + 1)", "available >= 0", (GATED,)
    ),
]
