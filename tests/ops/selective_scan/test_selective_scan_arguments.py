"""Every documented precondition of the scan, broken once: the message, and that nothing was written."""

from __future__ import annotations

import kernel_backends
import pytest
import torch
from bits import same_memory
from memory import copy
from scan_cases import Case, arguments, scan

from cute_ssm.arch import SM_90A
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.ops.selective_scan import config as tuning
from cute_ssm.ops.selective_scan.spec import SelectiveScanSpec

DENSE = Case(lengths=(12,) * 3, dim=8, ngroups=2, in_place=False, nulls=())
VARLEN = Case(lengths=(4, 0, 8), varlen=True, dim=8, ngroups=2, in_place=False, nulls=())
IN_PLACE = Case(lengths=(12,) * 3, dim=8, nulls=())
PREFIX = Case(
    lengths=(12, 5), varlen=True, dim=8, computed=(0, 3), block_size=8, nulls=(), in_place=False
)  # blocks: 0 and 1; 0


def tied(t):
    return t[:, :1].expand_as(t)


# (case, argument, how it is broken, error, what the message says beside the argument's name)
BROKEN = [
    (DENSE, "u", lambda t: None, TypeError, "expected a torch.Tensor, or an array with __dlpack__, got NoneType"),
    (DENSE, "ssm_states", lambda t: 3, TypeError, "expected a torch.Tensor, or an array with __dlpack__, got int"),
    (DENSE, "delta", lambda t: 0.5, TypeError, "expected a torch.Tensor, or an array with __dlpack__, got float"),
    (DENSE, "out", lambda t: 3, TypeError, "expected a torch.Tensor, or an array with __dlpack__, got int"),
    (IN_PLACE, "delta", lambda t: 0.5, TypeError, "expected a torch.Tensor, or an array with __dlpack__, got float"),
    (IN_PLACE, "z", lambda t: [1.0], TypeError, "expected a torch.Tensor, or an array with __dlpack__, got list"),
    (
        VARLEN,
        "query_start_loc",
        lambda t: t.tolist(),
        TypeError,
        "expected a torch.Tensor, or an array with __dlpack__, got list",
    ),
    (
        VARLEN,
        "cache_indices",
        lambda t: t.tolist(),
        TypeError,
        "expected a torch.Tensor, or an array with __dlpack__, got list",
    ),
    (DENSE, "B", lambda t: t.to("meta"), ValueError, "expected a tensor on cpu like u, got one on meta; move it with"),
    (DENSE, "u", lambda t: t[0], ValueError, r"expected shape \(batch, dim, length\), got \(8, 12\); packed ones need"),
    (
        VARLEN,
        "u",
        lambda t: t[None],
        ValueError,
        r"expected shape \(dim, total\), got \(1, 8, 12\); without query_start",
    ),
    (
        DENSE,
        "delta",
        lambda t: t[:2],
        ValueError,
        r"expected shape \(batch, dim, length\) = \(3, 8, 12\), got \(2, 8, 12\)",
    ),
    (VARLEN, "delta", lambda t: t[:, :4], ValueError, r"expected shape \(dim, total\) = \(8, 12\), got \(8, 4\)"),
    (DENSE, "A", lambda t: t[0], ValueError, r"expected shape \(dim, dstate\), got \(16,\)"),
    (DENSE, "A", lambda t: t[:4], ValueError, r"expected shape \(dim, dstate\) = \(8, 16\), got \(4, 16\)"),
    (DENSE, "A", lambda t: t[:, :0], ValueError, "expected dstate of 1 to 256, got dstate = 0"),
    (DENSE, "A", lambda t: t.repeat(1, 17), ValueError, "expected dstate of 1 to 256, got dstate = 272"),
    (DENSE, "B", lambda t: t[0, 0], ValueError, r"expected shape \(batch, ngroups, dstate, length\), got \(16, 12\)"),
    (VARLEN, "B", lambda t: t[0, 0], ValueError, r"expected shape \(ngroups, dstate, total\), got \(12,\)"),
    (
        DENSE,
        "B",
        lambda t: t[:, :, :4],
        ValueError,
        r"expected shape \(batch, ngroups, dstate, length\) = \(3, 2, 16, 12\)",
    ),
    (
        DENSE,
        "B",
        lambda t: t.repeat(1, 2, 1, 1)[:, :3],
        ValueError,
        "expected ngroups that divides dim = 8, got ngroups = 3",
    ),
    (DENSE, "C", lambda t: t[:, 0], ValueError, r"expected shape \(batch, ngroups, dstate, length\)"),
    (DENSE, "D", lambda t: t[:1], ValueError, r"expected shape \(dim,\) = \(8,\), got \(1,\)"),
    (DENSE, "z", lambda t: t[..., :3], ValueError, r"expected shape \(batch, dim, length\)"),
    (DENSE, "delta_bias", lambda t: t[None], ValueError, r"expected shape \(dim,\) = \(8,\), got \(1, 8\)"),
    (DENSE, "out", lambda t: t[:1], ValueError, r"expected shape \(batch, dim, length\)"),
    (
        DENSE,
        "ssm_states",
        lambda t: t[:, :4],
        ValueError,
        r"\(slots, dim, dstate\) = \(7, 8, 16\), got \(7, 4, 16\)",
    ),
    (DENSE, "ssm_states", lambda t: t[0], ValueError, r"expected shape \(slots, dim, dstate\)"),
    (
        DENSE,
        "cache_indices",
        lambda t: t[:2],
        ValueError,
        r"expected shape \(batch,\) = \(3,\) or \(batch, n\), got \(2,\)",
    ),
    (DENSE, "cache_indices", lambda t: t[:, None, None], ValueError, r"expected shape \(batch,\)"),
    (DENSE, "has_initial_state", lambda t: t[:2], ValueError, r"expected shape \(batch,\) = \(3,\), got \(2,\)"),
    (VARLEN, "query_start_loc", lambda t: t[None], ValueError, r"expected shape \(batch \+ 1,\), got \(1, 4\)"),
    (VARLEN, "query_start_loc", lambda t: t[:0], ValueError, r"expected shape \(batch \+ 1,\), got \(0,\)"),
    (PREFIX, "cache_indices", lambda t: t[:, 0], ValueError, r"expected shape \(batch, blocks\), as block_idx_first"),
    (PREFIX, "block_idx_first_scheduled_token", lambda t: t[:1], ValueError, r"expected shape \(batch,\) = \(2,\)"),
    (PREFIX, "last_chunk_indices", lambda t: t[:1], ValueError, r"expected shape \(batch,\) = \(2,\)"),
    (PREFIX, "cu_chunk_seqlen", lambda t: t[None], ValueError, r"expected shape \(chunks \+ 1,\), got"),
    (DENSE, "u", lambda t: t.double(), TypeError, "expected dtype float32 or bfloat16 or float16, got float64"),
    (
        DENSE,
        "delta",
        lambda t: t.float(),
        TypeError,
        "expected dtype bfloat16, got float32; the type of u; cast it with",
    ),
    (
        DENSE,
        "B",
        lambda t: t.half(),
        TypeError,
        r"expected dtype bfloat16, got float16.*cast it with B.to\(torch.bfloat16\)",
    ),
    (DENSE, "C", lambda t: t.float(), TypeError, "expected dtype bfloat16"),
    (DENSE, "z", lambda t: t.float(), TypeError, "expected dtype bfloat16"),
    (DENSE, "out", lambda t: t.float(), TypeError, "expected dtype bfloat16"),
    (
        DENSE,
        "A",
        lambda t: t.bfloat16(),
        TypeError,
        r"expected dtype float32, got bfloat16; cast it with A.to\(torch.float32\)",
    ),
    (
        DENSE,
        "D",
        lambda t: t.half(),
        TypeError,
        r"expected dtype float32, got float16; cast it with D.to\(torch.float32\)",
    ),
    (DENSE, "delta_bias", lambda t: t.double(), TypeError, "expected dtype float32"),
    (DENSE, "ssm_states", lambda t: t.half(), TypeError, "expected dtype bfloat16 or float32, got float16"),
    (DENSE, "cache_indices", lambda t: t.short(), TypeError, "expected dtype int32 or int64, got int16"),
    (VARLEN, "query_start_loc", lambda t: t.float(), TypeError, "expected dtype int32 or int64"),
    (DENSE, "has_initial_state", lambda t: t.int(), TypeError, "expected dtype bool, got int32"),
    (
        PREFIX,
        "initial_state_idx",
        lambda t: t.long(),
        TypeError,
        "expected dtype int32, got int64; the type of cache_ind",
    ),
    (
        PREFIX,
        "cu_chunk_seqlen",
        lambda t: t.long(),
        TypeError,
        "expected dtype int32, got int64; the type of cache_ind",
    ),
    (DENSE, "A", lambda t: t.T.contiguous().T, ValueError, r"stride 1 in its last dimension.*pass A.contiguous\(\)"),
    (DENSE, "ssm_states", lambda t: t.mT.contiguous().mT, ValueError, "stride 1 in its last dimension"),
    (VARLEN, "query_start_loc", lambda t: t.repeat_interleave(2)[::2], ValueError, "stride 1 in its last dimension"),
    (PREFIX, "cu_chunk_seqlen", lambda t: t.repeat_interleave(2)[::2], ValueError, "stride 1 in its last dimension"),
    (DENSE, "out", tied, ValueError, "expected distinct elements, as it is written, got strides"),
    (
        IN_PLACE,
        "delta",
        tied,
        ValueError,
        r"expected distinct elements, as it is written.*so allocate it as torch.zeros",
    ),
    (IN_PLACE, "z", tied, ValueError, "expected distinct elements, as it is written"),
    (DENSE, "null_block_id", lambda _: 0.0, TypeError, "expected an int, got float"),
    (PREFIX, "block_size", lambda _: 0, ValueError, "expected a positive number of tokens, got 0"),
    (PREFIX, "block_size", lambda _: True, TypeError, "expected an int, got bool"),
    (
        PREFIX,
        "initial_state_idx",
        lambda t: None,
        ValueError,
        "expected a tensor, as block_idx_first.*pass all of them",
    ),
    (PREFIX, "block_idx_last_scheduled_token", lambda t: None, ValueError, "expected a tensor, as block_idx_first"),
    (PREFIX, "last_chunk_indices", lambda t: None, ValueError, "expected a tensor, as cu_chunk_seqlen is given"),
    (PREFIX, "cache_indices", lambda t: None, ValueError, "expected a tensor, as block_idx_first_scheduled_token is"),
    (PREFIX, "ssm_states", lambda t: None, ValueError, "expected a tensor, as cache_indices is given"),
    (DENSE, "ssm_states", lambda t: None, ValueError, "expected a tensor, as has_initial_state is given"),
    (DENSE, "cache_indices", lambda t: t + 100, ValueError, r"expected slots in \[0, 7\) or null_block_id = 0, got 1"),
    (DENSE, "cache_indices", lambda t: t * 0 - 1, ValueError, "got -1 at position 0"),
    (PREFIX, "cache_indices", lambda t: t.index_fill(1, torch.tensor(1), 9), ValueError, "got 9 at position 0"),
    (
        VARLEN,
        "query_start_loc",
        lambda t: t + 1,
        ValueError,
        r"expected ascending offsets from 0 to at most total = 12",
    ),
    (VARLEN, "query_start_loc", lambda t: t * 2, ValueError, r"got \[0, 8, 8, 24\]"),
    (VARLEN, "query_start_loc", lambda t: t[[0, 3, 1, 3]], ValueError, r"got \[0, 12, 4, 12\]"),
    (
        PREFIX,
        "initial_state_idx",
        lambda t: t + 2,
        ValueError,
        r"columns in \[0, 2\) of cache_indices, got 2 at position 0",
    ),
    (PREFIX, "block_idx_last_scheduled_token", lambda t: t + 1, ValueError, "got 2 at position 0"),
    (PREFIX, "block_idx_first_scheduled_token", lambda t: t + 2, ValueError, "got 2 at position 0"),
    (PREFIX, "last_chunk_indices", lambda t: t + (t == 2).int(), ValueError, r"expected ascending chunks in \[0, 3\)"),
    (
        PREFIX,
        "cu_chunk_seqlen",
        lambda t: t + (t == 12).int(),
        ValueError,
        "expected chunks of 12 tokens for sequence 0",
    ),
    (PREFIX, "cu_chunk_seqlen", lambda t: t + 4 * (t == 8).int(), ValueError, "none empty, got chunks of .12, 0"),
]


