"""Faults of the runtime, tuning, the tuner, compatibility and benchmarks."""

from faults import Fault

STORE = "cute_ssm/runtime/store.py"
LOOKUP = "cute_ssm/runtime/lookup.py"
CACHE = "tests/runtime/test_runtime_cache.py::"
TABLES = "cute_ssm/tuning/tables.py"
TABLE_TESTS = "tests/tuning/test_tuning_tables.py::"
SEARCH = "cute_ssm/tuner/search.py"

FAULTS = [
    Fault(
        "objects are not compared with their records",
        STORE,
        'record.get("sha256") != hashlib.sha256(data).hexdigest()',
        "not record",
        (CACHE + "test_a_damaged_object_is_replaced",),
    ),
    Fault(
        "folders of other tool-chains are trusted",
        STORE,
        "return bool(meta == toolchain.description())",
        "return meta is not None",
        (CACHE + "test_a_folder_that_is_not_described_is_not_trusted",),
    ),
    Fault(
        "edited sources are stored",
        STORE,
        "if toolchain.sources_changed():",
        "if False:",
        (CACHE + "test_edited_sources_are_not_stored_under_the_digest_of_the_old_ones",),
    ),
    Fault(
        "configs are not in the key",
        STORE,
        "return digest(self.spec, self.config, self.arch, registry.fingerprint(self.spec))",
        "return digest(self.spec, self.arch, registry.fingerprint(self.spec))",
        ("tests/runtime/test_runtime_key.py::test_every_field_changes_key_and_file_name",),
    ),
    Fault(
        "warnings of every call",
        STORE,
        "            self.warned.add(self.root)\n",
        "",
        (CACHE + "test_a_failing_disk_costs_one_warning",),
    ),
    Fault(
        "the compiler goes before the disk",
        LOOKUP,
        "    if kernel is not None:\n        return kernel\n    with store.lock(key) as held:\n",
        "    kernel = None\n    with store.lock(key) as held:\n",
        (CACHE + "test_a_read_only_cache_is_still_read",),
    ),
    Fault(
        "rows of other targets count",
        TABLES,
        'row["op"] == op and row["arch"] == arch.name and',
        'row["op"] == op and',
        (TABLE_TESTS + "test_rows_of_other_targets_and_specs_do_not_count",),
    ),
    Fault(
        "the nearest row by difference",
        TABLES,
        'abs(math.log2(row["heads"] / heads))',
        'abs(row["heads"] - heads)',
        (TABLE_TESTS + "test_the_nearest_row_by_logarithm",),
    ),
    Fault(
        "tables change results",
        TABLES,
        'if not set(row["config"]) <= set(free):',
        "if False:",
        (TABLE_TESTS + "test_a_config_that_cannot_run_or_changes_results_is_ignored_and_logged",),
    ),
    Fault(
        "models replace measurements",
        TABLES,
        "if old is None or _measured(row) or not _measured(old):",
        "if True:",
        (TABLE_TESTS + "test_what_was_measured_is_not_replaced_by_a_model",),
    ),
    Fault(
        "noise is a gain",
        SEARCH,
        "challenger >= own * (1 - noise)",
        "challenger >= own",
        ("tests/tuner/test_search.py::test_a_gain_that_is_confirmed_must_exceed_the_noise_too",),
    ),
    Fault(
        "a search ends after one cycle",
        SEARCH,
        "unchanged = 1  # the pair itself has been searched",
        "unchanged += 1",
        ("tests/tuner/test_search.py::test_a_gain_of_the_last_pair_is_followed_by_all_pairs_again",),
    ),
    Fault(
        "batches of any size",
        SEARCH,
        "part = candidates[i : i + batch]",
        "part = candidates[i:]",
        ("tests/tuner/test_search.py::test_batches_are_bounded",),
    ),
    Fault(
        "the gate compares values",
        "cute_ssm/tuner/gate.py",
        "torch.equal(_bytes(value), _bytes(self.expected[name]))",
        "torch.equal(value.float().nan_to_num(), self.expected[name].float().nan_to_num())",
        ("tests/tuner/test_tune.py::test_the_gate_compares_bytes_not_values",),
    ),
    Fault(
        "journals mix objectives",
        "cute_ssm/tuner/journal.py",
        'if entry["objective"] == self.objective:',
        "if True:",
        ("tests/tuner/test_search.py::test_a_journal_is_read_again_and_keeps_objectives_apart",),
    ),
    Fault(
        "speculative slots are not written",
        "cute_ssm/compat/vllm/__init__.py",
        "if speculative and src is not None and dst is None:\n        dst = src",
        "if speculative and src is not None and dst is None:\n        dst = None",
        ("tests/compat/test_vllm_state_update.py::TestAgainstTheLoop::test_speculative[default-reference]",),
    ),
    Fault(
        "further rows of indices are used",
        "cute_ssm/compat/vllm/__init__.py",
        "        indices = indices[:batch]\n",
        "        indices = indices[-batch:]\n",
        (
            "tests/compat/test_vllm_state_update.py::TestAgainstTheLoop::test_more_rows_of_indices_than_sequences[reference]",
        ),
    ),
    Fault(
        "states of flash-linear-attention are not transposed",
        "cute_ssm/compat/fla.py",
        "pool[..., :V, :K] if state_v_first else pool[..., :V, :K].mT\n",
        "pool[..., :V, :K]\n",
        ("tests/ops/gated_delta_rule_mtp/test_gated_delta_rule_mtp_compat.py::test_fla",),
    ),
    Fault(
        "half of the bandwidth of a copy",
        "tools/bench/roof.py",
        "return 2 * source.numel() / (",
        "return source.numel() / (",
        ("tests/tools/test_bench.py::test_the_bandwidth_of_a_copy_is_of_bytes_read_and_written",),
    ),
    Fault(
        "a file of floats is taken",
        "cute_ssm/compat/vllm/configs.py",
        "isinstance(value, int) and not isinstance(value, bool) and value > 0",
        "isinstance(value, (int, float)) and value > 0",
        ("tests/compat/test_vllm_configs.py::test_a_broken_entry_is_left_out_and_logged",),
    ),
    Fault(
        "wide CTAs of few rows",
        "cute_ssm/ops/build_work_items/config.py",
        "FEW_ROWS // WARP if batch <= FEW_ROWS else MOST_WARPS",
        "MOST_WARPS + 1 if batch <= FEW_ROWS else MOST_WARPS",
        ("tests/ops/commit/test_commit_and_build_work_items.py::test_emulated_sizes",),
    ),
    Fault(
        "decoding by tokens for any number of them",
        "cute_ssm/ops/_gated_delta/config.py",
        "sequential = sizes.sequential_tokens > 0 and sizes.tokens == 1",
        "sequential = sizes.sequential_tokens > 0 and sizes.tokens == 1 and heads < 64",
        ("tests/tuner/test_choices.py::test_bits_of_other_operators_depend_on_the_spec_alone[gated_delta_rule_mtp]",),
    ),
]
