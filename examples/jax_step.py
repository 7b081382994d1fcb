"""Call an operator inside `jax.jit`, by JAX's foreign function interface and TVM-FFI.

    pip install jax jax-tvm-ffi
    python examples/jax_step.py

The operator runs where the arrays are: on a GPU the compiled kernel, on JAX's stream; on the CPU the reference. The
state is an input that JAX gives up (`donate_argnums`) and an output that takes its place (`input_output_aliases`), so
it is updated in place, though to JAX every array is immutable.
"""

import argparse

BATCH, TOKENS, HEADS, VALUE_HEADS, K, V = 2, 3, 1, 2, 64, 64
TARGET = "cute_ssm.gated_delta_rule_mtp"


def register(platform):
    """Make the operator a target of JAX's calls."""
    import jax_tvm_ffi
    import torch
    import tvm_ffi

    import cute_ssm

    def step(q, k, v, _, slots, A_log, a, dt_bias, b, output, state):
        # the argument `_` and the result `state` are one buffer; JAX has no views, so nothing else needs to be said
        with torch.no_grad():
            cute_ssm.gated_delta_rule_mtp(
                q, k, v, state, slots, A_log, a, dt_bias, b, output=output, disable_state_update=False
            )

    jax_tvm_ffi.register_ffi_target(
        TARGET, tvm_ffi.convert(step), ["args", "rets"], platform=platform, pass_owned_tensor=True
    )


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        import jax
        import jax.numpy as jnp

        register("gpu" if jax.default_backend() == "gpu" else "cpu")
    except ModuleNotFoundError as error:
        if error.name not in ("jax", "jax_tvm_ffi"):
            raise
        print(f"{error.name} is not installed: nothing was run")
        return

    def step(state, q, k, v, slots, A_log, a, dt_bias, b):
        output = jax.ShapeDtypeStruct(v.shape, q.dtype)
        call = jax.ffi.ffi_call(
            TARGET, (output, jax.ShapeDtypeStruct(state.shape, state.dtype)), input_output_aliases={3: 1}
        )
        return call(q, k, v, state, slots, A_log, a, dt_bias, b)

    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape, dtype=jnp.float32):
        return jax.random.normal(next(keys), shape).astype(dtype)

    half = jnp.bfloat16
    q, k = (normal(BATCH, TOKENS, HEADS, K, dtype=half) for _ in "qk")
    v, state = normal(BATCH, TOKENS, VALUE_HEADS, V, dtype=half), normal(BATCH, VALUE_HEADS, V, K)
    a, b = (normal(BATCH, TOKENS, VALUE_HEADS, dtype=half) for _ in "ab")
    A_log, dt_bias = normal(VALUE_HEADS), normal(VALUE_HEADS)
    rest = (q, k, v, jnp.arange(BATCH, dtype=jnp.int32), A_log, a, dt_bias, b)
    want, new = plain(jnp, state, *rest)
    address = state.unsafe_buffer_pointer()
    output, state = jax.jit(step, donate_argnums=0)(state, *rest)
    assert state.unsafe_buffer_pointer() == address, "updated in place"
    assert jnp.abs(output - want).max() < 2**-7 * jnp.abs(want).max()
    assert jnp.abs(state - new).max() < 1e-5 * jnp.abs(new).max()
    print(f"jax_step ({jax.default_backend()}): {TOKENS} tokens of {BATCH} requests in jax.jit, state updated in place")


def plain(jnp, state, q, k, v, _, A_log, a, dt_bias, b):
    """The same in JAX, token by token: the outputs and the new states."""
    q, k, v, a, b = (x.astype(jnp.float32) for x in (q, k, v, a, b))
    q, k = (x / jnp.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    q, k = (jnp.repeat(x, VALUE_HEADS // HEADS, axis=2) for x in (q * K**-0.5, k))
    decay = jnp.exp(-jnp.exp(A_log) * jnp.logaddexp(0, a + dt_bias))
    beta, outputs = 1 / (1 + jnp.exp(-b)), []
    for t in range(TOKENS):
        state = state * decay[:, t, :, None, None]
        error = v[:, t] - jnp.einsum("bhvk,bhk->bhv", state, k[:, t])
        state = state + (beta[:, t, :, None] * error)[..., None] * k[:, t, :, None]
        outputs.append(jnp.einsum("bhvk,bhk->bhv", state, q[:, t]))
    return jnp.stack(outputs, 1), state


if __name__ == "__main__":
    main()
