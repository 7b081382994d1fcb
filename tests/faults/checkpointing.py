"""Faults of the kernel of `checkpointing_ssu`."""

from faults import Fault

CONSUMER = "cute_ssm/ops/checkpointing_ssu/consumer.py"
PREP = "cute_ssm/ops/checkpointing_ssu/prep.py"
KERNEL = "cute_ssm/ops/checkpointing_ssu/kernel.py"
COUNTS = "tests/ops/checkpointing_ssu/test_checkpointing_ssu.py::test_every_number_of_accepted_tokens_of_the_kernel"
TESTS = "tests/ops/checkpointing_ssu/test_checkpointing_ssu.py::"
FORMS = TESTS + "test_forms_on_one_multiprocessor[ring-dynamic-{'schedule': 2}]"
LATER = "tests/ops/test_later_tokens.py::test_checkpointing_kernel"
RANGE = "tests/ops/test_out_of_range.py::"

FAULTS = [
    Fault(
        "a causal mask one position late",
        CONSUMER,
        "value = value if j <= diagonal else Float32(0.0)",
        "value = value if j <= diagonal + 1 else Float32(0.0)",
        (COUNTS,),
    ),
    Fault(
        "x of a later token that is not finite reaches earlier outputs",
        CONSUMER,
        "if math.any_nan([value for c in sums for value in c[::2]]):",
        "if math.any_nan([Float32(0.0)]):",
        (LATER,),
    ),
    Fault(
        "a token alone sees x of the next one",
        CONSUMER,
        "alone = self.add_history(x, j + 1, end,",
        "alone = self.add_history(x, j + 2, end,",
        (LATER,),
    ),
    Fault(
        "no fence before outputs leave",
        CONSUMER,
        '            cute.arch.fence_proxy("async.shared", space="cta")\n',
        "",
        (COUNTS,),
        after="# rows of out, in place of z, leave by one copy each\n",
    ),
    Fault(
        "a tile is given back before it is read",
        CONSUMER,
        "            sums = self.tile.product(at, block[1])\n            self.leave(empty, s, lane)",
        "            self.leave(empty, s, lane)\n            sums = self.tile.product(at, block[1])",
        ("tests/ops/checkpointing_ssu/test_checkpointing_ssu.py::test_units_of_three_heads", COUNTS),
    ),
    Fault(
        "a new state is overwritten while it leaves",
        CONSUMER,
        "            cute.arch.cp_async_bulk_wait_group(0, read=True)\n            self.leave(empty, stage, lane)",
        "            self.leave(empty, stage, lane)",
        (FORMS,),
    ),
    Fault(
        "the last decay of the history is counted twice",
        PREP,
        "math.remaining_sum(rates[i] * step if later < k else Float32(0.0))",
        "math.remaining_sum(rates[i] * step if later <= k else Float32(0.0))",
        (COUNTS,),
    ),
    Fault(
        "a full window is written one step early",
        CONSUMER,
        "writes = k + n > self.spec.window",
        "writes = k + n >= self.spec.window",
        (COUNTS,),
    ),
    Fault(
        "rows are appended before they are there",
        PREP,
        "            cute.arch.mbarrier_wait(bar, phase)\n            self.append(place, history, at, lane)",
        "            self.append(place, history, at, lane)",
        (COUNTS,),
    ),
    Fault(
        "B is appended by the second head of a group",
        PREP,
        "leader = head % self.owner.per_group == 0 and column == 0",
        "leader = head % self.owner.per_group == 1 and column == 0",
        (COUNTS,),
    ),
    Fault(
        "cursors beyond the ring are taken",
        KERNEL,
        "in_range(cursor, bound)",
        "cursor >= 0",
        (RANGE + "test_slots_and_cursors_of_a_checkpointed_step",),
    ),
    Fault(
        "accepted tokens beyond the window are taken",
        KERNEL,
        "in_range(k, spec.window + 1)",
        "k >= 0",
        (RANGE + "test_slots_and_cursors_of_a_checkpointed_step",),
    ),
    Fault(
        "a work item's sequence is not checked",
        KERNEL,
        "live = live and in_range(b, batch)",
        "live = live and b >= 0",
        (RANGE + "test_work_items_of_a_checkpointed_step",),
    ),
]
