"""Calls of all operators that take a row of indices for each sequence."""

from __future__ import annotations

import dataclasses

import checkpointing_cases
import gdn_cases
import replay_cases
import scan_cases
import token_cases
import torch
from cursor_cases import Case as Cursors
from cursor_cases import arguments as cursor_arguments
from materialize_cases import Case as Materialize
from materialize_cases import random as materialize_arguments

import cute_ssm
from cute_ssm import serving

CHECKPOINTING = checkpointing_cases.Case(accepted=(7, 5, 14))
COLUMNS = token_cases.Tokens(accepted=True, destination="matrix", packed=True, lengths=(3, 1, 2))
SAVED = token_cases.Tokens(destination="intermediates")
BLOCKS = scan_cases.Case(lengths=(9, 4), varlen=True, nulls=(), block_size=4, computed=(0, 8), in_place=False)


def gated(mode):
    return gdn_cases.arguments(gdn_cases.Case(mode=mode, batch=3))


def commit(ring=False, **fields):
    call, counts = cursor_arguments(Cursors(batch=6, ring=ring, **fields))
    return {**call, "num_accepted_tokens": counts.int()}


def listed(**fields):
    call = cursor_arguments(Cursors(batch=6, **fields))[0]
    return {**call, "work_items": torch.zeros(6, 4, dtype=torch.int32), "num_writes": torch.zeros(1).int()}


def of_pool(method):
    """A method of a pool, called with the pool among its arguments."""

    def call(pool, **arguments):
        return getattr(pool, method)(**arguments)

    return call


def pool_call(packed=False, **more):
    """Arguments of a pool's methods, the slots of the batch among them, and its cursors, which a commit writes."""
    pool = serving.StatePool.gated_delta(1, 5, heads=1, value_heads=1, K=64, V=64, window=8, tokens=3)
    slots = torch.tensor([pool.allocate(), -1, pool.allocate()])
    call = {"pool": pool, "state_batch_indices": slots}
    if packed:
        call["cu_seqlens"] = torch.tensor([0, 3, 3, 5])
    return call | {name: value.clone() for name, value in more.items()}


# operator, arguments, and which of them have a row for each sequence
CALLS = {
    "step": (
        cute_ssm.selective_state_update,
        lambda: token_cases.arguments(token_cases.Tokens(destination="vector")),
        ("state_batch_indices", "dst_state_batch_indices"),
    ),
    "step, matrices": (
        cute_ssm.selective_state_update,
        lambda: token_cases.arguments(COLUMNS),
        ("state_batch_indices", "dst_state_batch_indices", "num_accepted_tokens"),
    ),
    "step, saved": (
        cute_ssm.selective_state_update,
        lambda: token_cases.arguments(SAVED),
        ("intermediate_state_indices",),
    ),
    "checkpointing": (
        cute_ssm.checkpointing_ssu,
        lambda: checkpointing_cases.arguments(CHECKPOINTING),
        ("state_batch_indices",),
    ),
    "checkpointing, list": (
        cute_ssm.checkpointing_ssu_ring,
        lambda: checkpointing_cases.arguments(dataclasses.replace(CHECKPOINTING, history="ring", items=True)),
        ("work_items", "state_batch_indices"),
    ),
    "gated delta": (
        cute_ssm.gated_delta_rule_mtp,
        lambda: gated("accepted_split"),
        ("initial_state_indices", "output_state_indices", "accepted_steps"),
    ),
    "gated delta, scattered": (cute_ssm.gated_delta_rule_mtp, lambda: gated("scatter"), ("ssm_state_indices",)),
    "replay": (
        cute_ssm.gated_delta_rule_replay,
        lambda: replay_cases.arguments(replay_cases.Case()),
        ("initial_state_indices",),
    ),
    "scan": (
        cute_ssm.selective_scan,
        lambda: scan_cases.arguments(scan_cases.Case(in_place=False)),
        ("cache_indices", "has_initial_state"),
    ),
    "scan, blocks": (
        cute_ssm.selective_scan,
        lambda: scan_cases.arguments(BLOCKS),
        ("cache_indices", "has_initial_state", "last_chunk_indices", "block_idx_first_scheduled_token",
         "block_idx_last_scheduled_token", "initial_state_idx"),
    ),
    "commit": (serving.commit, commit, ("state_batch_indices",)),
    "commit, packed": (
        serving.commit, lambda: commit(varlen=True, ring=True), ("state_batch_indices", "num_accepted_tokens")
    ),
    "work items": (serving.build_work_items, listed, ("state_batch_indices",)),
    "work items, packed": (
        serving.build_work_items, lambda: listed(varlen=True), ("state_batch_indices", "work_items")
    ),
    "commit of a pool": (
        of_pool("commit"), lambda: pool_call(num_accepted_tokens=torch.tensor([2, 0, 1])), ("num_accepted_tokens",)
    ),
    "commit of a pool, packed": (
        of_pool("commit"), lambda: pool_call(True, num_accepted_tokens=torch.tensor([2, 0, 1])),
        ("num_accepted_tokens", "state_batch_indices"),
    ),
    "work items of a pool": (
        of_pool("build_work_items"),
        lambda: pool_call(work_items=torch.zeros(3, 4).int(), num_writes=torch.zeros(1).int()),
        ("work_items",),
    ),
    "work items of a pool, packed": (
        of_pool("build_work_items"),
        lambda: pool_call(True, work_items=torch.zeros(3, 4).int(), num_writes=torch.zeros(1).int()),
        ("work_items", "state_batch_indices"),
    ),
    "materialize": (
        serving.materialize,
        lambda: materialize_arguments(Materialize(), 0)["call"],
        ("dst_state_batch_indices", "num_tokens"),
    ),
}  # fmt: skip