@pytest.mark.parametrize("emulated", [False, True], ids=["reference", "emulate"])
@pytest.mark.parametrize(("case", "name", "change", "error", "message"), BROKEN)
def test_broken_precondition(case, name, change, error, message, emulated):
    call = arguments(case)
    call[name] = change(call[name])
    tensors = {n: t for n, t in call.items() if isinstance(t, torch.Tensor) and t.device.type == "cpu"}
    before = copy(tensors)
    launches = []
    with pytest.raises(error, match=message) as caught:
        if emulated:
            with kernel_backends.kernel(checks=False) as session:
                launches = session.launches
                scan(case, call)
        else:
            scan(case, call)
    assert str(caught.value).startswith(f"{name}:"), str(caught.value)
    for n, tensor in tensors.items():
        same_memory(tensor, before[n], f"{n} was written before the error")
    assert not launches


def test_too_few_slots_without_indices():
    call = arguments(Case(indices=None))
    call["ssm_states"] = call["ssm_states"][:2]
    with pytest.raises(ValueError, match="ssm_states: expected at least batch = 3 slots, got 2; pass cache_indices"):
        scan(Case(indices=None), call)


SPEC = SelectiveScanSpec(
    input_dtype="bfloat16",
    state_dtype="float32",
    dstate=16,
    has_D=True,
    has_z=True,
    has_bias=True,
    delta_softplus=True,
    query_dtype=None,
    cache_dtype="int32",
    has_initial=True,
    blocks=False,
    chunks=False,
    ungated=False,
    aligned=True,
    aligned_states=True,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_dtype": "int8"}, "input_dtype: expected float32 or bfloat16 or float16, got int8"),
        ({"state_dtype": "float16"}, "state_dtype: expected float32 or bfloat16, got float16"),
        ({"dstate": 257}, "dstate: expected 1 to 256, got 257"),
    ],
)
def test_specs_without_a_kernel(change, message):
    with pytest.raises(UnsupportedSpecError, match=message):
        SelectiveScanSpec(**{**vars(SPEC), **change}).check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lanes": 3}, "lanes of"),
        ({"lanes": 8}, "lanes of"),
        ({"warps": 9}, "warps of"),
        ({"tokens": 12}, "tokens of"),
        ({"tokens": 512, "warps": 1}, "pieces of"),
        ({"ctas_per_sm": 0}, "ctas_per_sm of"),
        ({"splits": 0}, "splits of"),
        ({"tokens": 1024, "warps": 8}, "pieces, shared memory of"),
    ],
)
def test_configs_that_do_not_fit(change, message):
    config = tuning.SelectiveScanConfig(**{"lanes": 1, "warps": 4, "tokens": 32, "ctas_per_sm": 4, **change})
    with pytest.raises(UnsupportedSpecError, match=f"config: {message}"):
        config.check(SPEC, SM_90A)


def test_every_choice_fits():
    for dstate in range(1, 257):
        spec = SelectiveScanSpec(**{**vars(SPEC), "dstate": dstate})
        for channels, per_group in ((1, 1), (64, 8), (5120, 5120), (1 << 20, 4096)):
            for length in (1, 4096):
                config = tuning.choose(spec, SM_90A, channels, per_group, length, SM_90A.sm_count)
                config.check(spec, SM_90A)
                assert config.ctas_per_sm * (config.shared_bytes(spec) + 1024) <= SM_90A.shared_bytes + 1024
                assert config.channels() * (1 if config.warps == 1 else 0.5) <= max(per_group, 32), dstate
