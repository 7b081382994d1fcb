"""Run kernels in the PTX emulator: check a call, read its counters, and see what a finding looks like.

    python examples/emulate.py [--arch sm_90a|sm_100a|sm_103a]

No GPU is needed or used. `ptxsim` executes the PTX that the compiler made for the target, thread by thread. `racecheck`
reports accesses that no barrier orders, `initcheck` reads of shared memory that nothing wrote, and `counters` counts
instructions and traffic. Memory faults and deadlocks are always reported.

The second half runs a small CuTe DSL kernel twice, the second time without its barrier, and prints the finding.
"""

import argparse

import cutlass
import cutlass.cute as cute
import torch
from cutlass.cute.runtime import make_fake_tensor
from cutlass.memory import SmemAllocator

import cute_ssm
import ptxsim

BATCH, NHEADS, DIM, DSTATE = 2, 8, 64, 128
THREADS = 128


def check_an_operator(arch):
    """Call an operator on CPU tensors inside a session, and return the text of its counters."""
    x = torch.randn(BATCH, NHEADS, DIM, dtype=torch.bfloat16)
    dt = torch.randn(BATCH, NHEADS, 1).expand(x.shape)
    A = (-torch.rand(NHEADS, 1, 1)).expand(-1, DIM, DSTATE)
    B, C = torch.randn(2, BATCH, 1, DSTATE, dtype=torch.bfloat16)
    state = torch.randn(BATCH, NHEADS, DIM, DSTATE)

    expected_state, late_state = state.clone(), state.clone()
    expected = cute_ssm.selective_state_update(expected_state, x, dt, A, B, C, dt_softplus=True)  # the reference

    with ptxsim.emulate(arch=arch, racecheck=True, initcheck=True, counters=True) as session:
        out = cute_ssm.selective_state_update(state, x, dt, A, B, C, dt_softplus=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(state, expected_state)

    # Asynchronous copies finish at once by default. These options delay them to the last legal moment and shuffle the
    # order of threads; a correct kernel gives the same bits.
    with ptxsim.emulate(arch=arch, async_mode="late", schedule=1):
        late = cute_ssm.selective_state_update(late_state, x, dt, A, B, C, dt_softplus=True)
    torch.testing.assert_close((late, late_state), (out, state), rtol=0, atol=0)
    return session.launches[-1].counters.table()


class Reverse:
    """out[i] = x[THREADS - 1 - i]: each thread stores to shared memory what another one loads."""

    def __init__(self, barrier):
        self.barrier = barrier

    @cute.jit
    def __call__(self, x: cute.Tensor, out: cute.Tensor):
        self.kernel(x, out).launch(grid=[1, 1, 1], block=[THREADS, 1, 1])

    @cute.kernel
    def kernel(self, x: cute.Tensor, out: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        shared = SmemAllocator().allocate_tensor(cutlass.Float32, cute.make_layout(THREADS), 16)
        shared[thread] = x[thread]
        if cutlass.const_expr(self.barrier):
            cute.arch.sync_threads()
        out[thread] = shared[THREADS - 1 - thread]


def run_reverse(arch, barrier):
    fakes = [make_fake_tensor(cutlass.Float32, (THREADS,), (1,), assumed_align=16) for _ in range(2)]
    kernel = ptxsim.compile(Reverse(barrier), *fakes, arch=arch)
    x, out = torch.randn(THREADS), torch.zeros(THREADS)
    with ptxsim.emulate(arch=arch, racecheck=True, initcheck=True):
        kernel(x, out)
    torch.testing.assert_close(out, x.flip(0), rtol=0, atol=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=("sm_90a", "sm_100a", "sm_103a"), default="sm_90a")
    args = parser.parse_args()
    torch.manual_seed(0)

    print(check_an_operator(args.arch))
    run_reverse(args.arch, barrier=True)
    try:
        run_reverse(args.arch, barrier=False)
    except ptxsim.RaceError as finding:
        print(f"\nThe small kernel without its barrier:\n{type(finding).__name__}: {finding}")
    else:
        raise AssertionError("racecheck did not report the missing barrier")


if __name__ == "__main__":
    main()
