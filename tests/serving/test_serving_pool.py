"""`serving.StatePool`: slots, and loops of steps through the operators against token-by-token float64."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from bits import same_bits

import cute_ssm
from cute_ssm import serving
from cute_ssm.reference import rounding

NAN = float("nan")
LAYERS, HEADS, GROUPS, DIM, DSTATE, WINDOW, TOKENS = 2, 2, 1, 16, 64, 8, 4
CHANNELS, WIDTH = 3, 4


def make(history="ring", slots=6, **options):
    options = {"input_dtype": torch.float16, "conv_shape": (CHANNELS, WIDTH), "conv_dtype": torch.float32, **options}
    return serving.StatePool.mamba2(
        LAYERS, slots, nheads=HEADS, dim=DIM, dstate=DSTATE, ngroups=GROUPS, window=WINDOW, tokens=TOKENS,
        history=history, **options,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- loop
@dataclass
class Sequence:
    """The oracle's view of a sequence: its states after every accepted token, and the inputs of its convolutions."""

    slot: int
    states: list[torch.Tensor] = field(default_factory=lambda: [torch.zeros(HEADS, DIM, DSTATE).double()] * LAYERS)
    pending: int = 0
    inputs: list[torch.Tensor] = field(default_factory=lambda: [torch.zeros(CHANNELS, WIDTH - 1)] * LAYERS)
    past: list[list[torch.Tensor]] = field(default_factory=lambda: [[] for _ in range(LAYERS)])  # states before


