"""Mamba-2 decode: one token per step for a batch of sequences that own slots of a state pool.

    python examples/decode.py [--backend reference|emulate|cuda]

Shows how the tensors of a Mamba-2 layer are passed (one dt and one A per head, as expanded views), how sequences are
mapped to slots of the pool, and how rows that only fill the batch are marked as padding. The outputs are compared with
a plain float64 recurrence. Sizes are those of a layer of Mamba-2 2.7B.
"""

import backends
import torch

import cute_ssm

NHEADS, DIM, DSTATE, NGROUPS = 80, 64, 128, 1
SLOTS, STEPS = 8, 8
PADDING = -1  # the default of `pad_slot_id`


def recurrence(h, x, dt, B, C, A, D, dt_bias):
    """One token of Mamba-2 in the type of h, (batch, nheads, dim, dstate); returns the output and the new h."""
    dt = torch.nn.functional.softplus(dt + dt_bias)  # (batch, nheads)
    h = torch.exp(A * dt)[..., None, None] * h + torch.einsum("bh,bhp,bn->bhpn", dt, x, B[:, 0])
    return torch.einsum("bhpn,bn->bhp", h, C[:, 0]) + D[:, None] * x, h


def run(backend, device):
    # Weights: one number per head.
    A = -torch.rand(NHEADS, device=device) - 0.1
    D, dt_bias = torch.randn(2, NHEADS, device=device)

    # The operator takes the shapes of Mamba-1; stride 0 says that elements share a value, so nothing is copied.
    # Compute A before it is expanded: arithmetic on an expanded tensor returns a full one.
    A_view = A[:, None, None].expand(NHEADS, DIM, DSTATE)
    D_view, dt_bias_view = (t[:, None].expand(NHEADS, DIM) for t in (D, dt_bias))

    # The pool is updated in place. Three sequences use slots 5, 0 and 2; the fourth row only fills the batch.
    pool = torch.zeros(SLOTS, NHEADS, DIM, DSTATE, device=device)
    slots = torch.tensor([5, 0, 2, PADDING], dtype=torch.int32, device=device)
    batch, active = len(slots), slots != PADDING

    h = torch.zeros(int(active.sum()), NHEADS, DIM, DSTATE, dtype=torch.float64, device=device)
    error = 0.0
    for _ in range(STEPS):
        # One token of every row, as the projections and the convolution of a layer give it.
        x = torch.randn(batch, NHEADS, DIM, dtype=torch.bfloat16, device=device)
        B, C = torch.randn(2, batch, NGROUPS, DSTATE, dtype=torch.bfloat16, device=device)
        dt = torch.randn(batch, NHEADS, device=device)

        out = cute_ssm.selective_state_update(
            pool, x, dt[:, :, None].expand(x.shape), A_view, B, C, D=D_view, dt_bias=dt_bias_view, dt_softplus=True,
            state_batch_indices=slots,
        )  # fmt: skip

        inputs = [t[active].double() for t in (x, dt, B, C)]
        expected, h = recurrence(h, *inputs, A.double(), D.double(), dt_bias.double())
        torch.testing.assert_close(out[active].double(), expected, rtol=2**-8, atol=1e-4)  # out is bfloat16
        assert not out[~active].any(), "rows of padding are zero when `out` is not given"
        error = max(error, float(((out[active] - expected).abs() / expected.abs().max()).max()))

    torch.testing.assert_close(pool[slots[active].long()].double(), h, rtol=1e-4, atol=1e-4)
    assert not pool[[1, 3, 4, 6, 7]].any(), "slots that no row names are not touched"
    print(f"decode ({backend}): {STEPS} steps of {int(active.sum())} sequences and {int((~active).sum())} padding row")
    print(f"largest error {error:.1e} of the largest output; outputs are bfloat16")


def main():
    args = backends.parser(__doc__).parse_args()
    torch.manual_seed(0)
    with backends.use(args.backend) as device:
        run(args.backend, device)


if __name__ == "__main__":
    main()
