"""The token recurrence against its equations, and the chunk form against the recurrence."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from mdnbench.kernels.reference import chunk_mdn, recurrent_mdn


def definition(q, k, v, p, log_alpha, log_mu, beta, eta, initial_state, scale):
    """The four equations in NumPy, one head at a time, on inputs of one sequence without the batch dimension."""
    o = np.zeros_like(v)
    end = np.zeros_like(initial_state)
    for head in range(v.shape[1]):
        S, M = initial_state[:, head]
        shared = head // (v.shape[1] // q.shape[1])
        for t in range(v.shape[0]):
            alpha, mu = np.exp(log_alpha[t, head]), np.exp(log_mu[t, head])
            p_t, k_t, q_t = (x[t, shared] / np.sqrt((x[t, shared] ** 2).sum() + 1e-6) for x in (p, k, q))
            w = alpha * p_t @ S - v[t, head]
            M = mu * M + np.outer(eta[t, head] * k_t, w)
            S = alpha * S - beta[t, head] * M
            o[t, head] = scale * q_t @ S
        end[:, head] = S, M
    return o, end


def test_recurrence_follows_the_definition(make_inputs):
    inputs = make_inputs("resets_-inf", B=2, T=9, dtype=torch.float64)
    o, state = recurrent_mdn(**inputs, output_final_state=True)
    for b in range(2):
        one = {name: x.detach()[b].numpy() for name, x in inputs.items() if name != "initial_state"}
        expected = definition(**one, initial_state=inputs["initial_state"].detach()[:, b].numpy(), scale=16**-0.5)
        np.testing.assert_allclose(o[b].detach(), expected[0], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(state[:, b].detach(), expected[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("T", [1, 15, 64, 70, 257])
def test_float32_chunk_form_at_every_gate_profile(profile, T, make_inputs, evaluate, assert_close):
    inputs = make_inputs(profile, B=2 if T < 100 else 1, T=T)
    truth = evaluate(recurrent_mdn, inputs, torch.float64)
    for chunk_size in (16, 32, 64, 128):
        assert_close(evaluate(chunk_mdn, inputs, chunk_size=chunk_size), truth)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("p_times_alpha", [True, False])
@pytest.mark.parametrize("l2norm", [True, False])
def test_options(tied, p_times_alpha, l2norm, make_inputs, evaluate, assert_close):
    """In float64, where a wrong term cannot hide: agreement to rounding."""
    inputs = make_inputs("resets_-inf", B=2, dtype=torch.float64)
    if not l2norm:  # raw random keys would make the recurrence diverge
        inputs.update({name: inputs[name] * 0.2 for name in ("q", "k", "p")})
    inputs["p"] = None if tied else inputs["p"]
    options = {"use_p_times_alpha": p_times_alpha, "use_qk_l2norm_in_kernel": l2norm, "scale": 0.3}
    truth = evaluate(recurrent_mdn, inputs, **options)
    assert_close(evaluate(chunk_mdn, inputs, chunk_size=32, **options), truth, 1e-12, 1e-12, 1e-12)


def test_missing_gates_are_ones(make_inputs, evaluate, assert_close):
    inputs = make_inputs(dtype=torch.float64)
    ones = {**inputs, "beta": torch.ones_like(inputs["beta"]), "eta": torch.ones_like(inputs["eta"])}
    truth = evaluate(recurrent_mdn, ones)
    truth = {name: x for name, x in truth.items() if name not in ("dbeta", "deta")}
    for function in (recurrent_mdn, chunk_mdn):
        assert_close(evaluate(function, {**inputs, "beta": None, "eta": None}), truth, 1e-12, 1e-12, 1e-12)


@pytest.mark.parametrize("profile", ["mild", "resets_-inf", "mu_zero"], indirect=True)
def test_gradcheck(profile, make_inputs):
    """Against finite differences, over three chunks of which the last is short."""
    inputs = make_inputs(profile, T=5, H=1, HV=2, K=3, V=2, dtype=torch.float64)

    def function(*tensors):
        return chunk_mdn(**dict(zip(inputs, tensors)), output_final_state=True, chunk_size=2)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_packed_sequences_are_those_sequences(make_inputs, evaluate, assert_close):
    """Empty, one-token, short and long ones, each from its own initial state; in both forms."""
    bounds = [0, 0, 70, 71, 71, 112, 128, 128]
    inputs = make_inputs("resets_-inf", T=128, N=7, dtype=torch.float64)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    chunked = evaluate(chunk_mdn, inputs, cu_seqlens=cu_seqlens, chunk_size=16)
    assert_close(chunked, evaluate(recurrent_mdn, inputs, cu_seqlens=cu_seqlens), 1e-12, 1e-12, 1e-12)

    for n, (begin, end) in enumerate(pairwise(bounds)):
        start = inputs["initial_state"][:, n : n + 1]
        if begin == end:
            torch.testing.assert_close(chunked["final_state"][:, n : n + 1], start, rtol=0, atol=0)
            continue
        tokens = {name: x[:, begin:end] for name, x in inputs.items() if name != "initial_state"}
        o, state = chunk_mdn(**tokens, initial_state=start, output_final_state=True, chunk_size=16)
        torch.testing.assert_close(chunked["o"][:, begin:end], o)
        torch.testing.assert_close(chunked["final_state"][:, n : n + 1], state)


@pytest.mark.parametrize("function", [chunk_mdn, recurrent_mdn])
def test_two_halves_make_the_whole(function, make_inputs):
    """The final state of the first half is the initial state of the second; gradients flow through it."""
    inputs = make_inputs(T=100, dtype=torch.float64)
    tokens = {name: x for name, x in inputs.items() if name != "initial_state"}
    leaves = list(inputs.values())
    whole, end = function(**inputs, output_final_state=True)
    first, middle = function(
        **{name: x[:, :37] for name, x in tokens.items()},
        initial_state=inputs["initial_state"],
        output_final_state=True,
    )
    second, end_again = function(
        **{name: x[:, 37:] for name, x in tokens.items()}, initial_state=middle, output_final_state=True
    )
    halves = torch.cat((first, second), dim=1)
    torch.testing.assert_close(halves, whole)
    torch.testing.assert_close(end_again, end)
    weights = torch.randn_like(whole)
    grads = torch.autograd.grad((whole * weights).sum() + end.square().sum(), leaves)
    grads_again = torch.autograd.grad((halves * weights).sum() + end_again.square().sum(), leaves)
    for name, grad, again in zip(inputs, grads, grads_again):
        torch.testing.assert_close(again, grad, msg=name)


def test_without_momentum_it_is_the_gated_delta_rule(make_inputs):
    inputs = make_inputs(B=2, T=100, HV=2, dtype=torch.float64)
    q, k, v, log_alpha, eta = (inputs[name].detach() for name in ("q", "k", "v", "log_alpha", "eta"))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    S = torch.zeros(2, 2, 16, 24, dtype=torch.float64)
    expected = torch.empty_like(v)
    for t in range(100):
        S = log_alpha[:, t, :, None, None].exp() * S
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + eta[:, t, :, None, None] * torch.einsum("bhk,bhv->bhkv", k[:, t], error)
        expected[:, t] = 16**-0.5 * torch.einsum("bhk,bhkv->bhv", q[:, t], S)
    single = [x.float() for x in (q, k, v, log_alpha, torch.full_like(log_alpha, -torch.inf))]
    o, _ = chunk_mdn(*single, eta=eta.float(), use_qk_l2norm_in_kernel=False)
    assert (o - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype, make_inputs, evaluate, assert_close):
    """Only the rounding of results to the dtype of the inputs is left: 2^-9 for bfloat16."""
    inputs = {name: x.detach().to(dtype) for name, x in make_inputs().items()}
    computed = evaluate(chunk_mdn, inputs)
    assert {computed[name].dtype for name in ("o", "dq", "dv", "dlog_alpha", "dinitial_state")} == {dtype}
    assert computed["final_state"].dtype == torch.float32
    # Half-precision upstream gradients are what `evaluate` draws for half-precision outputs: give the truth the same.
    truth = evaluate(lambda **x: _as(dtype, *recurrent_mdn(**x)), inputs, torch.float64)
    rounding = torch.finfo(dtype).eps / 2
    assert_close(computed, truth, rounding, rounding)


def _as(dtype, o, state):
    """Results of the recurrence in the dtypes of the chunk form; gradients pass through the conversion unrounded."""
    return o + (o.to(dtype).double() - o).detach(), state.float()


@pytest.mark.parametrize("function", [chunk_mdn, recurrent_mdn])
def test_autocast_does_not_lower_the_precision(function, make_inputs, evaluate, assert_close):
    inputs = make_inputs()
    options = {"compute_dtype": torch.float32} if function is recurrent_mdn else {}

    def under_autocast(**arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return function(**arguments)

    assert_close(evaluate(under_autocast, inputs, **options), evaluate(function, inputs, **options), 0, 0, 0)


def test_parts_of_the_gradient(make_inputs):
    """A loss of the final state alone, or a gradient of one input alone, is that part of the whole."""
    inputs = make_inputs(T=40, dtype=torch.float64)
    leaves = list(inputs.values())
    for index in (0, 1):
        true = recurrent_mdn(**inputs, output_final_state=True)[index].square().sum()
        loss = chunk_mdn(**inputs, output_final_state=True, chunk_size=16)[index].square().sum()
        expected = torch.autograd.grad(true, leaves, allow_unused=True, materialize_grads=True)
        for name, grad, true_grad in zip(inputs, torch.autograd.grad(loss, leaves), expected):
            torch.testing.assert_close(grad, true_grad, msg=name)
    only_eta = {name: x.detach().requires_grad_(name == "eta") for name, x in inputs.items()}
    chunk_mdn(**only_eta, output_final_state=True)[1].square().sum().backward()
    torch.testing.assert_close(only_eta["eta"].grad, expected[list(inputs).index("eta")])
    assert all(x.grad is None for name, x in only_eta.items() if name != "eta")


def test_memory_kept_for_the_backward_pass(make_inputs):
    """Beyond its inputs, which the caller holds anyway, the chunk form keeps one float32 number for each of v."""
    inputs = {name: x.detach().to(torch.bfloat16).requires_grad_() for name, x in make_inputs(T=512).items()}
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        o, _ = chunk_mdn(**inputs)
    assert o.requires_grad
    input_bytes = sum(x.untyped_storage().nbytes() for x in inputs.values())
    assert sum(kept.values()) == input_bytes + 4 * inputs["v"].numel()


def test_second_derivatives_are_refused(make_inputs):
    inputs = make_inputs(T=5)
    o, _ = chunk_mdn(**inputs)
    with pytest.raises(RuntimeError, match="differentiable once: call without create_graph=True"):
        torch.autograd.grad(o.sum(), inputs["q"], create_graph=True)