class Loop:
    """Steps of a model of two layers that is nothing but recurrences, with random acceptance."""

    def __init__(self, history: str, varlen: bool, items: bool, seed: int, bound: float, **options):
        self.pool = make(history, seed=options.pop("stochastic", None), **options)
        self.operator = cute_ssm.checkpointing_ssu_ring if history == "ring" else cute_ssm.checkpointing_ssu
        self.draw, self.g = random.Random(seed), torch.Generator().manual_seed(seed)
        self.varlen, self.items, self.bound = varlen, items, bound
        self.A = [-torch.rand(HEADS, generator=self.g) for _ in range(LAYERS)]
        self.live: list[Sequence] = []
        self.writes = self.reused = self.steps = 0
        for tensor in self.pool.history.values():
            tensor.fill_(NAN)  # nothing that was not written is read

    def rates(self):
        return [A[:, None, None].expand(HEADS, DIM, DSTATE) for A in self.A]

    def start(self):
        slot = self.pool.allocate()
        for tensor in self.pool.history.values():
            tensor[:, slot] = NAN
        self.live.append(Sequence(slot))

    def stop(self, sequence):
        self.live.remove(sequence)
        self.pool.free(sequence.slot)
        self.reused += 1

    def step(self):
        """All live sequences in random order, with padding among them."""
        pool, T = self.pool, TOKENS
        rows: list[Sequence | None] = [*self.live, None, None]
        self.draw.shuffle(rows)
        counts = [self.draw.choice((0, 1, T)) if self.varlen else T for _ in rows]
        cu = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32) if self.varlen else None
        slots = torch.tensor([pool.pad_slot_id if row is None else row.slot for row in rows], dtype=torch.int32)
        call = {"state_batch_indices": slots}
        if self.varlen:
            call |= {"cu_seqlens": cu, "max_seqlen": T}
        if self.items:
            call["work_items"], call["num_writes"] = pool.build_work_items(slots, cu_seqlens=cu)
        self.writes += sum(row is not None and n > 0 and row.pending + n > WINDOW for row, n in zip(rows, counts))
        accepted = [self.draw.choice((0, n, self.draw.randint(0, n))) for n in counts]
        for layer in range(LAYERS):
            self.run(layer, rows, counts, accepted, call)
        pool.commit(slots, torch.tensor(accepted), cu_seqlens=cu)
        for row, n, kept in zip(rows, counts, accepted):
            if row is None or n == 0:
                continue
            row.pending = kept if row.pending + n > WINDOW else row.pending + kept
            row.past = [past[len(past) - row.pending :] for past in row.past]
        self.steps += 1

    def run(self, layer, rows, counts, accepted, call):
        lead = (1, sum(counts)) if self.varlen else (len(rows), TOKENS)

        def randn(*shape):
            return torch.randn(*lead, *shape, generator=self.g)

        x, B, C = (randn(n, size).half() for n, size in ((HEADS, DIM), (GROUPS, DSTATE), (GROUPS, DSTATE)))
        dt = torch.rand(*lead, HEADS, generator=self.g)
        out = torch.full(x.shape, NAN, dtype=torch.float16)
        self.operator(
            **self.pool.arguments(layer), **call, x=x, dt=dt[..., None].expand(x.shape), A=self.rates()[layer], B=B,
            C=C, out=out,
        )  # fmt: skip
        first = 0
        for b, (row, n, kept) in enumerate(zip(rows, counts, accepted)):
            at = (0, slice(first, first + n)) if self.varlen else (b, slice(0, n))
            first += n
            if row is None:
                assert out[at].isnan().all(), "padding"
                continue
            inputs = torch.randn(CHANNELS, n, generator=self.g)
            self.pool.conv_state[layer, row.slot, :, WIDTH - 1 : WIDTH - 1 + n] = inputs
            window = torch.cat([row.inputs[layer], inputs[:, :kept]], 1)
            row.inputs[layer] = window[:, window.shape[1] - WIDTH + 1 :]
            state = row.states[layer]
            for t in range(n):
                if t < kept:
                    row.past[layer].append(state)
                b_, c_, x_ = (v[at][t].double() for v in (B, C, x))
                step = dt[at][t].double()
                decay = torch.exp(self.A[layer].double() * step)[:, None, None]
                state = decay * state + (step[:, None] * x_)[..., None] * b_
                want = torch.einsum("hpn,n->hp", state, c_[0])
                size = torch.einsum("hpn,n->hp", state.abs(), c_[0].abs())
                error = ((out[at][t].double() - want).abs() / (size + 1e-2)).max()
                assert error <= self.bound, f"step {self.steps}, row {b}, token {t}: {error:.2e}"
                if t + 1 == kept:
                    row.states[layer] = state

    def verify(self):
        """Cursors, and the inputs of convolutions."""
        for row in self.live:
            assert self.pool.prev_num_accepted_tokens[row.slot] == row.pending
            for layer in range(LAYERS):
                same_bits(self.pool.conv_state[layer, row.slot, :, : WIDTH - 1], row.inputs[layer])
        assert not self.pool._cursors[:, self.pool.pad_slot_id].any(), "the slot for padding"

    def twin(self, sequence, states=None):
        """Register a copy of a sequence in a slot of its own."""
        twin = Sequence(self.pool.allocate(), states or list(sequence.states))
        self.live.append(twin)
        return twin

    def copy(self, sequence):
        twin = self.twin(sequence)
        for tensor in self.pool.history.values():
            tensor[:, twin.slot] = NAN
        self.pool.copy_slot(sequence.slot, twin.slot)
        twin.pending, twin.inputs = sequence.pending, list(sequence.inputs)
        twin.past = [list(past) for past in sequence.past]

    def materialize(self, sequence, partly):
        """Continue from the true state after all pending tokens, or some of them, in another slot."""
        count = self.draw.randint(0, sequence.pending) if partly else sequence.pending
        states = [past[count] if count < len(past) else state for past, state in zip(sequence.past, sequence.states)]
        twin = self.twin(sequence, states)
        options = {"num_tokens": torch.tensor([count])} if partly else {}
        self.pool.materialize(self.rates(), sequence.slot, twin.slot, **options)
        if not partly:
            twin.inputs = list(sequence.inputs)
        for layer in range(LAYERS):
            scale = None if self.pool.state_scale is None else self.pool.state_scale[layer, twin.slot]
            got = rounding.load(self.pool.state[layer, twin.slot], scale).double()
            error = (got - states[layer]).abs().max() / (states[layer].abs().max() + 1e-2)
            assert error <= self.bound, f"materialized: {error:.2e}"

    def play(self, steps):
        for _ in range(3):
            self.start()
        for number in range(steps):
            self.step()
            self.verify()
            if number % 5 == 1:
                self.stop(self.draw.choice(self.live))
            while len(self.live) > 4:
                self.stop(self.draw.choice(self.live))
            event = number % 4
            if event == 0:
                self.copy(self.draw.choice(self.live))
            elif event == 1:
                self.materialize(self.draw.choice(self.live), partly=number % 8 == 1)
            elif event == 2 and self.pool.available:
                self.start()
            self.verify()
        assert self.steps == steps


