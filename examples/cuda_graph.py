"""Capture a speculative decode step in a CUDA graph and replay it with other slots, inputs and accepted tokens.

    python examples/cuda_graph.py               # needs a GPU
    python examples/cuda_graph.py --emulate     # without one: the same step, not captured, in the emulator

The captured step is `build_work_items`, all layers, and `commit`. Cursors, slots and the list of work lie on the
device, so one graph serves every step: capture it once per batch size, and pad smaller batches. The same steps,
launched one by one on a second pool, must give the same bits; emulated, they are compared with the reference.
"""

import argparse

import backends
import torch

import cute_ssm
from cute_ssm import serving

LAYERS, NHEADS, DIM, DSTATE, NGROUPS = 2, 16, 64, 128, 1
BATCH, SLOTS, TOKENS, WINDOW, STEPS = 4, 8, 4, 16, 8


class Step:
    """A step of the model on buffers of fixed addresses: fill them, then call."""

    def __init__(self, device, A):
        self.A = A
        self.pool = serving.StatePool.mamba2(
            LAYERS, SLOTS, nheads=NHEADS, dim=DIM, dstate=DSTATE, window=WINDOW, tokens=TOKENS, device=device
        )
        self.x, self.out = torch.zeros(2, LAYERS, BATCH, TOKENS, NHEADS, DIM, dtype=torch.bfloat16, device=device)
        self.dt = torch.zeros(LAYERS, BATCH, TOKENS, NHEADS, 1, device=device)
        self.B, self.C = torch.zeros(2, LAYERS, BATCH, TOKENS, NGROUPS, DSTATE, dtype=torch.bfloat16, device=device)
        self.slots = torch.full((BATCH,), self.pool.pad_slot_id, dtype=torch.int32, device=device)
        self.accepted = torch.zeros(BATCH, dtype=torch.int32, device=device)
        self.work_items = torch.zeros(BATCH, 4, dtype=torch.int32, device=device)
        self.num_writes = torch.zeros(1, dtype=torch.int32, device=device)

    def fill(self, slots, accepted, generator):
        """Copy what changes between steps into the buffers; rows beyond the batch become padding."""
        self.slots.fill_(self.pool.pad_slot_id)
        self.slots[: len(slots)].copy_(torch.tensor(slots))
        self.accepted.zero_()
        self.accepted[: len(accepted)].copy_(torch.tensor(accepted))
        for tensor in (self.x, self.dt, self.B, self.C):
            tensor.normal_(generator=generator)

    def __call__(self):
        """All of this can be captured: no synchronisation, no allocation, no value read on the host."""
        self.pool.build_work_items(self.slots, work_items=self.work_items, num_writes=self.num_writes)
        for layer in range(LAYERS):
            cute_ssm.checkpointing_ssu_ring(
                **self.pool.arguments(layer), x=self.x[layer], dt=self.dt[layer].expand(self.x[layer].shape),
                A=self.A[layer], B=self.B[layer], C=self.C[layer], out=self.out[layer], dt_softplus=True,
                state_batch_indices=self.slots, work_items=self.work_items, num_writes=self.num_writes,
            )  # fmt: skip
        self.pool.commit(self.slots, self.accepted)  # an engine computes the numbers on the device before this


def captured(step):
    """Return a function that replays the step."""
    step()  # compiles, which a capture does not allow; all rows are still padding, so the pool stays as it is
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def emulated(step):
    """Return a function that runs the step in the emulator."""

    def run():
        with backends.use("emulate"):
            step()

    return run


def compare(device, step, run, expected_step, **tolerance):
    """Run both steps on the same inputs, `step` by `run`; return how many states a layer wrote."""
    own = [step.pool.allocate() for _ in range(BATCH)]
    assert own == [expected_step.pool.allocate() for _ in range(BATCH)]
    writes = 0
    for number in range(STEPS):
        batch = BATCH - number % 2  # a sequence pauses in every second step
        accepted = torch.randint(1, TOKENS + 1, (batch,)).tolist()
        for each in (step, expected_step):
            each.fill(own[:batch], accepted, torch.Generator(device).manual_seed(number))
        run()
        expected_step()
        torch.testing.assert_close(step.out, expected_step.out, **tolerance)
        writes += int(step.num_writes)
    torch.testing.assert_close(step.pool.state, expected_step.pool.state, **tolerance)
    assert torch.equal(step.pool.prev_num_accepted_tokens, expected_step.pool.prev_num_accepted_tokens)
    return writes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulate", action="store_true", help="run the step uncaptured, in the emulator")
    args = parser.parse_args()
    if not args.emulate and not torch.cuda.is_available():
        raise SystemExit("CUDA graphs need a GPU, and PyTorch finds none; use --emulate to run the step uncaptured")
    torch.manual_seed(0)
    device = torch.device("cpu" if args.emulate else "cuda")
    A = (-torch.rand(LAYERS, NHEADS, device=device) - 0.1)[:, :, None, None].expand(-1, -1, DIM, DSTATE)
    step, expected_step = Step(device, A), Step(device, A)
    if args.emulate:
        writes = compare(device, step, emulated(step), expected_step, rtol=2**-7, atol=2**-5)
        how, expected = "run in the emulator, not captured", "the reference, within rounding"
    else:
        writes = compare(device, step, captured(step), expected_step, rtol=0, atol=0)
        how, expected = "replayed from one CUDA graph", "the same steps launched one by one, bit for bit"
    print(f"cuda_graph: {STEPS} steps {how}; {writes} states written per layer")
    print(f"outputs, states and cursors equal those of {expected}")


if __name__ == "__main__":
    main()
