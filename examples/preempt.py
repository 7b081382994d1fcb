"""Preempt a sequence and resume it; start several sequences from a cached prefix.

    python examples/preempt.py [--backend reference|emulate|cuda]

Between steps, a slot of a `StatePool` holds a state, the tokens accepted since that state was written, and cursors.
`copy_slot` copies all of it, to another slot or another pool, so that a sequence continues bit for bit. `materialize`
computes the state after a chosen token instead, which is what a prefix cache stores.
"""

import backends
import torch

import cute_ssm
from cute_ssm import serving

LAYERS, NHEADS, DIM, DSTATE, NGROUPS = 2, 16, 64, 128, 1
TOKENS, WINDOW = 2, 16
SIZES = dict(nheads=NHEADS, dim=DIM, dstate=DSTATE, ngroups=NGROUPS, window=WINDOW, tokens=TOKENS)


class Sequence:
    """The inputs of one sequence at all its steps, drawn in advance."""

    def __init__(self, device, steps, seed):
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape, dtype=torch.bfloat16):
            return torch.randn(steps, LAYERS, 1, TOKENS, *shape, dtype=dtype, device=device, generator=generator)

        self.x, self.dt = draw(NHEADS, DIM), draw(NHEADS, 1, dtype=torch.float32).expand(-1, -1, -1, -1, -1, DIM)
        self.B, self.C = draw(NGROUPS, DSTATE), draw(NGROUPS, DSTATE)


def step(pool, slot, sequence, number, A):
    """Run step `number` of a sequence, accept all its tokens, and return the outputs of the layers."""
    slots = torch.tensor([slot], device=pool.state.device)
    outputs = torch.empty_like(sequence.x[number])
    for layer in range(LAYERS):
        x, dt, B, C = (t[number, layer] for t in (sequence.x, sequence.dt, sequence.B, sequence.C))
        cute_ssm.checkpointing_ssu_ring(
            **pool.arguments(layer), x=x, dt=dt, A=A[layer], B=B, C=C, out=outputs[layer], dt_softplus=True,
            state_batch_indices=slots,
        )  # fmt: skip
    pool.commit(slots, torch.full((1,), TOKENS, device=slots.device))
    return outputs


def preempt_and_resume(pool, host_pool, A, device):
    """Swap a sequence out and in again; return its slots before and after, and its pending tokens."""
    sequence, other = Sequence(device, 12, seed=1), Sequence(device, 5, seed=2)

    # Without preemption.
    slot = pool.allocate()
    expected = [step(pool, slot, sequence, n, A) for n in range(12)]
    pool.free(slot)

    first = pool.allocate()  # the same, but swapped out after 5 steps
    outputs = [step(pool, first, sequence, n, A) for n in range(5)]
    pending = int(pool.prev_num_accepted_tokens[first])
    parked = host_pool.allocate()
    pool.copy_slot(first, parked, destination_pool=host_pool)
    pool.free(first)

    # Another sequence takes the slot.
    taken = pool.allocate()
    assert taken == first
    for n in range(5):
        step(pool, taken, other, n, A)

    # Resume in any free slot.
    second = pool.allocate()
    host_pool.copy_slot(parked, second, destination_pool=pool)
    host_pool.free(parked)
    outputs += [step(pool, second, sequence, n, A) for n in range(5, 12)]
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    pool.free(taken)
    pool.free(second)
    return first, second, pending


def share_a_prefix(pool, cache, A, device):
    """Cache the state after 8 tokens of a prompt of 10, and start two sequences from it."""
    prompt = Sequence(device, 5, seed=3)
    slot, entry = pool.allocate(), cache.allocate()
    for n in range(5):
        step(pool, slot, prompt, n, A)
    # All 10 tokens are still pending. Fold the first 8 of them, a whole number of blocks, into the cached state.
    pool.materialize(A, slot, entry, num_tokens=torch.tensor([8], device=device), destination_pool=cache)
    expected = step(pool, slot, Sequence(device, 1, seed=4), 0, A)  # the prompt goes on after its 10 tokens
    pool.free(slot)

    slots = [pool.allocate(), pool.allocate()]
    source, destination = torch.tensor([entry, entry], device=device), torch.tensor(slots, device=device)
    cache.copy_slot(source, destination, destination_pool=pool)
    outputs = []
    for slot in slots:  # each computes only the last 2 tokens of the prompt
        step(pool, slot, prompt, 4, A)
        outputs.append(step(pool, slot, Sequence(device, 1, seed=4), 0, A))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    # Not bit for bit like the prompt's own slot, which never stored the state after 8 tokens.
    torch.testing.assert_close(outputs[0], expected, rtol=2**-7, atol=2**-5)


def main():
    args = backends.parser(__doc__).parse_args()
    torch.manual_seed(0)
    with backends.use(args.backend) as device:
        A = [(-torch.rand(NHEADS, device=device) - 0.1)[:, None, None].expand(-1, DIM, DSTATE) for _ in range(LAYERS)]
        pool = serving.StatePool.mamba2(LAYERS, 4, **SIZES, device=device)
        host_pool = serving.StatePool.mamba2(LAYERS, 1, **SIZES, device="cpu")
        cache = serving.StatePool.mamba2(LAYERS, 2, **SIZES, device=device)
        first, second, pending = preempt_and_resume(pool, host_pool, A, device)
        share_a_prefix(pool, cache, A, device)
    print(f"preempt ({args.backend}): slot {first} to slot {second} through the host, with {pending} pending tokens")
    print("outputs equal those of a run without preemption bit for bit; two sequences started from one cached prefix")


if __name__ == "__main__":
    main()
