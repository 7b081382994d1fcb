"""Faults of the plugins for vLLM and SGLang, and of the functions that they call."""

from faults import Fault

ENGINES, VLLM, SGLANG = (f"cute_ssm/integrations/{name}.py" for name in ("_engines", "vllm", "sglang"))
IN_VLLM, IN_SGLANG = "tests/integrations/test_vllm.py::", "tests/integrations/test_sglang.py::"
GATED, LIKE_SGLANG = "tests/compat/test_vllm_gated_delta.py::", "tests/compat/test_sglang.py::"

FAULTS = [
    Fault(
        "an engine with other parameters is hooked into",
        ENGINES,
        "    if found != hook.parameters:\n",
        "    if False:\n",
        (
            IN_VLLM + "test_other_parameters_leave_the_engine_as_it_was",
            IN_SGLANG + "test_other_parameters_leave_the_options_as_they_were_and_say_why",
        ),
    ),
    Fault(
        "layers that have imported a function keep it",
        ENGINES,
        "    for module in holders:\n",
        "    for module in holders[:1]:\n",
        (IN_VLLM + "test_gated_delta_layers_that_imported_the_functions_before_decode_by_the_operator",),
    ),
    Fault(
        "a kernel that does not compile is compiled at every call",
        ENGINES,
        "self.off = isinstance(error, LASTING)",
        "self.off = False",
        (IN_VLLM + "test_after_an_error_of_the_compiler_no_call_tries_again",),
    ),
    Fault(
        "every call without a kernel is logged",
        ENGINES,
        "if self.reasons == 1 or self.off:",
        "if True:",
        (IN_VLLM + "test_a_call_without_a_kernel_runs_by_the_backend_of_vllm_with_one_reason_in_the_log",),
    ),
    Fault(
        "rows of padding of vLLM keep what memory held",
        VLLM,
        '                    options["out"].zero_()  # rows',
        '                    options["out"]  # rows',
        (IN_VLLM + "test_a_decode_step_of_the_dispatch_runs_by_the_kernel[FLASHINFER]",),
    ),
    Fault(
        "another FlashInfer gets our ring",
        VLLM,
        "        if theirs != ours:\n",
        "        if False:\n",
        (IN_VLLM + "test_replay_without_replayssm_or_with_another_flashinfer_is_left_alone",),
    ),
    Fault(
        "the options of SGLang's rounding are lost",
        SGLANG,
        "step(*tensors, **options, **self._rounding, ",
        "step(*tensors, **options, ",
        (IN_SGLANG + "test_rounding_of_the_options_reaches_the_operator",),
    ),
    Fault(
        "verification by our backend alone stays with Triton",
        SGLANG,
        "    if selected.verify or (",
        "    if (",
        (IN_SGLANG + "test_another_verify_backend_stays_selected",),
    ),
    Fault(
        "a second runner wraps the dispatcher again",
        SGLANG,
        '    if hasattr(getattr(module, "GDNKernelDispatcher", None), "cute_ssm_init"):\n        return\n',
        "",
        (IN_SGLANG + "test_gated_delta_layers_decode_by_the_kernel_and_prefill_by_triton",),
    ),
    Fault(
        "vLLM's null slot is a slot",
        "cute_ssm/compat/vllm/gated_delta.py",
        "return pool[1:], slots - 1",
        "return pool, slots",
        (
            GATED + "test_packed_decode_takes_slices_of_a_row_and_skips_the_null_slot[reference]",
            GATED + "test_a_step_of_one_token_per_sequence_updates_states_in_place",
        ),
    ),
    Fault(
        "a speculative step starts from the first column",
        "cute_ssm/compat/vllm/gated_delta.py",
        "first = slots.gather(1, column.clamp(0, columns - 1)[:, None])[:, 0]",
        "first = slots[:, 0]",
        (GATED + "test_a_speculative_step_starts_from_the_accepted_column_and_stores_every_state",),
    ),
    Fault(
        "SGLang's requests of unequal lengths are taken as equal",
        "cute_ssm/compat/sglang.py",
        'longest, fix = q.shape[1], "split the call"',
        'longest, fix = q.shape[1] // sequences, "split the call"',
        (LIKE_SGLANG + "test_requests_of_different_lengths_advance_their_states",),
    ),
    Fault(
        "steps of no token get other contents",
        "cute_ssm/compat/sglang.py",
        "buffer.index_select(0, rows)",
        "buffer.new_zeros(sequences, *buffer.shape[1:])",
        (LIKE_SGLANG + "test_verification_of_gated_delta_nets_stores_states_by_row",),
    ),
    Fault(
        "states of SGLang's drafts are rounded at random",
        "cute_ssm/compat/sglang.py",
        "disable_state_update=True, **drafts)",
        "disable_state_update=True, **drafts, **rounding)",
        (LIKE_SGLANG + "test_states_of_drafts_are_rounded_to_nearest_and_those_of_the_pool_at_random",),
    ),
    Fault(
        "errors of the gated delta rule have the operator's names",
        "cute_ssm/compat/_gated_delta.py",
        "        rename(error, words)\n",
        "",
        (
            LIKE_SGLANG + "test_errors_of_the_recurrence_name_sglangs_arguments",
            LIKE_SGLANG + "test_errors_of_the_packed_step_name_sglangs_arguments",
            GATED + "test_errors_of_the_recurrence_name_vllms_arguments",
            GATED + "test_errors_of_the_packed_step_name_vllms_arguments",
        ),
    ),
    Fault(
        "SGLang's rings of pending tokens are ignored",
        SGLANG,
        "if all(kwargs.get(name) is not None for name in REPLAYSSM):",
        "if False:",
        (IN_SGLANG + "test_rings_of_sglang_stay_with_sglang",),
    ),
    Fault(
        "SGLang's rows of the intermediate buffer are ignored",
        "cute_ssm/compat/sglang.py",
        ".index_copy_(0, rows, buffer)",
        "[: len(rows)].copy_(buffer)",
        (LIKE_SGLANG + "test_verification_of_gated_delta_nets_stores_states_by_row",),
    ),
    Fault(
        "SGLang's channels of Mamba-1 are not one head",
        "cute_ssm/compat/sglang.py",
        "state.shape[2] == 1 and state.shape[1] > 1",
        "False",
        (LIKE_SGLANG + "test_layers_of_mamba_1_have_channels_as_heads",),
    ),
]
