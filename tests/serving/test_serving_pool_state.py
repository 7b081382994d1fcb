"""`serving.StatePool` copied, kept, moved, printed; what it refuses; slots that nobody allocated."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import kernel_backends
import out_of_range
import pytest
import torch
import torch.autograd.forward_ad as fwad
from bits import each_same_bits, same_bits
from kernel_backends import both
from paths import SUPPORT
from pool_runs import CHANNELS, CONV, LAYERS, TOKENS, WIDTH, WINDOW, Run, gated, memory, rates, started
from torch.utils._python_dispatch import TorchDispatchMode

import cute_ssm
from cute_ssm import serving
from cute_ssm.errors import UnsupportedSpecError

NAN = float("nan")


def mamba2(**options):
    sizes = {"nheads": 2, "dim": 16, "dstate": 64, "window": WINDOW, "tokens": TOKENS, **CONV}
    return serving.StatePool.mamba2(LAYERS, 5, **{**sizes, **options})


POOLS = {
    "ring with seeds": lambda: mamba2(state_dtype=torch.float16, seed=3),
    "double with scales": lambda: mamba2(state_dtype=torch.int8, history="double_x"),
    "float8": lambda: mamba2(state_dtype=torch.float8_e4m3fn, history="double", input_dtype=torch.float16),
    "gated delta": gated,
}


def same(one, other):
    return all(torch.equal(tensor, memory(other)[name]) for name, tensor in memory(one).items())


def through_pickle(pool):
    return pickle.loads(pickle.dumps(pool))


def through_torch(pool):
    file = io.BytesIO()
    torch.save({"pools": [pool, pool]}, file)
    file.seek(0)
    one, other = torch.load(file, weights_only=False)["pools"]
    assert one is other
    return one


def through_state_dict(pool):
    file = io.BytesIO()
    torch.save(pool.state_dict(), file)
    file.seek(0)
    twin = next(make for make in POOLS.values() if make()._settings() == pool._settings() and match(make(), pool))()
    twin.allocate()  # what it remembers is replaced
    addresses = {name: tensor.data_ptr() for name, tensor in twin._tensors().items()}
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert addresses == {name: tensor.data_ptr() for name, tensor in twin._tensors().items()}
    return twin


def match(one, other):
    return {n: (t.shape, t.dtype) for n, t in one._tensors().items()} == {
        n: (t.shape, t.dtype) for n, t in other._tensors().items()
    }


WAYS = {
    "pickle": through_pickle,
    "torch.save": through_torch,
    "deepcopy": copy.deepcopy,
    "state_dict": through_state_dict,
    "to": lambda pool: pool.to("cpu", copy=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", POOLS)
def test_a_copied_pool_continues_bit_for_bit_and_independently(kind, way):
    pool, run = started(POOLS[kind])
    twin = WAYS[way](pool)
    assert twin is not pool and same(pool, twin) and twin._free == pool._free and twin._free is not pool._free
    for name, tensor in twin._tensors().items():
        assert tensor.data_ptr() != pool._tensors()[name].data_ptr(), name
    frozen = {name: tensor.clone() for name, tensor in memory(pool).items()}
    other = Run(twin, run.slots[:2].tolist())
    got = [other.step(number) for number in range(7, 17)]
    each_same_bits(frozen, memory(pool), "the pool itself changed")
    want = [run.step(number) for number in range(7, 17)]
    each_same_bits(got, want)
    assert same(pool, twin)
    # views: what operators write is what everything else reads
    assert twin.arguments(1)[twin.state_name].data_ptr() == twin.state[1].data_ptr()
    assert twin.arguments(0)["prev_num_accepted_tokens"].data_ptr() == twin._cursors.data_ptr()
    # slots: the next ones are the same, with the same seeds, and those in use stay so
    assert [twin.allocate() for _ in range(3)] == [pool.allocate() for _ in range(3)] and same(pool, twin)
    same_bits(twin._unallocated, pool._unallocated)
    assert twin.available == 0


def test_a_pool_that_is_pickled_in_a_process_goes_on_in_another(tmp_path):
    pool, run = started(POOLS["ring with seeds"])
    (tmp_path / "pool").write_bytes(pickle.dumps((pool, run.slots)))
    code = (
        "import os, pickle, sys, torch; sys.path[:0] = sys.argv[1].split(os.pathsep)\n"
        "import pool_runs as t\n"
        "pool, slots = pickle.load(open(sys.argv[2], 'rb'))\n"
        "torch.save([t.Run(pool, slots[:2].tolist()).step(number) for number in range(7, 12)], sys.argv[3])"
    )
    folders = str(SUPPORT)
    subprocess.run([sys.executable, "-c", code, folders, tmp_path / "pool", tmp_path / "steps"], check=True)
    for number, got in zip(range(7, 12), torch.load(tmp_path / "steps", weights_only=True)):
        same_bits(run.step(number), got)


def test_a_shallow_copy_is_another_name_for_the_same_slots():
    pool, _ = started(gated)
    twin = copy.copy(pool)
    assert all(tensor.data_ptr() == pool._tensors()[name].data_ptr() for name, tensor in twin._tensors().items())
    assert twin.allocate() != pool.allocate() and twin.available == pool.available
    assert twin.prev_num_accepted_tokens.data_ptr() == pool.prev_num_accepted_tokens.data_ptr()


def test_moves_keep_types_and_copy_only_if_needed():
    pool = POOLS["float8"]()
    assert pool.to("cpu") is pool and pool.to() is pool and pool.to(torch.device("cpu")) is pool
    assert pool.to(torch.zeros(1)) is pool and pool.to(device="cpu", copy=True) is not pool
    for arguments in ((torch.float16,), ("cpu", torch.float32)):
        with pytest.raises(TypeError, match=r"dtype: expected None, as a pool cannot change .*materialize into"):
            pool.to(*arguments)
    moved = pool.to("meta")
    assert moved.state.device.type == "meta" and moved.ring_start is None and moved.cache_buf_idx.is_meta
    assert moved.arguments(0)["old_x"].is_meta and moved._unallocated.is_meta


def test_what_a_pool_prints():
    pool, _ = started(POOLS["double with scales"])
    first, *lines = repr(pool).splitlines()
    assert first.startswith("StatePool(mamba2, layers=2, slots=5 (2 used, 3 free), window=8, tokens=3, ")
    assert first.endswith(f"{pool.nbytes / 1024:.1f} KiB on cpu)")
    assert lines[:3] == [
        "  state: int8 (2, 6, 2, 16, 64)",
        "  state_scale: float32 (2, 6, 2, 16)",
        "  old_x: bfloat16 (2, 6, 2, 8, 2, 16)",
    ]  # fmt: skip
    assert len(repr(gated()).splitlines()) == 7 and "gated_delta" in repr(gated())


BAD_DICTS = {
    "window: expected 8, got 7": lambda: mamba2(window=7).state_dict(),
    "rand_seed": lambda: mamba2(state_dtype=torch.float16, seed=1).state_dict(),
    "state: expected float32 of": lambda: mamba2(state_dtype=torch.bfloat16).state_dict(),
    "slots: expected 6, got 4": lambda: serving.StatePool.mamba2(
        LAYERS, 3, nheads=2, dim=16, dstate=64, window=WINDOW, tokens=TOKENS, **CONV
    ).state_dict(),
    "free: expected distinct slots below 5": lambda: {**mamba2().state_dict(), "free": torch.tensor([1, 5])},
    "history.k_cache": lambda: gated().state_dict(),
    "state: expected float32 of (2, 6, 2, 16, 64), got None": lambda: {**mamba2().state_dict(), "state": None},
}


BAD_CONTENTS = {
    "settings: expected a dict, got NoneType": {"settings": None},
    "window: expected 8, got 8.0": {"settings": {**mamba2()._settings(), "window": 8.0}},
    "free: expected a tensor of slots, (n,), int64, got None": {"free": None},
    "free: expected a tensor of slots, (n,), int64, got [1.5]": {"free": [1.5]},
    "free: expected a tensor of slots, (n,), int64, got float32 of (2,)": {"free": torch.ones(2)},
    "free: expected a tensor of slots, (n,), int64, got int64 of ()": {"free": torch.tensor(1)},
    "seed: expected an int or None, got 'x'": {"seed": "x"},
    "seed: expected an int or None, got 1.5": {"seed": 1.5},
    "seed: expected an int, got None": {"seed": None},
    "conv_state: expected a dense tensor with data": {"conv_state": mamba2().conv_state.to("meta")},
    "draws: expected int64 of (6,), got 3": {"draws": 3},
}


@pytest.mark.parametrize("message", BAD_CONTENTS)
def test_a_state_dict_with_wrong_contents_changes_nothing(message):
    def make():
        return mamba2(state_dtype=torch.float16, seed=3)

    pool, _ = started(make)
    frozen = copy.deepcopy(pool)
    with pytest.raises((ValueError, TypeError), match=r"^state_dict: ") as caught:
        pool.load_state_dict({**make().state_dict(), **BAD_CONTENTS[message]})
    assert message in str(caught.value)
    assert same(pool, frozen) and pool._free == frozen._free and pool._root == frozen._root
    same_bits(pool._unallocated, frozen._unallocated)


def test_wrong_state_dicts_are_refused_and_gradients_are_not_loaded():
    pool, _ = started(mamba2)
    for wrong in (None, 3, [1]):
        with pytest.raises(TypeError, match="state_dict: expected a dict that state_dict"):
            pool.load_state_dict(wrong)
    with pytest.raises(ValueError, match="state_dict: expected the names of this pool's state_dict"):
        pool.load_state_dict({**pool.state_dict(), 7: None, "more": None})
    with pytest.raises(ValueError, match="state_dict: seed: expected None for a pool that does not round"):
        pool.load_state_dict({**pool.state_dict(), "seed": 3})
    kept = copy.deepcopy(pool.state_dict())
    kept["state"].requires_grad_()
    pool.load_state_dict({**kept, "free": tuple(kept["free"].tolist())})
    assert not pool.state.requires_grad


@pytest.mark.parametrize("message", BAD_DICTS)
def test_a_state_dict_of_another_pool_changes_nothing(message):
    pool, _ = started(mamba2)
    frozen = copy.deepcopy(pool)
    with pytest.raises(ValueError, match="state_dict") as caught:
        pool.load_state_dict(BAD_DICTS[message]())
    assert message in str(caught.value)
    assert same(pool, frozen) and pool._free == frozen._free


# ------------------------------------------------------------------------------------------------------ what is refused
REFUSED = {
    "state_dtype: expected float32 or": lambda: gated(state_dtype=torch.int8),
    "state_dtype: expected float32 or bfloat16 or": lambda: mamba2(state_dtype=torch.float64),
    "input_dtype: expected bfloat16 or float16": lambda: mamba2(input_dtype=torch.float32),
    "input_dtype: expected bfloat16 or float16, got float32": lambda: gated(input_dtype=torch.float32),
    "K: expected": lambda: gated(K=84),
    "V: expected": lambda: gated(V=40),
    "tokens: expected 1 to 16": lambda: gated(tokens=17),
    "window: expected 1 to 64": lambda: gated(window=200),
    "value_heads: expected value_heads that is a multiple of heads = 3": lambda: gated(heads=3),
    "dstate: expected 64": lambda: mamba2(dstate=100),
    "dim: expected a multiple of 16": lambda: mamba2(dim=24),
    "nheads: expected a multiple of groups = 3": lambda: mamba2(ngroups=3),
    "window: expected 1 to 64, got 200": lambda: mamba2(window=200),
    "tokens: expected 1 to 64": lambda: mamba2(tokens=65),
}


@pytest.mark.parametrize("message", REFUSED)
def test_pools_refuse_what_their_operators_would(message):
    with pytest.raises(UnsupportedSpecError if "value_heads" not in message else ValueError) as caught:
        REFUSED[message]()
    assert message in str(caught.value)


MISUSED = {
    "state_dtype: expected a torch.dtype": lambda: mamba2(state_dtype="float16"),
    "conv_dtype: expected a torch.dtype": lambda: gated(conv_dtype="float16"),
    "conv_shape: width: expected a positive integer": lambda: gated(conv_shape=(3, 0)),
    "window: expected a positive integer": lambda: mamba2(window=0),
    "tokens: expected a positive integer": lambda: gated(tokens=2.0),
    "dim: expected a positive integer": lambda: mamba2(dim=True),
    "seed: expected None with float32 states": lambda: mamba2(seed=1),
    "seed: expected an int or None, got 'a'": lambda: mamba2(seed="a"),
    "seed: expected an int or None, got 1.5": lambda: mamba2(seed=1.5, state_dtype=torch.float16),
    "seed: expected an int or None, got True": lambda: mamba2(seed=True, state_dtype=torch.float16),
    "conv_shape: expected (channels, width), the shape of the weight, got (3,)": lambda: mamba2(conv_shape=(3,)),
    "conv_shape: expected (channels, width), the shape of the weight, got 5": lambda: gated(conv_shape=5),
    "conv_shape: expected (channels, width), the shape of the weight, got 'ab'": lambda: gated(conv_shape="ab"),
    "conv_shape: expected (channels, width), the shape of the weight, got (3, 4, 5)": (
        lambda: mamba2(conv_shape=(3, 4, 5))
    ),
    "conv_shape: channels: expected a positive integer": lambda: mamba2(conv_shape=("3", 4)),
    "destination_pool: expected a StatePool or None, got str": lambda: mamba2().copy_slot(0, 1, destination_pool="x"),
    "destination_pool: expected a StatePool or None, got dict": (
        lambda: gated().materialize(None, 0, 1, destination_pool={})
    ),
    "source: expected an int, or a tensor of slots, got str": lambda: gated().copy_slot("0", 1),
    "destination: expected an int, or a tensor of slots, got float": lambda: gated().copy_slot(0, 1.0),
    "slot: expected an int, or a tensor of slots, got NoneType": lambda: gated().free(None),
    "slots: expected an int, or a tensor of slots, got list": lambda: gated().reset_slot([1]),
}


@pytest.mark.parametrize("message", MISUSED)
def test_sizes_and_types_that_are_none(message):
    with pytest.raises((TypeError, ValueError)) as caught:
        MISUSED[message]()
    assert message in str(caught.value)


@pytest.mark.parametrize("window", [1, 8, 64])
@pytest.mark.parametrize("tokens", [1, 16])
def test_operators_take_every_pool_that_can_be_made(window, tokens):
    """At the limits of what pools accept."""
    run = Run(gated(window=window, tokens=tokens), [])
    run.slots = torch.tensor([-1])
    q, k, v = (torch.zeros(1, tokens, heads, 64).bfloat16() for heads in (1, 1, 2))
    gates = {name: torch.zeros(1, tokens, 2) for name in "ab"} | {name: torch.zeros(2) for name in ("A_log", "dt_bias")}
    cute_ssm.gated_delta_rule_replay(
        **run.pool.arguments(0), q=q, k=k, v=v, initial_state_indices=run.slots, **gates
    )  # fmt: skip
    for history in ("ring", "double"):
        pool = mamba2(window=window, tokens=tokens, dim=128, dstate=256, history=history, state_dtype=torch.int16)
        x, B = torch.zeros(1, tokens, 2, 128).bfloat16(), torch.zeros(1, tokens, 1, 256).bfloat16()
        operator = cute_ssm.checkpointing_ssu_ring if history == "ring" else cute_ssm.checkpointing_ssu
        weights = {"dt": torch.zeros(1, tokens, 2, 1).expand(x.shape), "A": torch.zeros(2, 1, 1).expand(2, 128, 256)}
        operator(**pool.arguments(0), x=x, B=B, C=B, out=x.clone(), **weights, state_batch_indices=torch.tensor([5]))


# ---------------------------------------------------------------------------------------------- slots nobody allocated
@both
@pytest.mark.parametrize("make", [mamba2, gated])
def test_a_commit_of_an_unallocated_slot_is_refused_by_name(make, backend):
    """One that never was, one that is free again, the reserved one of a gated-delta pool; padding is no slot."""
    pool, _ = started(make)
    free = pool._free[-1]
    frozen = copy.deepcopy(pool)
    ones = torch.ones(3, dtype=torch.int64)
    used = next(slot for slot in range(5) if slot not in pool._free)

    def commit(*slots, **options):
        pool.commit(torch.tensor(slots), options.pop("accepted", ones), **options)

    wrong = [free, pool._free[0], *([5] if pool.kind == "gated_delta" else [])]
    with backend(checks=False):
        for slot in wrong:
            message = f"state_batch_indices: expected allocated slots, got slot {slot} at position 1;"
            with pytest.raises(ValueError, match=message):
                commit(used, slot, pool.pad_slot_id)
        assert same(pool, frozen), "something was written"
        commit(used, free, pool.pad_slot_id, accepted=torch.tensor([1, -1, 1]))  # is left as it is
        commit(free, pool.pad_slot_id, used, cu_seqlens=torch.tensor([0, 0, 2, 2]))  # neither has tokens
        changed = [i for i in range(6) if pool.prev_num_accepted_tokens[i] != frozen.prev_num_accepted_tokens[i]]
        assert changed in ([], [used])
        slot = pool.allocate()
        commit(used, slot, pool.pad_slot_id)
        pool.free(slot)
        with pytest.raises(ValueError, match="allocated slots"):
            commit(used, slot, pool.pad_slot_id)


class Ops(TorchDispatchMode):
    """Names of what PyTorch runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Emulated calls whose contents the host does not look at."""
    out_of_range.unchecked(monkeypatch)
    with kernel_backends.kernel(checks=False) as session:
        yield session


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("make", ["gated delta", "ring with seeds"])
def test_on_a_gpu_rows_of_unallocated_slots_are_left_alone(make, kind, as_on_a_gpu):
    """Cursors, seeds and inputs of convolutions; slots that lead outside among them."""
    pool = POOLS[make]()
    one, freed, two = (pool.allocate() for _ in range(3))
    pool.free(freed)
    fresh = pool._free[0]
    pool.conv_state.random_(1, 100)
    frozen = copy.deepcopy(pool)
    slots = torch.tensor([one, freed, two, fresh, 5, -1, 99, -(2**31)], dtype=kind)
    pool.commit(slots, torch.tensor([1, 1, 2, 1, 1, 1, 1, 1]))
    assert pool.prev_num_accepted_tokens.nonzero().flatten().tolist() == sorted([one, two])
    assert not pool._cursors[1].any()
    if pool.rand_seed is not None:
        assert (pool.rand_seed != frozen.rand_seed)[0].nonzero().flatten().tolist() == sorted([one, two])
    moved = (pool.conv_state != frozen.conv_state).any(-1).any(-1).any(0)
    assert moved.nonzero().flatten().tolist() == sorted([one, two])


@pytest.mark.parametrize("packed", [False, True])
def test_a_commit_of_a_pool_is_one_launch_and_allocates_nothing(packed, as_on_a_gpu):
    pool = mamba2(conv_shape=None, conv_dtype=None, state_dtype=torch.float16, seed=3)
    slots = torch.tensor([pool.allocate(), pool.pad_slot_id, 3])
    call = (slots, torch.tensor([2, 1, 1])), {"cu_seqlens": torch.tensor([0, 3, 4, 6])} if packed else {}
    pool.commit(*call[0], **call[1])  # compiles
    launched = len(as_on_a_gpu.launches)
    with Ops() as ops:
        pool.commit(*call[0], **call[1])
    assert len(as_on_a_gpu.launches) == launched + 1
    assert {*ops.names} <= {"view", "detach", "alias"}, "what makes no view allocates and launches"
    assert pool.prev_num_accepted_tokens.nonzero().flatten().tolist() == [slots[0]]


@pytest.mark.parametrize("kind", POOLS)
def test_a_commit_can_be_traced(kind):
    """As one graph, and refuses slots as it does without a compiler."""
    pool, run = started(POOLS[kind])
    twin = copy.deepcopy(pool)
    accepted = torch.tensor([1, 2, 0])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def commit(slots, accepted):
        pool.commit(slots, accepted)

    commit(run.slots, accepted)
    twin.commit(run.slots, accepted)
    assert same(pool, twin) and pool.prev_num_accepted_tokens.any()
    with pytest.raises(ValueError, match="state_batch_indices: expected allocated slots"):
        commit(torch.tensor([*run.slots[:2], pool._free[0]]), torch.ones_like(accepted))
    assert same(pool, twin)


@pytest.mark.parametrize("indices", [int, torch.int32, torch.int64])
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("make", [mamba2, gated])
def test_destinations_that_nobody_allocated_are_refused_by_name(make, elsewhere, indices):
    """`allocate` would reset them: a free slot, one that is free again, the reserved one of a gated-delta pool."""
    pool, run = started(make)
    target = started(make)[0] if elsewhere else pool
    other = {"destination_pool": target} if elsewhere else {}
    decays = rates() if make is mamba2 else None
    frozen = copy.deepcopy(target)
    source = int(run.slots[0])

    def given(slot):
        return slot if indices is int else torch.tensor([slot], dtype=indices)

    for slot in (target._free[-1], target._free[0], *([5] if make is gated else [])):
        message = f"destination: expected allocated slots, got slot {slot} at position 0; get slots from allocate"
        with pytest.raises(ValueError, match=message):
            pool.copy_slot(given(source), given(slot), **other)
        with pytest.raises(ValueError, match=message):
            pool.materialize(decays, given(source), given(slot), **other)
    assert same(target, frozen)
    slot = target.allocate()
    pool.copy_slot(given(source), given(slot), **other)
    assert target.state[:, slot].any()
    same_bits(target.state[:, slot], pool.state[:, source])
    if make is mamba2:
        pool.copy_slot(given(source), given(target.pad_slot_id), **other)  # of padding nobody asks
        pool.materialize(decays, given(source), given(target.pad_slot_id), **other)


def dual(tensor):
    return fwad.make_dual(tensor, torch.ones_like(tensor))


UNUSABLE = {
    r"A\[1\]: expected shape \(nheads, dim, dstate\) = \(2, 16, 64\), got \(2, 16\)": lambda A: A[..., 0],
    r"A\[1\]: expected shape .*; pass A\[1\]\[..., None, None\].expand\(2, 16, 64\)": lambda A: A[:, 0, 0],
    r"A\[1\]: expected a torch.Tensor, got NoneType": lambda A: None,
    r"A\[1\]: expected dtype float32 or bfloat16 or float16, got float64": lambda A: A.double(),
    r"A\[1\]: expected a tensor on cpu like the pool, got one on meta": lambda A: A.to("meta"),
    r"A\[1\]: expected stride 0 in its last 2 dimensions": lambda A: A.contiguous(),
    r"A\[1\]: expected a tensor without a tangent": lambda A: dual(A[:, 0, 0])[:, None, None].expand(A.shape),
}


@pytest.mark.parametrize("message", UNUSABLE)
def test_a_layer_that_cannot_be_folded_leaves_all_layers_as_they_are(message):
    pool, run = started(mamba2)
    slot = pool.allocate()
    frozen = copy.deepcopy(pool)
    with fwad.dual_level():
        first, second = rates()
        with pytest.raises((ValueError, TypeError), match=message):
            pool.materialize([first, UNUSABLE[message](second)], int(run.slots[0]), slot)
    assert same(pool, frozen)


def test_decays_are_a_sequence_or_one_tensor_of_all_layers_but_no_iterator():
    pool, run = started(mamba2)
    one, two = pool.allocate(), pool.allocate()
    A = torch.stack([rate[:, 0, 0] for rate in rates()])[..., None, None].expand(LAYERS, 2, 16, 64)
    pool.materialize(A, int(run.slots[0]), one)
    pool.materialize(rates(), int(run.slots[0]), two)
    same_bits(pool.state[:, one], pool.state[:, two])
    for wrong in (iter(rates()), 3, torch.tensor(1.0)):
        with pytest.raises(TypeError, match="A: expected one tensor for each of 2 layers, got "):
            pool.materialize(wrong, int(run.slots[0]), one)


# --------------------------------------------------------------------------------------------------------- other pools
@pytest.mark.parametrize("kind", POOLS)
def test_a_sequence_swapped_to_another_pool_and_back_continues_bit_for_bit(kind):
    """With other slots, after which the first ones are poisoned; seeds would stay with their pool."""
    make = POOLS[kind] if kind != "ring with seeds" else lambda: mamba2(state_dtype=torch.float16)
    pool, run = started(make)
    control, plain = started(make)
    store = make()
    parked = [store.allocate(), store.allocate()]
    source = run.slots[:2]
    pool.copy_slot(source, torch.tensor(parked), destination_pool=store)
    for tensor in pool._slotted().values():
        tensor[:, source] = NAN if tensor.dtype.is_floating_point else 77
    for slot in source.tolist():
        pool.free(slot)
    home = torch.tensor([pool.allocate(), pool.allocate()]).flip(0)
    store.copy_slot(torch.tensor(parked), home, destination_pool=pool)
    run.slots[:2] = home
    for number in range(7, 17):
        same_bits(run.step(number), plain.step(number))
    assert control is plain.pool


@pytest.mark.parametrize("history", ["ring", "double"])
@pytest.mark.parametrize("count", [None, 1])
def test_materialize_into_another_pool_is_that_into_another_slot(history, count):
    pool, run = started(lambda: mamba2(history=history, state_dtype=torch.float16))
    pool.conv_state[:, :, 0, -1] = 3.0
    source = run.slots[:2]
    assert pool.prev_num_accepted_tokens[source].min() >= 1
    options = {} if count is None else {"num_tokens": torch.tensor([count, count])}
    other = serving.StatePool.mamba2(
        LAYERS, 9, nheads=2, dim=16, dstate=64, window=5, tokens=2, state_dtype=torch.float16, history="double", **CONV
    )
    assert sorted(other.allocate() for _ in range(9)) == list(range(9))
    for tensor in other._tensors().values():
        tensor.fill_(7)
    frozen = memory(copy.deepcopy(pool)), memory(copy.deepcopy(other))
    there = torch.tensor([8, 6])
    pool.materialize(rates(), source, there, destination_pool=other, **options)
    each_same_bits(frozen[0], memory(pool), "the source changed")
    rest = [slot for slot in range(10) if slot not in (8, 6)]
    for name, tensor in other._tensors().items():
        old = frozen[1][name].view(tensor.dtype)
        axis = (slice(None), rest)
        same_bits(tensor[axis], old[axis], name)
        if name.startswith("history"):
            same_bits(tensor, old, name)
    here = torch.tensor([pool.allocate(), pool.allocate()])
    pool.materialize(rates(), source, here, **options)
    same_bits(other.state[:, there], pool.state[:, here])
    assert not other._cursors[:, there].any()
    kept = WIDTH - 1 + 2
    same_bits(other.conv_state[:, there], pool.conv_state[:, here, :, :kept])
    assert other.conv_state[:, there].any() == (count is None)


@pytest.mark.parametrize("out", [torch.float32, torch.int8])
def test_materialize_into_a_pool_of_another_type(out):
    pool, run = started(lambda: mamba2(state_dtype=torch.float16, seed=1))
    other = mamba2(state_dtype=out)
    exact = mamba2()
    for target in (other, exact):
        assert {target.allocate(), target.allocate()} == {0, 1}
        pool.materialize(rates(), run.slots[:2], torch.tensor([0, 1]), destination_pool=target)
    want = exact.state[:, :2]
    got = other.state[:, :2].float() * (1 if other.state_scale is None else other.state_scale[:, :2, ..., None])
    assert (got - want).abs().max() <= (0 if out is torch.float32 else want.abs().max() / 127) and want.any()


UNFIT = {
    "kind": lambda: gated(),
    "layers": lambda: serving.StatePool.mamba2(1, 5, nheads=2, dim=16, dstate=64, window=8, tokens=3, **CONV),
    "shape of a state": lambda: mamba2(dim=32),
    "conv_state": lambda: mamba2(conv_shape=None),
    "conv_state (dtype, channels, width)": lambda: mamba2(conv_shape=(CHANNELS, 3)),
}


@pytest.mark.parametrize("message", UNFIT)
def test_pools_that_do_not_fit(message):
    pool, other = mamba2(), UNFIT[message]()
    with pytest.raises(ValueError, match="destination_pool: ") as caught:
        pool.materialize(rates(), 0, 1, destination_pool=other)
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="destination_pool: "):
        pool.copy_slot(0, 1, destination_pool=other)
    with pytest.raises(ValueError, match="destination: expected distinct"):
        pool.materialize(rates(), torch.tensor([0, 1]), torch.tensor([2, 2]), destination_pool=mamba2())
    with pytest.raises(ValueError, match=r"destination: expected a slot in \[0, 6\)"):
        pool.copy_slot(0, 6, destination_pool=mamba2())
