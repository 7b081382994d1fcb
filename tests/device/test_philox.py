"""Random words of kernels against the model and known answers."""

from __future__ import annotations

import pytest
import torch
from bits import equal

pytest.importorskip("cutlass")

import rounding_kernels as kernels

import ptxsim
from cute_ssm.reference import rounding

N = kernels.THREADS


def draw(seed, rounds, count, dstate, slot, head, row, column, token, arch="sm_90a"):
    out = torch.zeros(N, count // 2, dtype=torch.int32)
    with ptxsim.emulate(arch=arch):
        kernels.drawing(rounds, count, dstate, arch)(torch.tensor([seed]), slot, head, row, column, token, out)
    return torch.stack([out & 0xFFFF, out >> 16 & 0xFFFF], -1).reshape(N, count).long()


@pytest.mark.parametrize(
    "rounds,count,dstate,arch",
    [
        (10, 8, 128, "sm_90a"),
        (10, 8, 128, "sm_100a"),
        (1, 8, 64, "sm_90a"),
        (7, 16, 256, "sm_90a"),
        (10, 4, 100, "sm_90a"),
        (10, 2, 18, "sm_100a"),
    ],
)
def test_words(rounds, count, dstate, arch):
    generator = torch.Generator().manual_seed(0)

    def integers(top, dtype=torch.int32):
        return torch.randint(0, top, (N,), generator=generator, dtype=torch.int64).to(dtype)

    slot, head, row, token = integers(2**40, torch.int64), integers(128), integers(128), integers(65536)
    slot[:3] = torch.tensor([0, 2**32 - 1, 2**48 - 1])
    column = (integers(dstate // count) * count).int()
    for seed in (0, 42, -1, 2**33 + 5, -(2**63)):
        got = draw(seed, rounds, count, dstate, slot, head, row, column, token, arch)
        per_row = (t[:, None] for t in (slot, head, row))
        columns = column[:, None] + torch.arange(count)
        equal(got, rounding.random_bits(seed, rounds, *per_row, columns, dstate, token[:, None]))


def test_known_answers():
    """(seed, first word of the counter) -> words, by Random123 and by other implementations of it."""
    zeros = torch.zeros(N, dtype=torch.int32)
    rows = torch.arange(N, dtype=torch.int32)
    got = draw(42, 10, 8, 8, zeros.long(), zeros, rows, zeros, zeros)
    words = got.view(N, 4, 2)[..., 0] | got.view(N, 4, 2)[..., 1] << 16
    assert words[0].tolist() == [0x9CEAF053, 0x77F5493B, 0x12BF50AD, 0x5742B3D7]
    assert words[1].tolist() == [0xFCDB2127, 0x53BA6CFD, 0x838F5A6E, 0x744E06FB]
    got = draw(0, 10, 8, 8, zeros.long(), zeros, zeros, zeros, zeros)
    assert (got[0, ::2] | got[0, 1::2] << 16).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_bits_do_not_depend_on_the_access():
    """Threads that take 2, 4, 8 or 16 columns draw the same bits for a row of 128."""
    rows = {}
    for count in (2, 4, 8, 16):
        pieces = 128 // count
        column = (torch.arange(N) % pieces * count).int()
        row = (torch.arange(N) // pieces).int()
        same = torch.full((N,), 3)
        got = draw(7, 10, count, 128, same, same.int(), row, column, same.int())
        rows[count] = got.flatten()[:128]
    assert all(torch.equal(bits, rows[8]) for bits in rows.values())


def test_instructions():
    """What eight more elements cost: 60 for ten rounds, 4 stores, and the counter."""
    totals = []
    for count in (8, 16):
        zeros = torch.zeros(N, dtype=torch.int32)
        out = torch.zeros(N, count // 2, dtype=torch.int32)
        with ptxsim.emulate(counters=True) as session:
            kernels.drawing(10, count, 128, "sm_90a")(torch.tensor([1]), zeros.long(), zeros, zeros, zeros, zeros, out)
        totals.append(session.launches[-1].counters.as_dict()["instructions"]["total"] // (N // 32))
    assert totals[1] - totals[0] <= 60
