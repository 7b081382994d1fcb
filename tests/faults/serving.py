"""Faults of what engines need around the operators: cursors, lists of work, true states, pools."""

from faults import Fault

COMMIT = "cute_ssm/ops/commit/kernel.py"
ROWS = "cute_ssm/ops/_cursors/rows.py"
ITEMS = "cute_ssm/ops/build_work_items/kernel.py"
STATE = "cute_ssm/ops/materialize/kernel.py"
DECODE = "cute_ssm/ops/replay_decode/kernel.py"
POOL = "cute_ssm/serving/pool.py"
CURSORS = "tests/ops/commit/test_commit_and_build_work_items.py::test_emulated_sizes"
RANGE = "tests/ops/test_serving_out_of_range.py::"
STATES = "tests/ops/materialize/test_materialize.py::"
DECODES = "tests/ops/replay_decode/test_replay_decode.py::"
LAYERS = "cute_ssm/ops/materialize_layers/kernel.py"
ALL_STATES = "tests/ops/materialize_layers/test_materialize_layers.py::"

FAULTS = [
    Fault(
        "strides of the first layer for all",
        LAYERS,
        "stride=(slot_strides[layer], *strides)",
        "stride=(slot_strides[0], *strides)",
        (ALL_STATES + "test_emulated",),
    ),
    Fault(
        "a negative slot of a layer is written",
        LAYERS,
        "dst_slot != sizes.pad_slot_id and dst_slot >= 0",
        "dst_slot != sizes.pad_slot_id",
        (ALL_STATES + "test_what_is_out_of_range_is_left_alone_on_a_gpu",),
    ),
    Fault(
        "one seed for all layers",
        LAYERS,
        "tables.rand_seed.iterator + layer",
        "tables.rand_seed.iterator",
        (ALL_STATES + "test_each_layer_has_the_bits_of_materialize",),
    ),
    Fault(
        "one-token replay: columns beyond the last one count twice",
        DECODE,
        "values[at] = values[at] if inside else Float32(0.0)",
        "values[at] = values[at]",
        (DECODES + "test_emulated",),
    ),
    Fault(
        "one-token replay: decays of the token itself",
        DECODE,
        "after = math.from_lane(later[k], (lane + 1) % WARP)",
        "after = later[k]",
        (DECODES + "test_emulated",),
    ),
    Fault(
        "one-token replay: B of the first group alone is appended",
        DECODE,
        "stores_B = in_group == 0 and",
        "stores_B = head == 0 and",
        (DECODES + "test_emulated",),
    ),
    Fault(
        "one-token replay: positions have one bound",
        DECODE,
        "in_range(position, cutlass.min(tensors.dt_cache.shape[2], MOST_TOKENS))",
        "position < cutlass.min(tensors.dt_cache.shape[2], MOST_TOKENS)",
        (DECODES + "test_numbers_out_of_range_leave_their_rows_as_they_are",),
    ),
    Fault(
        "more tokens accepted than a window holds",
        COMMIT,
        "num_accepted <= cutlass.min(row.num_tokens, bounds.window)",
        "num_accepted <= row.num_tokens",
        (RANGE + "test_a_commit_of_more_tokens_than_a_window_holds_changes_nothing",),
    ),
    Fault(
        "a ring that does not turn",
        COMMIT,
        "cursor = pending - rest if pending >= rest else cursor + pending",
        "cursor = cursor + pending",
        ("tests/ops/commit/test_commit_and_build_work_items.py::test_emulated",),
    ),
    Fault(
        "the buffer does not change",
        COMMIT,
        "cursor = 1 - cursor",
        "cursor = cursor",
        ("tests/ops/commit/test_commit_and_build_work_items.py::test_emulated",),
    ),
    Fault(
        "seeds of the first layer alone",
        COMMIT,
        "cutlass.range(tensors.rand_seed.shape[0], unroll=4)",
        "cutlass.range(1, unroll=1)",
        ("tests/ops/commit/test_commit_and_build_work_items.py::test_emulated",),
    ),
    Fault(
        "slots are compared with one bound",
        ROWS,
        "slot != bounds.pad_slot_id and in_range(slot, tensors.prev_num_accepted_tokens.shape[0])",
        "slot != bounds.pad_slot_id and slot < tensors.prev_num_accepted_tokens.shape[0]",
        (RANGE + "test_rows_of_a_commit",),
    ),
    Fault(
        "cursors beyond the ring",
        ROWS,
        "pending <= bounds.window and in_range(cursor, bounds.num_cursors)",
        "pending <= bounds.window and cursor >= 0",
        (RANGE + "test_rows_of_a_commit",),
    ),
    Fault(
        "rows that write come in any order",
        ITEMS,
        "rank = before + cute.arch.popc(ballot & Int32(below))",
        "rank = before",
        ("tests/ops/commit/test_commit_and_build_work_items.py::test_emulated",),
    ),
    Fault(
        "no barrier between the two passes",
        ITEMS,
        "        cute.arch.sync_threads()\n        before, total",
        "        before, total",
        ("tests/ops/commit/test_commit_and_build_work_items.py::test_emulated",),
    ),
    Fault(
        "weights of tokens by the wrong sum",
        STATE,
        "second = total if lane + WARP == token else second",
        "second = total if lane == token else second",
        (STATES + "test_a_state_errs_like_one_rounding[bf16-1.0-kernel]",),
    ),
    Fault(
        "states decay by half of the window",
        STATE,
        "product = low if token < WARP else high",
        "product = low",
        (STATES + "test_a_state_errs_like_one_rounding[bf16-1.0-kernel]",),
    ),
    Fault(
        "random bits of the slot that is read",
        STATE,
        "philox.row_counter(unit.dst_slot, head, pending.num_tokens - 1)",
        "philox.row_counter(unit.src_slot, head, pending.num_tokens - 1)",
        (STATES + "test_bits_are_those_of_the_reference[slots-f16]",),
    ),
    Fault(
        "destinations are compared with the pool that is read",
        STATE,
        "dst_slot != pad_slot_id and in_range(dst_slot, tensors.out.shape[0])",
        "dst_slot != pad_slot_id and in_range(dst_slot, tensors.state.shape[0])",
        (RANGE + "test_destinations_are_compared_with_the_pool_that_is_written",),
    ),
    Fault(
        "new sequences find old cursors",
        POOL,
        "        self._cursors.index_fill_(1, index, 0)\n",
        "",
        ("tests/serving/test_serving_pool.py::test_reset_and_copy_touch_nothing_else",),
    ),
    Fault(
        "slots of a pool share their seed",
        POOL,
        "            self._draw(index)\n",
        "            self.rand_seed.index_fill_(1, index, 7)\n",
        ("tests/serving/test_serving_pool.py::test_pools_start_as_zeros_with_seeds_of_their_own",),
    ),
    Fault(
        "the reference takes pending tokens from the wrong buffer",
        "cute_ssm/ops/materialize_gated_delta/reference.py",
        "positions = (start + torch.arange(count)) % rings.k.shape[2]",
        "positions = torch.arange(count) % rings.k.shape[2]",
        ("tests/ops/materialize_gated_delta/test_materialize_gated_delta.py::test_reference",),
    ),
]
