"""Faults of the kernels of the gated delta rule."""

from faults import Fault

PRODUCTS = "cute_ssm/ops/gated_delta_rule_mtp/products.py"
CHUNK = "cute_ssm/ops/_gated_delta/chunk.py"
OUTPUTS = "cute_ssm/ops/_gated_delta/outputs.py"
PENDING = "cute_ssm/ops/_gated_delta/pending.py"
KERNEL = "cute_ssm/ops/gated_delta_rule_mtp/kernel.py"
TENSORS = "cute_ssm/ops/gated_delta_rule_mtp/tensors.py"
SEQUENTIAL = "cute_ssm/ops/gated_delta_rule_mtp/sequential.py"
REPLAY = "cute_ssm/ops/gated_delta_rule_replay/kernel.py"
RINGS = "cute_ssm/ops/gated_delta_rule_replay/rings.py"
RULE = "tests/ops/gated_delta_rule_mtp/test_gated_delta_rule_mtp.py::"
PACKED = "tests/ops/gated_delta_rule_mtp/test_gated_delta_rule_mtp_packed.py::"
LATER = "tests/ops/gated_delta_rule_mtp/test_gated_delta_rule_mtp_later_tokens.py::"
RING = "tests/ops/gated_delta_rule_replay/test_gated_delta_rule_replay.py::"
RANGE = "tests/ops/test_out_of_range.py::"

FAULTS = [
    Fault(
        "a later token that is not finite reaches earlier ones",
        CHUNK,
        "if not cute.arch.vote_all_sync(squares < Float32.inf):",
        "if squares != squares and squares == squares:",
        (LATER + "test_later_tokens_do_not_reach_earlier_outputs_and_states",),
    ),
    Fault(
        "one lane decides for its warp whether tokens are taken in turn",
        CHUNK,
        "if not cute.arch.vote_all_sync(squares < Float32.inf):",
        "if not cute.arch.vote_all_sync(squares < Float32.inf or lane > 0):",
        (LATER + "test_later_tokens_do_not_reach_earlier_outputs_and_states",),
    ),
    Fault(
        "a token in turn sees the one after it",
        CHUNK,
        "cutlass.select_(j <= t, x, zero)",
        "cutlass.select_(j <= t + 1, x, zero)",
        (LATER + "test_later_tokens_do_not_reach_earlier_outputs_and_states",),
    ),
    Fault(
        "keys of rejected tokens are multiplied by zero",
        CHUNK,
        "keys = [memory.either(use, row, zeros) for use, row in zip(visible, keys)]",
        "keys = list(keys)",
        (LATER + "test_later_tokens_do_not_reach_earlier_outputs_and_states",),
    ),
    Fault(
        "no barrier before the coefficients are computed",
        PRODUCTS,
        "        cute.arch.sync_threads()\n        if place.warp == 0:",
        "        if place.warp == 0:",
        (RULE + "test_schedules",),
    ),
    Fault(
        "no barrier before the coefficients are read",
        PRODUCTS,
        "memory, place.lane)\n        cute.arch.sync_threads()\n",
        "memory, place.lane)\n",
        (RULE + "test_schedules",),
    ),
    Fault(
        "the state after one token too many",
        PRODUCTS,
        "blocks, accepted - 1, lane)",
        "blocks, cutlass.min(accepted, count - 1), lane)",
        (LATER + "test_later_tokens_do_not_reach_earlier_outputs_and_states",),
    ),
    Fault(
        "a slot beyond the pool",
        PRODUCTS,
        "written = in_range(slot, state.shape[0])",
        "written = slot >= 0",
        (RANGE + "test_slots_and_counts_of_the_gated_delta_rule",),
        after="accepted = Int32(accepted_steps[i])",
    ),
    Fault(
        "a chunk takes the memory of the one before it too early",
        PRODUCTS,
        "            cute.arch.sync_threads()  # the next chunk takes the memory of this one\n",
        "",
        (PACKED + "test_schedules",),
    ),
    Fault(
        "every chunk counts accepted tokens from its own first one",
        PRODUCTS,
        "                accepted -= span.first\n",
        "",
        (PACKED + "test_values_of_later_chunks_and_of_other_requests_reach_nothing", PACKED + "test_kernel"),
    ),
    Fault(
        "the state after a full chunk misses its last token",
        PRODUCTS,
        "chunk.tokens - 1, lane), PART)",
        "chunk.tokens - 2, lane), PART)",
        (PACKED + "test_a_long_request_has_the_bits_of_its_chunks",),
    ),
    Fault(
        "a packed request is looked for in a row of its own",
        TENSORS,
        "_from_token(tensor, first, count, 0)",
        "_from_token(tensor, first, count, tensor.stride[0])",
        (PACKED + "test_kernel",),
    ),
    Fault(
        "the end of a packed request is not compared with the tokens that there are",
        KERNEL,
        "last <= tensors.q.shape[1] and ",
        "",
        (RANGE + "test_offsets_of_packed_requests",),
    ),
    Fault(
        "a packed request may be longer than the call says",
        KERNEL,
        " and last - first <= max_seqlen",
        "",
        (RANGE + "test_offsets_of_packed_requests",),
    ),
    Fault(
        "small parts of products are left out",
        CHUNK,
        "for x, y in ((left.low, right.low), (left.low, right.high), (left.high, right.low), (left.high, right.high)):",
        "for x, y in ((left.high, right.high),):",
        (RULE + "test_error_is_that_of_sequential_float32",),
    ),
    Fault(
        "outputs leave before all lanes have written them",
        OUTPUTS,
        "        cute.arch.sync_warp()\n        per_token",
        "        per_token",
        (RULE + "test_schedules",),
    ),
    Fault(
        "a single token does not decay the state",
        SEQUENTIAL,
        "cute.math.fma(weight, x, alpha * s)",
        "cute.math.fma(weight, x, s)",
        (RULE + "test_one_token_after_the_other",),
    ),
    Fault(
        "the sum of two lanes in place of four",
        SEQUENTIAL,
        "for distance in (1, 2):",
        "for distance in (1,):",
        (RULE + "test_one_token_after_the_other",),
    ),
    Fault(
        "a flush of a full window comes one step late",
        REPLAY,
        "flush = pending.count + count > window and pending.count > 0",
        "flush = pending.count + count > window + 1 and pending.count > 0",
        (RING + "test_forty_steps[kernel-bf16-7]",),
    ),
    Fault(
        "rows of a ring do not wrap",
        PENDING,
        "return row - length if row >= length else row",
        "return row - length if row > length else row",
        (RING + "test_forty_steps[kernel-bf16-7]",),
    ),
    Fault(
        "keys of new tokens are appended by no CTA",
        RINGS,
        "return count if unit.head_in_group == 0 and unit.first_row == 0 else Int32(0)",
        "return count if unit.head_in_group < 0 and unit.first_row == 0 else Int32(0)",
        (RING + "test_every_accepted_prefix_is_what_the_next_flush_folds[kernel]",),
    ),
    Fault(
        "pending tokens are read one row late",
        PENDING,
        "token = index * PENDING_CHUNK + lane",
        "token = index * PENDING_CHUNK + lane + 1",
        (RING + "test_bits_are_those_of_mtp",),
    ),
]
