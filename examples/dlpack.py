"""Call an operator on NumPy and JAX arrays, exchanged by DLPack.

    python examples/dlpack.py [--backend reference|emulate]

What is copied and what is not:

- Operators take arrays as they are, and write `state` and `out` in place. Nothing is copied.
- They return tensors, which any library takes back without a copy: `numpy.from_dlpack(tensor)`.
- JAX arrays are immutable, and JAX assumes that no one writes their memory. Inputs can be shared. Copy what an operator
  writes, `torch.from_dlpack(array).clone()`, and pass the result back to JAX, which again copies nothing.
- NumPy has no bfloat16; use float16 or float32, or reinterpret 16-bit integers: `tensor.view(torch.bfloat16)`.

NumPy arrays lie on the CPU, where operators run as the reference or in the emulator. JAX arrays on a GPU stay there:
the same code then runs the compiled kernel.
"""

import backends
import numpy
import torch

import cute_ssm

BATCH, NHEADS, DIM, DSTATE = 2, 8, 64, 128


def draw():
    """Return the arrays of a step by name; one dt and one A per head."""
    rng = numpy.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=numpy.float32)

    return dict(
        state=normal(BATCH, NHEADS, DIM, DSTATE), x=normal(BATCH, NHEADS, DIM), dt=normal(BATCH, NHEADS),
        A=-numpy.exp(normal(NHEADS)), B=normal(BATCH, 1, DSTATE), C=normal(BATCH, 1, DSTATE),
    )  # fmt: skip


def update(state, x, dt, A, B, C, expand, out=None):
    """Run the operator. One dt and one A per head are views with strides of 0, which `expand` makes."""
    dt, A = expand(dt[:, :, None], x.shape), expand(A[:, None, None], (NHEADS, DIM, DSTATE))
    return cute_ssm.selective_state_update(state, x, dt, A, B, C, dt_softplus=True, out=out)


def plain(state, x, dt, A, B, C):
    """The same step in NumPy; returns the output and the new state."""
    dt = numpy.log1p(numpy.exp(dt))
    state = numpy.exp(A * dt)[..., None, None] * state + (dt[..., None] * x)[..., None] * B[:, :, None, :]
    return numpy.einsum("bhpn,bn->bhp", state, C[:, 0]), state


def from_numpy(arrays, expected, expected_state):
    out = numpy.empty_like(arrays["x"])
    update(**arrays, expand=numpy.broadcast_to, out=out)

    # `out` and `state` were written in place: the arrays hold the results.
    numpy.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    numpy.testing.assert_allclose(arrays["state"], expected_state, rtol=1e-5, atol=1e-5)

    # A result that the operator allocated goes back without a copy too.
    result = update(**arrays, expand=numpy.broadcast_to)
    assert numpy.from_dlpack(result).ctypes.data == result.data_ptr(), "no copy"


def from_jax(arrays, expected, expected_state):
    import jax

    before = {name: jax.numpy.array(array) for name, array in arrays.items()}
    state = torch.from_dlpack(before["state"]).clone()  # the operator writes it
    # JAX has no views with strides of 0; PyTorch makes them of shared memory
    shared = {name: torch.from_dlpack(before[name]) for name in ("dt", "A")}
    assert shared["dt"].data_ptr() == before["dt"].unsafe_buffer_pointer(), "no copy"
    out = update(**{**before, **shared, "state": state}, expand=torch.Tensor.expand)
    after, new_state = jax.numpy.from_dlpack(out), jax.numpy.from_dlpack(state)

    numpy.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-4)
    numpy.testing.assert_allclose(new_state, expected_state, rtol=1e-5, atol=1e-5)
    numpy.testing.assert_array_equal(before["state"], arrays["state"])  # JAX's own array has not changed


def main():
    parser = backends.parser(__doc__, choices=("reference", "emulate"))
    args = parser.parse_args()
    arrays = draw()
    expected, expected_state = plain(**arrays)
    with backends.use(args.backend):
        try:
            from_jax(arrays, expected, expected_state)
            jax = "JAX arrays: inputs shared, the state copied, results shared"
        except ModuleNotFoundError as error:
            if error.name != "jax":
                raise
            jax = "JAX is not installed: that part was left out"
        from_numpy(arrays, expected, expected_state)  # last, as it writes arrays["state"]
    print(f"dlpack ({args.backend}): NumPy arrays in and out without a copy, state updated in place")
    print(jax)


if __name__ == "__main__":
    main()
