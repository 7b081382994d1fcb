"""Faults of the selective scan."""

from faults import Fault

KERNEL = "cute_ssm/ops/selective_scan/kernel.py"
SEGMENT = "cute_ssm/ops/selective_scan/segment.py"
PARTS = "cute_ssm/ops/selective_scan/parts.py"
DEVICE = "cute_ssm/device/scan.py"
MATH = "cute_ssm/device/math.py"
BASE = "tests/ops/selective_scan/test_selective_scan.py::test_kernel[base]"
PERSISTENT = (
    "tests/ops/selective_scan/test_selective_scan.py::test_persistent[lengths=(70, 70)-dim=130-{'async_mode': 'late'}-"
    "{'lanes': 4, 'warps': 4}]"
)
IN_PARTS = "tests/ops/selective_scan/test_selective_scan_parts.py::test_kernel[lengths=(53, 53, 53)]"

FAULTS = [
    Fault(
        "no wait for the kernel before",
        KERNEL,
        "        cute.arch.griddepcontrol_wait()\n",
        "",
        (PERSISTENT,),
    ),
    Fault(
        "no barrier before the other half of the buffer is read",
        SEGMENT,
        "next_columns, channel.thread)\n            cute.arch.sync_threads()\n",
        "next_columns, channel.thread)\n",
        (PERSISTENT,),
    ),
    Fault(
        "C of the wrong group",
        SEGMENT,
        "start = memory.address(C, row, group, inside, 0)",
        "start = memory.address(C, row, 0, inside, 0)",
        ("tests/ops/selective_scan/test_selective_scan.py::test_kernel[ngroups=2]",),
    ),
    Fault(
        "states of lanes beyond the last channel are written",
        KERNEL,
        "if unit.active and tokens.end == sequence.tokens.end:",
        "if tokens.end == sequence.tokens.end:",
        (PERSISTENT,),
    ),
    Fault(
        "tokens outside a sequence take a step",
        SEGMENT,
        "outside = NO_STEP if const_expr(self.spec.delta_softplus) else 0.0",
        "outside = 0.0",
        (BASE,),
    ),
    Fault(
        "a part stores the states of its own beginning",
        PARTS,
        "row = memory.address(carried, b, unit.part + 1, unit.channel, 0)",
        "row = memory.address(carried, b, unit.part, unit.channel, 0)",
        (IN_PARTS,),
    ),
    Fault(
        "what parts before carry does not decay",
        PARTS,
        "cute.math.fma(math.power_of_two(elapsed * channel.rates[n]), h[n], added[n])",
        "h[n] + added[n]",
        (IN_PARTS,),
    ),
    Fault(
        "a sequence of one part forgets its initial state",
        KERNEL,
        "has_work = has_work and (tokens.end < sequence.tokens.end or part == 0)",
        "has_work = has_work and tokens.end < sequence.tokens.end",
        ("tests/ops/selective_scan/test_selective_scan_parts.py::test_kernel[lengths=(45, 0, 12, 1, 30)-varlen=True]",),
    ),
    Fault(
        "the gate loses its sign",
        MATH,
        "return x * reciprocal(power_of_two(x * -LOG2E) + 1.0)",
        "return x * reciprocal(power_of_two(x * LOG2E) + 1.0)",
        ("tests/ops/selective_scan/test_selective_scan.py::test_kernel[base]",),
    ),
    Fault(
        "softplus by one coefficient less",
        MATH,
        "for coefficient in _LOG1P[-2::-1]:",
        "for coefficient in _LOG1P[-3::-1]:",
        (BASE,),
    ),
    Fault(
        "sums of lanes in another order",
        DEVICE,
        "    distance = lanes // 2\n    while distance:\n",
        "    distance = 1 if lanes > 1 else 0\n    while 0 < distance < lanes:\n",
        ("tests/ops/selective_scan/test_selective_scan.py::test_bits_do_not_depend_on_batch_tiling_or_repetition",),
    ),
    Fault(
        "a token too many is stored",
        DEVICE,
        "if token + i >= tokens.begin and token + i < tokens.end:\n                    memory.store_scalar",
        "if token + i >= tokens.begin and token + i <= tokens.end:\n                    memory.store_scalar",
        ("tests/ops/selective_scan/test_selective_scan.py::test_packed_sequences_are_those_of_single_calls",),
    ),
    Fault(
        "splits without a gain",
        "cute_ssm/ops/selective_scan/config.py",
        "return split if time(split) * SPLIT_GAIN <= time(whole) else whole",
        "return split if time(split) <= time(whole) * SPLIT_GAIN else whole",
        ("tests/ops/selective_scan/test_selective_scan_parts.py::test_who_is_split",),
    ),
    Fault(
        "parts of any length",
        "cute_ssm/ops/selective_scan/config.py",
        "n == 1 or length >= n * PART_TOKENS",
        "n >= 1",
        ("tests/ops/selective_scan/test_selective_scan_parts.py::test_splits_pay_by_the_model_and_parts_are_long",),
    ),
    Fault(
        "shared memory of one tile only",
        "cute_ssm/ops/selective_scan/config.py",
        "return 2 * self.tokens * 2 * padded_states(spec) * 4",
        "return self.tokens * 2 * padded_states(spec) * 4",
        ("tests/tuner/test_choices.py::test_shared_memory_is_what_the_launch_allocates",),
    ),
]