EXACT = 2e-3  # bound of errors, relative to the sum of the magnitudes, of outputs in float16


@pytest.mark.thin(4)
@pytest.mark.parametrize("items", [False, True])
@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("history", ["double", "double_x", "ring"])
def test_forty_steps(history, varlen, items):
    loop = Loop(history, varlen, items, seed=1, bound=EXACT)
    loop.play(40)
    assert loop.writes >= 10 and loop.reused >= 8


@pytest.mark.thin(4)
@pytest.mark.parametrize(
    ("state", "bound"), [("float16", 2e-2), ("bfloat16", 6e-2), ("int8", 6e-2), ("float8_e4m3fn", 0.3)]
)
@pytest.mark.parametrize("seed", [None, 5])
def test_forty_steps_of_narrow_states(state, bound, seed):
    options = {"state_dtype": getattr(torch, state), "stochastic": seed}
    loop = Loop("ring", False, True, seed=2, bound=bound, **options)
    loop.play(40)
    assert loop.writes >= 10


@pytest.mark.wide
@pytest.mark.parametrize("history", ["double", "ring"])
def test_steps_through_the_compiled_kernels(history, backend):
    with backend(async_mode="late") as session:
        loop = Loop(history, False, True, seed=3, bound=1e-2)
        loop.play(12)
    names = {launch.program.kernel.name.partition("_object_at")[0].rpartition("_")[2] for launch in session.launches}
    assert len(names) == 4 and loop.writes >= 5, names


def test_a_perturbed_history_is_noticed():
    loop = Loop("ring", False, False, seed=1, bound=EXACT)
    loop.start()
    for _ in range(20):
        loop.step()
    pool, slot = loop.pool, loop.live[0].slot
    assert loop.live[0].pending
    pool.history["B_cache"][0, slot, 0, int(pool.ring_start[slot]), 0] += 8
    with pytest.raises(AssertionError, match="token"):
        loop.step()


def test_materialize_in_place_leaves_nothing_pending():
    loop = Loop("ring", False, False, seed=4, bound=EXACT)
    loop.start()
    while not loop.live or loop.live[0].pending < 3 or not loop.writes:
        loop.step()
    pool, slot = loop.pool, loop.live[0].slot
    other = pool.allocate()
    pool.materialize(loop.rates(), slot, other)
    pool.materialize(loop.rates(), slot, slot)
    assert not pool._cursors[:, slot].any()
    same_bits(pool.state[:, slot], pool.state[:, other])
    same_bits(pool.conv_state[:, slot], pool.conv_state[:, other])
    loop.live[0].pending, loop.live[0].past = 0, [[] for _ in range(LAYERS)]
    for _ in range(3):
        loop.step()
        loop.verify()


