import math

import pytest
import torch

from mdnbench.baselines.recurrence import (
    decay_matrix,
    decay_to_end,
    group_heads,
    merge_chunks,
    run_tokens,
    split_chunks,
)


@pytest.mark.parametrize("seq_len", [1, 16, 37])
def test_merging_undoes_splitting(seq_len):
    x = torch.randn(2, seq_len, 3, 5).bfloat16()
    chunks = split_chunks(x, 16)
    assert chunks.shape == (math.ceil(seq_len / 16), 6, 16, 5)
    assert chunks.dtype == torch.float32
    assert torch.equal(merge_chunks(chunks, 2, seq_len, torch.bfloat16), x)
    assert chunks.count_nonzero() == x.count_nonzero()  # the padding is zero


def test_decay_matrix_is_exact_after_resets():
    log_decay = torch.tensor([-0.5, -math.inf, -0.25, -20.0, -0.125, 0.0], requires_grad=True)
    decay = decay_matrix(log_decay)
    expected = torch.zeros(6, 6)
    for i in range(6):
        for j in range(i + 1):
            expected[i, j] = math.exp(sum(log_decay[l].item() for l in range(j + 1, i + 1)))
    torch.testing.assert_close(decay, expected, rtol=1e-6, atol=0)
    decay.sum().backward()
    assert log_decay.grad.isfinite().all()
    assert torch.equal(decay_to_end(log_decay, 0), decay[-1])


def test_value_heads_read_the_heads_of_their_group():
    x = torch.arange(3.0).reshape(1, 1, 3, 1)
    assert group_heads(x, 6).flatten().tolist() == [0, 0, 1, 1, 2, 2]


def test_segments_do_not_change_gradients():
    # 200 tokens are four segments; the recurrence s <- a s + x has the closed form that is compared with.
    a, x = torch.rand(2, 200, dtype=torch.float64), torch.randn(2, 200, dtype=torch.float64)
    a.requires_grad_(), x.requires_grad_()

    def step(state, a_t, x_t):
        state = a_t * state + x_t
        return state.square(), state

    output = run_tokens(step, x.new_zeros(2), (a, x))
    states = []
    for t in range(200):
        states.append(a[:, t] * (states[-1] if states else 0) + x[:, t])
    expected = torch.stack(states, 1).square()
    torch.testing.assert_close(output, expected)
    for gradient, other in zip(torch.autograd.grad(output.sum(), (a, x)), torch.autograd.grad(expected.sum(), (a, x))):
        torch.testing.assert_close(gradient, other)
