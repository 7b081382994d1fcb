"""Faults of the kernel of `selective_state_update`."""

from faults import Fault

KERNEL = "cute_ssm/ops/selective_state_update/kernel.py"
STORES = "cute_ssm/ops/selective_state_update/state_stores.py"
IO = "cute_ssm/ops/selective_state_update/token_io.py"
LOOP = "cute_ssm/ops/selective_state_update/token_loop.py"
PRODUCTS = "cute_ssm/ops/selective_state_update/products.py"
ONE = "tests/ops/selective_state_update/test_selective_state_update.py::"
MANY = "tests/ops/selective_state_update/test_selective_state_update_tokens.py::"
RANGE = "tests/ops/test_out_of_range.py::"

BUDGETS = "tests/tools/test_count.py::"

FAULTS = [
    Fault(
        "half of the lanes of a row of eight columns are idle",
        "cute_ssm/ops/selective_state_update/config.py",
        "else (1, 2, 4, 8, 16, 32)",
        "else (2, 4, 8, 16, 32)",
        (BUDGETS + "test_budget_of_rows_of_eight_columns",),
    ),
    Fault(
        "a scale is written to a padded destination",
        STORES,
        "if active and self.view.owns_row(lane):",
        "if self.view.owns_row(lane):",
        (RANGE + "test_slots_of_a_selective_state_update",),
    ),
    Fault(
        "no fence before the state leaves",
        KERNEL,
        "            if const_expr(spec.writes_last_state):\n"
        '                cute.arch.fence_proxy("async.shared", space="cta")\n',
        "",
        (ONE + "test_persistent_ring",),
    ),
    Fault(
        "no barrier before the state leaves",
        KERNEL,
        "        cute.arch.sync_warp()\n        if const_expr(self.writes):",
        "        if const_expr(self.writes):",
        (ONE + "test_persistent_ring",),
    ),
    Fault(
        "a stage is used again too early",
        KERNEL,
        "cute.arch.cp_async_bulk_wait_group(1, read=True)  # all but",
        "cute.arch.cp_async_bulk_wait_group(2, read=True)  # all but",
        (ONE + "test_persistent_ring", MANY + "test_persistent_ring"),
    ),
    Fault(
        "the phase of a stage never changes",
        KERNEL,
        "unit, phase, stage = next_unit, phase ^ 1 if next_stage == 0 else phase, next_stage",
        "unit, phase, stage = next_unit, phase, next_stage",
        (ONE + "test_persistent_ring",),
    ),
    Fault(
        "the last copies are not waited for",
        KERNEL,
        "                if lane == 0:\n                    cute.arch.cp_async_bulk_wait_group(0, read=True)\n\n",
        "                pass\n\n",
        (ONE + "test_persistent_ring",),
    ),
    Fault(
        "the column of the accepted token is one off",
        KERNEL,
        "column = accepted - 1 if accepted > 0 else Int64(0)",
        "column = accepted if accepted > 0 else Int64(0)",
        (RANGE + "test_columns_offsets_and_destinations_of_sequences",),
    ),
    Fault(
        "the skip term uses D of the first row",
        IO,
        "memory.load_scalar(memory.address(tensors.D, unit.head, row), self.D_dtype)",
        "memory.load_scalar(memory.address(tensors.D, unit.head, 0), self.D_dtype)",
        (ONE + "test_sm_100a",),
    ),
    Fault(
        "the running decay is never multiplied in",
        LOOP,
        "if product < SMALLEST or product > LARGEST:",
        "if product < 0.0:",
        (MANY + "test_products_and_loop[loop-decay=400.0]",),
    ),
    Fault(
        "random bits of the slot that is read",
        STORES,
        "        random = self.random(tensors, unit, target.slot, token)",
        "        random = self.random(tensors, unit, unit.slot, token)",
        (MANY + "test_random_bits_are_those_of_the_reference",),
    ),
    Fault(
        "a causal mask one token late",
        PRODUCTS,
        "coefficients.append(value if j <= token else zero)",
        "coefficients.append(value if j <= token + 1 else zero)",
        (MANY + "test_sm_100a",),
    ),
    Fault(
        "products of bfloat16 coefficients in one part",
        PRODUCTS,
        "        for part in coefficients:\n",
        "        for part in coefficients[:1]:\n",
        (MANY + "test_sm_100a",),
    ),
]
