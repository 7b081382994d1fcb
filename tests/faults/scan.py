"""Faults of the selective scan."""

from faults import Fault

KERNEL = "cute_ssm/ops/selective_scan/kernel.py"
EXTENTS = "cute_ssm/ops/selective_scan/extents.py"
DEVICE = "cute_ssm/device/scan.py"
MATH = "cute_ssm/device/math.py"
BASE = "tests/ops/selective_scan/test_selective_scan.py::test_kernel[base]"
PERSISTENT = (
    "tests/ops/selective_scan/test_selective_scan.py::test_persistent[lengths=(70, 70)-dim=130-{'async_mode': 'late'}-"
    "{'lanes': 4, 'warps': 4}]"
)
PARTS = "tests/ops/selective_scan/test_selective_scan_parts.py::test_kernel[lengths=(53, 53, 53)]"

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
        KERNEL,
        "brought, thread)\n            cute.arch.sync_threads()\n",
        "brought, thread)\n",
        (PERSISTENT,),
    ),
    Fault(
        "C of the wrong group",
        KERNEL,
        "start = memory.address(C, row, group, known, 0)",
        "start = memory.address(C, row, 0, known, 0)",
        ("tests/ops/selective_scan/test_selective_scan.py::test_kernel[ngroups=2]",),
    ),
    Fault(
        "states of lanes beyond the last channel are written",
        KERNEL,
        "if valid and high == end:",
        "if high == end:",
        (PERSISTENT,),
    ),
    Fault(
        "tokens outside a sequence take a step",
        KERNEL,
        "outside = NO_STEP if const_expr(self.spec.delta_softplus) else 0.0",
        "outside = 0.0",
        (BASE,),
    ),
    Fault(
        "a part hands on the states of its own beginning",
        KERNEL,
        "row = memory.address(carried, b, part + 1, channel, 0)",
        "row = memory.address(carried, b, part, channel, 0)",
        (PARTS,),
    ),
    Fault(
        "what parts before carry does not decay",
        KERNEL,
        "cute.math.fma(math.power_of_two(elapsed * rates[n]), h[n], added[n])",
        "h[n] + added[n]",
        (PARTS,),
    ),
    Fault(
        "a sequence of one part forgets its initial state",
        KERNEL,
        "real = real and (high < end or part == 0)",
        "real = real and high < end",
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
