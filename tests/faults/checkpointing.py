"""Faults of the kernel of `checkpointing_ssu`."""

from faults import Fault

CONSUMER = "cute_ssm/ops/checkpointing_ssu/consumer.py"
OUTPUTS = "cute_ssm/ops/checkpointing_ssu/outputs.py"
PREP = "cute_ssm/ops/checkpointing_ssu/prep.py"
UNITS = "cute_ssm/ops/checkpointing_ssu/units.py"
COUNTS = "tests/ops/checkpointing_ssu/test_checkpointing_ssu.py::test_every_number_of_accepted_tokens_of_the_kernel"
TESTS = "tests/ops/checkpointing_ssu/test_checkpointing_ssu.py::"
FORMS = TESTS + "test_forms_on_one_multiprocessor[ring-dynamic-{'schedule': 2}]"
LATER = "tests/ops/test_later_tokens.py::test_checkpointing_kernel"
RANGE = "tests/ops/test_out_of_range.py::"

FAULTS = [
    Fault(
        "a causal mask one position late",
        OUTPUTS,
        "value = value if j <= decays.position else Float32(0.0)",
        "value = value if j <= decays.position + 1 else Float32(0.0)",
        (COUNTS,),
    ),
    Fault(
        "x of a later token that is not finite reaches earlier outputs",
        OUTPUTS,
        "if math.any_nan([value for c in sums for value in c[::2]]):",
        "if math.any_nan([Float32(0.0)]):",
        (LATER,),
    ),
    Fault(
        "a token alone sees x of the next one",
        OUTPUTS,
        "alone = self._add_tokens(x, j + 1, end,",
        "alone = self._add_tokens(x, j + 2, end,",
        (LATER,),
    ),
    Fault(
        "no fence before outputs leave",
        CONSUMER,
        '        cute.arch.fence_proxy("async.shared", space="cta")\n',
        "",
        (COUNTS,),
        after="def _store_outputs(",
    ),
    Fault(
        "a tile is given back before it is read",
        CONSUMER,
        "            sums = self.tile.product(pointers, block.projection)\n"
        "            self._release(pipeline.empty, stage, lane)",
        "            self._release(pipeline.empty, stage, lane)\n"
        "            sums = self.tile.product(pointers, block.projection)",
        ("tests/ops/checkpointing_ssu/test_checkpointing_ssu.py::test_units_of_three_heads", COUNTS),
    ),
    Fault(
        "a new state is overwritten while it leaves",
        CONSUMER,
        "            cute.arch.cp_async_bulk_wait_group(0, read=True)\n            self._release(empty, stage, lane)",
        "            self._release(empty, stage, lane)",
        (FORMS,),
    ),
    Fault(
        "the last decay of the history is counted twice",
        PREP,
        "math.remaining_sum(rates[i] * step if later < pending else Float32(0.0))",
        "math.remaining_sum(rates[i] * step if later <= pending else Float32(0.0))",
        (COUNTS,),
    ),
    Fault(
        "a full window is written one step early",
        CONSUMER,
        "writes = header.pending + header.num_tokens > self.spec.window",
        "writes = header.pending + header.num_tokens >= self.spec.window",
        (COUNTS,),
    ),
    Fault(
        "rows are appended before they are there",
        PREP,
        "            cute.arch.mbarrier_wait(bar, phase)\n            self._store_history(",
        "            self._store_history(",
        (COUNTS,),
    ),
    Fault(
        "B is appended by the second head of a group",
        PREP,
        "leads_group = unit.head % spec.heads_per_group == 0",
        "leads_group = unit.head % spec.heads_per_group == 1",
        (COUNTS,),
    ),
    Fault(
        "cursors beyond the ring are taken",
        UNITS,
        "in_range(cursor, bound)",
        "cursor >= 0",
        (RANGE + "test_slots_and_cursors_of_a_checkpointed_step",),
    ),
    Fault(
        "accepted tokens beyond the window are taken",
        UNITS,
        "in_range(pending, spec.window + 1)",
        "pending >= 0",
        (RANGE + "test_slots_and_cursors_of_a_checkpointed_step",),
    ),
    Fault(
        "a work item's sequence is not checked",
        UNITS,
        "active = active and in_range(sequence, work.batch)",
        "active = active and sequence >= 0",
        (RANGE + "test_work_items_of_a_checkpointed_step",),
    ),
]