# ---------------------------------------------------------------------------------------------------------------- slots
def test_slots_are_taken_and_given_back():
    pool = make(slots=3)
    assert pool.slots == 4 and pool.pad_slot_id == 3 and pool.available == 3
    taken = [pool.allocate() for _ in range(3)]
    assert sorted(taken) == [0, 1, 2] and pool.available == 0
    with pytest.raises(ValueError, match="slots: expected a free slot, got 3 in use"):
        pool.allocate()
    pool.free(1)
    for slot in (1, 3, -1, 4):
        with pytest.raises(ValueError, match="slot: expected an allocated slot"):
            pool.free(slot)
    assert pool.allocate() == 1


def everything(pool):
    tensors = [pool.state, pool.state_scale, pool.conv_state, pool._cursors.T[None], pool.rand_seed]
    tensors += pool.history.values()
    return [serving.pool._raw(t) for t in tensors if t is not None]


@pytest.mark.parametrize("state", [torch.float32, torch.float8_e4m3fn, torch.int16])
@pytest.mark.parametrize("kind", [int, torch.int32, torch.int64])
def test_reset_and_copy_touch_nothing_else(state, kind):
    pool = make(state_dtype=state, seed=None if state is torch.float32 else 1)
    assert [pool.allocate() for _ in range(6)] == list(range(6))
    for tensor in everything(pool):
        tensor.random_(1, 3)
    before = [tensor.clone() for tensor in everything(pool)]
    one, two = (2, 4) if kind is int else (torch.tensor([2], dtype=kind), torch.tensor([4], dtype=kind))
    pool.copy_slot(one, two)
    for now, old in zip(everything(pool), before):
        seeds = now is everything(pool)[-4] and pool.rand_seed is not None
        same_bits(now[:, [0, 1, 2, 3, 5, 6]], old[:, [0, 1, 2, 3, 5, 6]])
        same_bits(now[:, 4], old[:, 4] if seeds else old[:, 2])
    pool.reset_slot(one)
    for now, old in zip(everything(pool), before):
        same_bits(now[:, [0, 1, 3, 5, 6]], old[:, [0, 1, 3, 5, 6]])
    for tensor in (pool.state, pool.conv_state, pool._cursors.T[None]):
        assert not tensor[:, 2].float().any()
    for tensor in pool.history.values():
        assert tensor[:, 2].any(), "histories stay"


def test_pools_start_as_zeros_with_seeds_of_their_own():
    pool = make("double", state_dtype=torch.int8, seed=7)
    for tensor in (pool.state, pool.state_scale, pool.conv_state, pool._cursors, *pool.history.values()):
        assert not tensor.float().any()
    seeds = pool.rand_seed.flatten().tolist()
    assert len(set(seeds)) == len(seeds)
    same_bits(make(seed=7, state_dtype=torch.int8).rand_seed, pool.rand_seed)
    assert not torch.equal(make(seed=8, state_dtype=torch.int8).rand_seed, pool.rand_seed)
    pool.reset_slot(3)
    assert (pool.rand_seed.flatten() != torch.tensor(seeds)).view(LAYERS, -1).nonzero()[:, 1].tolist() == [3] * LAYERS
    assert len({*seeds, *pool.rand_seed.flatten().tolist()}) == len(seeds) + LAYERS, "new ones, of every layer"
    # SplitMix64 of the number of a draw, in Python's integers
    x = (((1 * 7 + 0) * LAYERS + 0) * 0x9E3779B97F4A7C15 + 7) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    assert seeds[0] % 2**64 == x ^ x >> 31


def test_commit_advances_the_seeds_of_the_batch():
    pool = make(state_dtype=torch.float16, seed=0)
    for _ in range(6):
        pool.allocate()
    before = pool.rand_seed.clone()
    pool.commit(torch.tensor([4, pool.pad_slot_id, 1, pool.pad_slot_id]), torch.tensor([1, 2, 0, 3]))
    assert (pool.rand_seed - before).tolist() == [[0, 1, 0, 0, 1, 0, 0]] * LAYERS


