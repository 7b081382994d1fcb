"""Speculative decoding of Mamba-2 layers: verify drafted tokens without writing a state per token.

    python examples/speculate.py [--backend reference|emulate|cuda]

Each step computes the outputs of the last token and of its drafts. The state in the pool stays as it is: the inputs of
accepted tokens collect in a ring, and the state is written when the ring cannot hold another step. Rejected drafts
leave no trace, because the next step overwrites them. The loop is that of a serving engine: `build_work_items`, the
layers, acceptance, `commit`. Outputs and final states are compared with decoding token by token.

There is no language model here: the inputs of the right tokens are drawn in advance, a wrong draft has random inputs,
and a draft is right with probability 0.7.
"""

import backends
import torch

import cute_ssm
from cute_ssm import serving

LAYERS, NHEADS, DIM, DSTATE, NGROUPS = 2, 16, 64, 128, 1
BATCH, LENGTH = 3, 40  # sequences, and the tokens of each
TOKENS, WINDOW = 4, 16  # the last token and 3 drafts in a step; accepted tokens that the ring can hold between steps


class Layer:
    """The weights of a layer, and its inputs at the right tokens, (BATCH, LENGTH, ...)."""

    def __init__(self, device):
        self.A = (-torch.rand(NHEADS, device=device) - 0.1)[:, None, None].expand(NHEADS, DIM, DSTATE)
        D, dt_bias = torch.randn(2, NHEADS, 1, device=device).expand(-1, -1, DIM)
        self.weights = dict(A=self.A, D=D, dt_bias=dt_bias, dt_softplus=True)
        self.x = torch.randn(BATCH, LENGTH, NHEADS, DIM, dtype=torch.bfloat16, device=device)
        self.dt = torch.randn(BATCH, LENGTH, NHEADS, 1, device=device)
        self.B, self.C = torch.randn(2, BATCH, LENGTH, NGROUPS, DSTATE, dtype=torch.bfloat16, device=device)

    def inputs(self, positions, right):
        """Return x, dt, B and C at positions (BATCH, n) of each sequence, random where a draft is not right."""
        rows = torch.arange(BATCH, device=positions.device)[:, None]
        taken = (t[rows, positions] for t in (self.x, self.dt, self.B, self.C))
        x, dt, B, C = (torch.where(right[:, :, None, None], t, torch.randn_like(t)) for t in taken)
        return dict(x=x, dt=dt.expand(x.shape), B=B, C=C)


def token_by_token(layers, device):
    """Return outputs, (LAYERS, BATCH, LENGTH, NHEADS, DIM), and final states without speculation."""
    outputs = torch.empty(LAYERS, BATCH, LENGTH, NHEADS, DIM, dtype=torch.bfloat16, device=device)
    states = torch.zeros(LAYERS, BATCH, NHEADS, DIM, DSTATE, device=device)
    right = torch.ones(BATCH, 1, dtype=torch.bool, device=device)
    for position in range(LENGTH):
        for layer, state, out in zip(layers, states, outputs):
            inputs = layer.inputs(torch.full((BATCH, 1), position, device=device), right)
            out[:, position] = cute_ssm.selective_state_update(state, **inputs, **layer.weights)[:, 0]
    return outputs, states


def speculate(layers, device):
    """Return the same, and the numbers of steps and of states written per layer."""
    pool = serving.StatePool.mamba2(
        LAYERS, BATCH, nheads=NHEADS, dim=DIM, dstate=DSTATE, ngroups=NGROUPS, window=WINDOW, tokens=TOKENS,
        device=device,
    )  # fmt: skip
    owned = torch.tensor([pool.allocate() for _ in range(BATCH)], device=device)
    outputs = torch.empty(LAYERS, BATCH, LENGTH, NHEADS, DIM, dtype=torch.bfloat16, device=device)
    done = torch.zeros(BATCH, dtype=torch.int64, device=device)  # accepted tokens of each sequence
    columns = torch.arange(TOKENS, device=device)
    steps = writes = 0
    while bool((done < LENGTH).any()):
        # A sequence that has ended stays in the batch as padding, as in an engine with fixed batch sizes.
        slots = torch.where(done < LENGTH, owned, pool.pad_slot_id)
        positions = done[:, None] + columns
        drafts = torch.rand(BATCH, TOKENS, device=device) < 0.7
        right = (drafts | (columns == 0)) & (positions < LENGTH)  # the first token of a step is no draft

        # One list for all layers: the rows of the batch, those first whose step will write the state.
        work_items, num_writes = pool.build_work_items(slots)
        step_outputs = []
        for index, layer in enumerate(layers):
            inputs = layer.inputs(positions.clamp(max=LENGTH - 1), right)
            out = torch.empty_like(inputs["x"])
            cute_ssm.checkpointing_ssu_ring(
                **pool.arguments(index), **inputs, **layer.weights, out=out, state_batch_indices=slots,
                work_items=work_items, num_writes=num_writes,
            )  # fmt: skip
            step_outputs.append(out)

        # Accept the tokens before the first wrong draft; one launch advances the cursors of all layers.
        accepted = right.cumprod(dim=1).sum(dim=1)
        pool.commit(slots, accepted)

        row, column = (columns < accepted[:, None]).nonzero(as_tuple=True)
        outputs[:, row, positions[row, column]] = torch.stack(step_outputs)[:, row, column]
        done += accepted
        steps, writes = steps + 1, writes + int(num_writes)

    # Fold the accepted tokens that are still in the rings into the states, in place.
    pool.materialize([layer.A for layer in layers], owned, owned)
    return outputs, pool.state[:, owned], steps, writes


def main():
    args = backends.parser(__doc__).parse_args()
    torch.manual_seed(0)
    with backends.use(args.backend) as device:
        layers = [Layer(device) for _ in range(LAYERS)]
        expected, expected_states = token_by_token(layers, device)
        outputs, states, steps, writes = speculate(layers, device)
    # Outputs up to 110, bfloat16; the kernel's tensor cores read a float32 state with 11 significant bits.
    torch.testing.assert_close(outputs, expected, rtol=2**-7, atol=2**-5)
    torch.testing.assert_close(states, expected_states, rtol=1e-4, atol=1e-4)
    total = BATCH * LENGTH
    print(f"speculate ({args.backend}): {total} tokens of {BATCH} sequences in {steps} steps instead of {LENGTH}")
    print(f"{writes} states written per layer instead of {total}; same outputs and final states")


if __name__ == "__main__":
    main()
