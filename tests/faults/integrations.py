"""Faults of the integrations with other packages."""

from faults import Fault

CALLS = "cute_ssm/integrations/_transformers_calls.py"
TESTS = "tests/integrations/test_transformers_gated_delta.py::"

TRACES = "tests/tools/test_make_traces.py::test_a_reference_does_what_the_operator_does"

FAULTS = [
    Fault(
        "every 16 tokens have the decays of the first",
        CALLS,
        "decay[:, part], unread",
        "decay[:, : new_q[:, part].shape[1]], unread",
        (TESTS + "test_a_call",),
    ),
    Fault(
        "the states of a cache are copied in every decode step",
        CALLS,
        "        pool, states = initial_state.mT, initial_state\n",
        "        pool = initial_state.mT.clone()\n        states = pool.mT\n",
        (TESTS + "test_the_same_tokens", TESTS + "test_states_that_are_not_kept_are_not_written"),
    ),
    Fault(
        "states that are not to be kept are updated",
        CALLS,
        "elif output_final_state and initial_state.dtype",
        "elif initial_state.dtype",
        (TESTS + "test_states_that_are_not_kept_are_not_written",),
    ),
    Fault(
        "a prefill starts from zero states",
        CALLS,
        "dtype=torch.float32).copy_(initial_state.mT)\n",
        "dtype=torch.float32).zero_()\n",
        (TESTS + "test_a_call",),
    ),
    Fault(
        "the initial state of a gated delta net does not count as needing gradients",
        CALLS,
        "            (*tensors, initial_state),\n            kwargs,\n        )\n\n    return step\n",
        "            tensors,\n            kwargs,\n        )\n\n    return step\n",
        (TESTS + "test_a_call_runs_unpatched_if_any_one_tensor_requires_grad",),
    ),
    Fault(
        "a traced reference sums decays of new tokens alone",
        "tools/trace_references.py",
        "new_dt if writes else all_dt",
        "new_dt",
        (TRACES,),
    ),
    Fault(
        "arguments of traces are not expanded",
        "tools/make_traces.py",
        '(f"    {given.expand}" for given in self.inputs if given.expand)',
        "()",
        (TRACES,),
    ),
    Fault(
        "a repository of kernels finds the package only where it is installed",
        "tools/make_kernels_repo.py",
        "    sys.path.insert(0, FOLDER)",
        "    pass",
        ("tests/tools/test_make_kernels_repo.py::test_it_runs_from_its_folder",),
    ),
]
