"""Faults in how arguments are taken: alignment, lengths of index tensors, and what messages advise."""

from faults import Fault

VIEWS = "tests/ops/checkpointing_ssu/test_checkpointing_ssu_views.py::"
LONGER = "tests/ops/test_longer_index_tensors.py::"
ADVICE = "tests/ops/test_advice.py::"

FAULTS = [
    Fault(
        "addresses are not looked at",
        "cute_ssm/ops/_arguments.py",
        "            bits |= tensor.data_ptr()\n",
        "",
        (VIEWS + "test_an_address_or_a_stride_alone_decides[x]",),
    ),
    Fault(
        "a plan for narrow rows takes all",
        "cute_ssm/ops/checkpointing_ssu/operator.py",
        "strict=spec.aligned,",
        "strict=True,",
        (VIEWS + "test_a_plan_is_used_for_rows_of_its_own_alignment_alone",),
    ),
    Fault(
        "copied rows are not fenced",
        "cute_ssm/ops/checkpointing_ssu/unaligned_rows.py",
        '        cute.arch.fence_proxy("async.shared", space="cta")\n',
        "",
        (VIEWS + "test_results_at_any_alignment_are_those_of_aligned_rows[double-1]",),
    ),
    Fault(
        "longer index tensors stay so",
        "cute_ssm/ops/_arguments.py",
        "t[:batch] if isinstance(t, Tensor)",
        "t if isinstance(t, Tensor)",
        (LONGER + "test_rows_beyond_the_batch_are_not_read[step]",),
    ),
    Fault(
        "counts of padding are checked",
        "cute_ssm/ops/selective_state_update/arguments.py",
        " & (indices != pad).any(1))",
        ")",
        (LONGER + "test_counts_of_padding_are_not_looked_at",),
    ),
    Fault(
        "A is warned of at every call",
        "cute_ssm/ops/selective_state_update/arguments.py",
        "    _warned.add(key)\n",
        "",
        (ADVICE + "test_A_that_is_tied_in_value_alone_is_warned_of_once",),
    ),
    Fault(
        "an output is to be made contiguous",
        "cute_ssm/ops/_arguments.py",
        'fix = allocation(tensor) if name in WRITTEN else f"pass {name}.contiguous()"',
        'fix = f"pass {name}.contiguous()"',
        (ADVICE + "test_what_is_written_is_to_be_allocated[step-out-strides]",),
    ),
]
