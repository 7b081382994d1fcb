"""Speculative decoding of a gated delta net layer, with and without a state written per token.

    python examples/gated_delta_net.py [--backend reference|emulate|cuda]

Two ways to verify drafted tokens and continue from the accepted ones:

1. `gated_delta_rule_mtp` with `intermediate_states_buffer`: every step stores the state after each of its tokens, and
   the engine picks the one after the last accepted token.
2. `gated_delta_rule_replay` with `StatePool.gated_delta`: keys, values and gates of accepted tokens collect in a ring,
   and the state is written about once per `window` tokens.

Both are compared with decoding token by token. Sizes are those of Qwen3-Next, with a quarter of its heads. As in
speculate.py, tokens are drawn in advance, and a draft is right with probability 0.7.
"""

import backends
import torch

import cute_ssm
from cute_ssm import serving

HEADS, VALUE_HEADS, K, V = 4, 8, 128, 128
BATCH, LENGTH = 2, 24
TOKENS, WINDOW = 4, 16  # tokens of a step, the first of them no draft; most accepted tokens in the ring


def draw_tokens(device):
    """Return q, k, v, a and b of all right tokens, (BATCH, LENGTH, heads, ...)."""

    def draw(*shape):
        return torch.randn(BATCH, LENGTH, *shape, dtype=torch.bfloat16, device=device)

    return dict(q=draw(HEADS, K), k=draw(HEADS, K), v=draw(VALUE_HEADS, V), a=draw(VALUE_HEADS), b=draw(VALUE_HEADS))


def new_tokens(stream, done):
    """Return the inputs of a step after `done` tokens of each sequence, and how many of its tokens will be accepted."""
    rows, columns = torch.arange(BATCH, device=done.device)[:, None], torch.arange(TOKENS, device=done.device)
    positions = done[:, None] + columns
    right = ((torch.rand(BATCH, TOKENS, device=done.device) < 0.7) | (columns == 0)) & (positions < LENGTH)
    inputs = {name: values[rows, positions.clamp(max=LENGTH - 1)] for name, values in stream.items()}
    for values in inputs.values():
        values[~right] = torch.randn_like(values[~right])
    return inputs, right.cumprod(dim=1).sum(dim=1)


def collect(outputs, output, done, accepted):
    """Store the outputs of accepted tokens, and advance `done`."""
    for row, (start, count) in enumerate(zip(done.tolist(), accepted.tolist())):
        outputs[row, start : start + count] = output[row, :count]
    done += accepted


def token_by_token(stream, gates, state, slots):
    state_arguments = dict(initial_state=state, initial_state_indices=slots, disable_state_update=False)
    outputs = []
    for t in range(LENGTH):
        inputs = {name: values[:, t : t + 1] for name, values in stream.items()}
        outputs.append(cute_ssm.gated_delta_rule_mtp(**inputs, **gates, **state_arguments)[0])
    return torch.cat(outputs, dim=1)


def with_intermediate_states(stream, gates, state, slots, outputs):
    """The engine copies the state after the last accepted token from the buffer to the pool."""
    buffer = torch.empty(BATCH, TOKENS, VALUE_HEADS, V, K, device=slots.device)
    done = torch.zeros_like(slots)
    while bool((done < LENGTH).any()):
        inputs, accepted = new_tokens(stream, done)
        active = torch.where(done < LENGTH, slots, -1)  # -1: padding
        output, _ = cute_ssm.gated_delta_rule_mtp(
            **inputs, **gates, initial_state=state, initial_state_indices=active, intermediate_states_buffer=buffer,
            disable_state_update=True,
        )  # fmt: skip
        row = (accepted > 0).nonzero()[:, 0]
        state[slots[row]] = buffer[row, accepted[row] - 1]
        collect(outputs, output, done, accepted)


def with_replay(stream, gates, pool, slots, outputs):
    """The engine advances cursors; returns how many states the steps wrote."""
    done, writes = torch.zeros_like(slots), 0
    while bool((done < LENGTH).any()):
        inputs, accepted = new_tokens(stream, done)
        active = torch.where(done < LENGTH, slots, pool.pad_slot_id)
        writes += int(((pool.prev_num_accepted_tokens[slots] + TOKENS > WINDOW) & (done < LENGTH)).sum())
        arguments = pool.arguments(0)
        output, _ = cute_ssm.gated_delta_rule_replay(**inputs, **gates, **arguments, initial_state_indices=active)
        pool.commit(active, accepted)
        collect(outputs, output, done, accepted)
    pool.materialize(None, slots, slots)  # fold the tokens that are still in the rings; decays are part of the ring
    return writes


def main():
    args = backends.parser(__doc__).parse_args()
    torch.manual_seed(0)
    with backends.use(args.backend) as device:
        A_log, dt_bias = torch.randn(2, VALUE_HEADS, device=device)
        gates = dict(A_log=A_log, dt_bias=dt_bias)
        stream = draw_tokens(device)
        pool = serving.StatePool.gated_delta(
            1, BATCH, heads=HEADS, value_heads=VALUE_HEADS, K=K, V=V, window=WINDOW, tokens=TOKENS, device=device
        )
        slots = torch.tensor([pool.allocate() for _ in range(BATCH)], device=device)
        states = torch.zeros(2, BATCH, VALUE_HEADS, V, K, device=device)
        expected = token_by_token(stream, gates, states[0], slots)
        outputs = torch.zeros(2, *expected.shape, dtype=expected.dtype, device=device)
        with_intermediate_states(stream, gates, states[1], slots, outputs[0])
        writes = with_replay(stream, gates, pool, slots, outputs[1])
    for output, state in ((outputs[0], states[1]), (outputs[1], pool.state[0, slots])):
        torch.testing.assert_close(output, expected, rtol=2**-7, atol=1e-4)
        torch.testing.assert_close(state, states[0], rtol=1e-4, atol=1e-5)
    print(f"gated delta net ({args.backend}): {BATCH * LENGTH} tokens; both ways equal decoding token by token")
    print(f"steps of gated_delta_rule_replay wrote {writes} states, instead of {BATCH * LENGTH}")


if __name__ == "__main__":
    main()
