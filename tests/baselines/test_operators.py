"""Identities between operators, which hold whatever the truths say: they catch an error that both sides share."""

import pytest
import torch
import torch.nn.functional as F

from mdnbench.baselines import attention, gdn, kda, mamba2, mdn
from mdnbench.baselines.inputs import make_inputs, truth_of
from mdnbench.baselines.recurrence import l2_normalise
from mdnbench.baselines.workload import Workload
from mdnbench.kernels.reference import recurrent_mdn

WORKLOAD = Workload(seq_len=150, head_dim_k=32, head_dim_v=48, batch=2, heads=2, value_heads=4, chunk_size=32)


def relative(x, y):
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("gates", ["mild", "reset=-inf", "alpha=1", "layer"])
def test_mdn_without_momentum_is_gdn(gates):
    inputs, d_output = make_inputs(mdn.OPERATOR, WORKLOAD.with_(gates=gates), seed=3)
    inputs["log_mu"] = torch.full_like(inputs["log_mu"], -torch.inf)
    inputs["beta"] = torch.ones_like(inputs["beta"])
    as_gdn = {name: inputs[name] for name in ("q", "k", "v", "log_alpha")} | {"beta": inputs["eta"]}
    leaves = list(as_gdn.values())
    output = mdn.MdnTorch().build(WORKLOAD, inputs)()
    expected = gdn.GdnTorch().build(WORKLOAD, as_gdn)()
    assert relative(output, expected) < 1e-5
    for gradient, other in zip(
        torch.autograd.grad(output, leaves, d_output), torch.autograd.grad(expected, leaves, d_output)
    ):
        assert relative(gradient, other) < 1e-5


def test_kda_with_equal_channels_is_gdn():
    inputs, _ = make_inputs(gdn.OPERATOR, WORKLOAD.with_(gates="reset=-20"), seed=3)
    per_channel = inputs | {"log_alpha": inputs["log_alpha"].unsqueeze(-1).expand(-1, -1, -1, 32)}
    output = kda.KdaTorch().build(WORKLOAD, per_channel)()
    assert relative(output, gdn.GdnTorch().build(WORKLOAD, inputs)()) < 1e-5


def test_kda_reads_each_channel_by_its_own_decay():
    # Keys and queries on one channel only: that channel's decay is then a GDN's, whatever the other channels do.
    inputs, _ = make_inputs(kda.OPERATOR, WORKLOAD, seed=3, requires_grad=False)
    channel = 5
    for name in "qk":
        inputs[name] = F.one_hot(torch.tensor(channel), 32).float() * inputs[name]
    output = kda.KdaTorch().build(WORKLOAD, inputs)()
    one_channel = inputs | {"log_alpha": inputs["log_alpha"][..., channel].contiguous()}
    assert relative(output, gdn.GdnTorch().build(WORKLOAD, one_channel)()) < 1e-5


def test_mamba2_without_decay_is_causal_linear_attention():
    inputs, _ = make_inputs(mamba2.OPERATOR, WORKLOAD, seed=3, requires_grad=False)
    inputs["A"] = torch.zeros_like(inputs["A"])
    inputs["dt"] = torch.ones_like(inputs["dt"])
    b, c = (inputs[name].repeat_interleave(2, dim=2) for name in "BC")
    scores = torch.einsum("bthk,bshk->bhts", c.double(), b.double()).tril()
    expected = torch.einsum("bhts,bshv->bthv", scores, inputs["x"].double())
    assert relative(mamba2.Mamba2Torch().build(WORKLOAD, inputs)(), expected) < 1e-5


def test_gdn_without_overlapping_keys_is_linear_attention():
    # Orthonormal keys predict nothing of each other's values, so that the delta rule only adds.
    workload = Workload(seq_len=32, head_dim_k=32, head_dim_v=16, heads=1, chunk_size=16)
    inputs, _ = make_inputs(gdn.OPERATOR, workload, seed=3, requires_grad=False)
    inputs["k"] = torch.eye(32).reshape(1, 32, 1, 32)
    inputs["log_alpha"] = torch.zeros_like(inputs["log_alpha"])
    scores = l2_normalise(inputs["q"][0, :, 0]).tril() * 32**-0.5  # q_t . k_s is the s-th entry of q_t
    expected = scores @ (inputs["beta"][0, :, 0, None] * inputs["v"][0, :, 0])
    # The eps of the normalisation makes a unit key shorter by 5e-7.
    assert relative(gdn.GdnTorch().build(workload, inputs)()[0, :, 0], expected) < 1e-5


def test_attention_truth_is_softmax_of_seen_tokens():
    workload = Workload(seq_len=600, head_dim_k=8, head_dim_v=4, heads=2, value_heads=4, chunk_size=None)
    inputs, d_output = make_inputs(attention.OPERATOR, workload, seed=3)
    output, _ = truth_of(attention.OPERATOR, workload, inputs, d_output)
    for t, head in ((0, 0), (255, 1), (256, 2), (599, 3)):
        q, k, v = (inputs[x].detach().double()[0] for x in "qkv")
        weights = (k[: t + 1, head // 2] @ q[t, head // 2] * 8**-0.5).softmax(0)
        torch.testing.assert_close(output[0, t, head], weights @ v[: t + 1, head])


def test_mdn_truth_is_the_definition_in_one_piece():
    inputs, d_output = make_inputs(mdn.OPERATOR, WORKLOAD, seed=3)
    output, gradients = truth_of(mdn.OPERATOR, WORKLOAD, inputs, d_output)
    whole = recurrent_mdn(**inputs)[0]
    torch.testing.assert_close(output, whole.detach(), rtol=1e-12, atol=1e-12)
    for gradient, other in zip(
        gradients.values(), torch.autograd.grad(whole, list(inputs.values()), d_output.double())
    ):
        torch.testing.assert_close(gradient.float(), other, rtol=1e-5, atol=1e-6)
