import math

import pytest
import torch

from mdnbench.baselines import attention, gdn, kda, mamba2, mdn
from mdnbench.baselines.inputs import GATE_PROFILES, GATES, distinct_profiles, make_inputs, truth_of
from mdnbench.baselines.provider import Operator
from mdnbench.baselines.registry import OPERATORS
from mdnbench.baselines.workload import Workload

WORKLOAD = Workload(seq_len=300, head_dim_k=8, head_dim_v=12, batch=2, heads=2, value_heads=4)
GATES_OF = Operator("gates", "Gates", GATES, lambda w, inputs: {g: inputs[g] for g in GATES}, lambda w, i: i["beta"])


def gates(profile: str, seed: int = 0) -> dict[str, torch.Tensor]:
    return make_inputs(GATES_OF, WORKLOAD.with_(gates=profile), seed, requires_grad=False)[0]


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_inputs_are_seeded_leaves(operator):
    inputs, d_output = make_inputs(operator, WORKLOAD, seed=5)
    again, d_again = make_inputs(operator, WORKLOAD.with_(chunk_size=16), seed=5)
    other, _ = make_inputs(operator, WORKLOAD, seed=6)
    assert torch.equal(d_output, d_again)
    assert d_output.shape == (2, 300, 4, 12)
    for name, x in inputs.items():
        assert x.is_leaf
        assert x.requires_grad
        assert x.is_contiguous()
        assert torch.equal(x, again[name])
        assert name == "A" or not torch.equal(x, other[name])  # Mamba-2's A is -1
    assert not any(x.requires_grad for x in make_inputs(operator, WORKLOAD, 5, requires_grad=False)[0].values())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gates_stay_in_float32(dtype):
    inputs, d_output = make_inputs(mdn.OPERATOR, WORKLOAD.with_(dtype=dtype), seed=0)
    expected = getattr(torch, dtype)
    assert {inputs[x].dtype for x in "qkv"} == {d_output.dtype} == {expected}
    assert {inputs[x].dtype for x in GATES} == {torch.float32}
    assert inputs["q"].shape == (2, 300, 2, 8)
    assert inputs["v"].shape == (2, 300, 4, 12)
    assert {tuple(inputs[x].shape) for x in GATES} == {(2, 300, 4)}
    assert abs(inputs["q"].float().mean()) < 0.05
    assert abs(inputs["q"].float().std() - 1) < 0.05


def test_operators_and_profiles_share_what_they_do_not_change():
    mild, _ = make_inputs(mdn.OPERATOR, WORKLOAD, seed=0)
    of_gdn, _ = make_inputs(gdn.OPERATOR, WORKLOAD, seed=0)
    reset, _ = make_inputs(mdn.OPERATOR, WORKLOAD.with_(gates="reset=-20"), seed=0)
    assert all(torch.equal(mild[name], x) for name, x in of_gdn.items())
    changed = {name for name, x in reset.items() if not torch.equal(x, mild[name])}
    assert changed == {"log_alpha"}
    is_reset = reset["log_alpha"] == -20
    assert torch.equal(reset["log_alpha"][~is_reset], mild["log_alpha"][~is_reset])


@pytest.mark.parametrize("profile", GATE_PROFILES)
def test_profiles_change_what_they_say_within_range(profile):
    drawn, mild = gates(profile), gates("mild")
    assert {name for name in GATES if not torch.equal(drawn[name], mild[name])} == set(GATE_PROFILES[profile].changes)
    for name in ("log_alpha", "log_mu"):
        assert not drawn[name].isnan().any()
        assert (drawn[name] <= 0).all()
    assert ((drawn["beta"] >= 0) & (drawn["beta"] <= 1)).all()
    assert ((drawn["eta"] >= 0) & (drawn["eta"] <= 2)).all()


@pytest.mark.parametrize("value", [-20.0, -math.inf])
def test_resets_are_rare_and_there(value):
    share = float((gates(f"reset={value:g}")["log_alpha"] == value).float().mean())
    assert 0.03 < share < 0.07


def test_constant_profiles_are_constant():
    for profile, gate, value in (
        ("log_mu=-inf", "log_mu", -math.inf),
        ("log_mu=0", "log_mu", 0.0),
        ("log_alpha=-5", "log_alpha", -5.0),
        ("alpha=1", "log_alpha", 0.0),
        ("beta=1e-5", "beta", 1e-5),
        ("eta=2", "eta", 2.0),
    ):
        assert (gates(profile)[gate] == torch.tensor(value)).all()
    assert set(gates("log_mu=0/-2")["log_mu"].unique().tolist()) == {0.0, -2.0}


def test_layer_gates_obey_the_stable_gating():
    drawn = gates("layer")
    assert drawn["log_mu"].min() >= -2
    # beta < sin^2(theta) and alpha <= cos^2(theta) of the same theta.
    assert (drawn["beta"] + drawn["log_alpha"].exp() < 1).all()
    assert abs(drawn["eta"].mean() - 1) < 0.01  # e / tau is small at the start


def test_distinct_profiles_are_those_that_an_operator_sees():
    assert distinct_profiles(mdn.OPERATOR) == list(GATE_PROFILES)
    assert distinct_profiles(attention.OPERATOR) == ["mild"]
    assert distinct_profiles(mamba2.OPERATOR) == [
        "mild", "log_alpha=-5", "reset=-20", "reset=-inf", "alpha=1", "layer",
    ]  # fmt: skip
    assert distinct_profiles(gdn.OPERATOR) == [name for name in GATE_PROFILES if not name.startswith(("log_mu", "eta"))]


def test_unknown_profile_names_the_near_ones():
    with pytest.raises(ValueError, match=r"gates='reset=20' is unknown: choose .*reset=-20"):
        make_inputs(gdn.OPERATOR, WORKLOAD.with_(gates="reset=20"), seed=0)


def test_kda_channels_keep_infinite_decays():
    inputs, _ = make_inputs(kda.OPERATOR, WORKLOAD.with_(gates="reset=-inf"), seed=0)
    log_alpha = inputs["log_alpha"]
    assert log_alpha.shape == (2, 300, 4, 8)
    assert torch.equal(log_alpha.isinf().any(-1), log_alpha.isinf().all(-1))
    assert log_alpha.isinf().any()
    assert len(log_alpha[0, 0, 0].unique()) == 8


def test_mamba2_decays_as_the_profile_says():
    inputs, _ = make_inputs(mamba2.OPERATOR, WORKLOAD, seed=0)
    torch.testing.assert_close(inputs["dt"] * inputs["A"], gates("mild")["log_alpha"])
    for profile in ("reset=-inf", "alpha=1"):
        with pytest.raises(ValueError, match="Mamba-2 writes with the same step that decays"):
            make_inputs(mamba2.OPERATOR, WORKLOAD.with_(gates=profile), seed=0)


@pytest.mark.parametrize("operator", [gdn.OPERATOR, mamba2.OPERATOR], ids=lambda operator: operator.name)
def test_truth_of_a_batch_is_that_of_its_sequences(operator):
    workload = WORKLOAD.with_(seq_len=20, batch=3)
    inputs, d_output = make_inputs(operator, workload, seed=0)
    output, gradients = truth_of(operator, workload, inputs, d_output)
    whole = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected = operator.truth(workload, whole)
    torch.testing.assert_close(output, expected.detach())
    for name, gradient in zip(whole, torch.autograd.grad(expected, list(whole.values()), d_output.double())):
        assert gradients[name].dtype == torch.float64
        torch.testing.assert_close(gradients[name], gradient)