@pytest.mark.parametrize("packed", [False, True])
def test_commit_shifts_conv_state_of_committed_rows_only(packed):
    """Slots and counts that the host looks at only where it can: on a CPU, `commit` refuses them before."""
    pool = make()
    pool.conv_state.random_(1, 100)
    before = pool.conv_state.clone()
    slots, accepted = torch.tensor([0, 1, 2, 3, 9, -5]), torch.tensor([-1, TOKENS + 1, 2, 0, 1, 1])
    lengths = torch.tensor([0, 1, 6, 8, 11, 13, 15]) if packed else None
    pool._shift_conv(slots, accepted, lengths)
    before[:, 2, :, : WIDTH - 1] = before[:, 2, :, 2 : WIDTH + 1]
    same_bits(pool.conv_state, before)


def test_a_pool_for_gated_delta_nets():
    pool = serving.StatePool.gated_delta(2, 3, heads=1, value_heads=2, K=64, V=64, window=8, tokens=3)
    names = ("initial_state", "k_cache", "v_cache", "g_cache", "beta_cache", "ring_start", "prev_num_accepted_tokens")
    assert set(pool.arguments(1)) == {*names, "window"} and pool.pad_slot_id == -1
    slot = torch.tensor([pool.allocate(), -1])
    g = torch.Generator().manual_seed(0)
    for _ in range(6):
        q, k, v = (torch.randn(2, 3, heads, 64, generator=g).bfloat16() for heads in (1, 1, 2))
        a, b = torch.randn(2, 2, 3, 2, generator=g)
        out, _ = cute_ssm.gated_delta_rule_replay(
            **pool.arguments(0), q=q, k=k, v=v, initial_state_indices=slot, A_log=torch.zeros(2), a=a,
            dt_bias=torch.zeros(2), b=b,
        )  # fmt: skip
        assert out[0].isfinite().all() and out[0].any() and not out[1].any()
        pool.commit(slot, torch.tensor([2, 0]))
    assert pool.prev_num_accepted_tokens.tolist() == [6, 0, 0, 0] and pool.ring_start.tolist() == [6, 0, 0, 0]
    assert pool.state[0, slot[0]].any() and not pool.state[1].any()
    with pytest.raises(ValueError, match="A: expected None for gated delta nets"):
        pool.materialize([torch.zeros(1)] * 2, 0, 1)


BAD = {
    "layers: expected a positive integer": lambda: serving.StatePool.mamba2(0, 3, nheads=1, dim=16, dstate=64),
    "slots: expected a positive integer": lambda: make(slots=0),
    "nheads: expected a positive integer": lambda: serving.StatePool.mamba2(1, 1, nheads=0, dim=16, dstate=64),
    "K: expected a positive integer": lambda: serving.StatePool.gated_delta(1, 1, heads=1, value_heads=1, K=0, V=64),
    "history: expected double or double_x or ring": lambda: make("triple"),
    "seed: expected None with float32": lambda: make(seed=1),
    "slots: expected a slot in": lambda: make().reset_slot(7),
    "slots: expected slots in": lambda: make().reset_slot(torch.tensor([-1])),
    "slots: expected int32 or int64": lambda: make().reset_slot(torch.tensor([1.0])),
    "destination: expected 1 slots, as many as in source": lambda: make().copy_slot(1, torch.tensor([2, 3])),
    "destination: expected distinct slots": lambda: make().copy_slot(torch.tensor([1, 2]), torch.tensor([3, 3])),
    "destination: expected distinct slots that are not sources": lambda: make().copy_slot(1, 1),
    "A: expected one tensor for each of 2 layers": lambda: make().materialize([torch.zeros(1)], 0, 1),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ValueError) as caught:
        BAD[message]()
    assert message in str(caught.value)


def test_importing_loads_no_compiler():
    code = "import sys, cute_ssm.serving; sys.exit(bool({'cutlass', 'tvm_ffi', 'ptxsim', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
