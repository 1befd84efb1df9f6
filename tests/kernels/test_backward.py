"""The backward kernels against gradients of the operator in float64: interpreted on the CPU, as they are on a GPU."""

import functools

import pytest
import torch
from kernel_cases import (
    DEVICE,
    FEATURES,
    FROM_BOTH_ENDS,
    LIMITS,
    SMALL,
    ZERO,
    awkward,
    by_name,
    case_of,
    equal,
    gradient_checker,
    inputs_of,
    options_of,
    poisoned,
)

from mdnbench.kernels import backward, forward
from mdnbench.kernels.chunk import chunk_triton
from mdnbench.kernels.launch import Launch
from mdnbench.kernels.reference import recurrent_mdn

# In the interpreter NumPy sees what the kernels mask afterwards: decays of the future, above the diagonal.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
FORWARD_KERNELS = ["gates_fwd_kernel", "prepare_fwd_kernel", "scan_fwd_kernel"]
NO_GRADIENT_KERNELS = ["prepare_fwd_kernel", "scan_bwd_kernel"]


def through_kernels(save_memory=False, **arguments):
    """The public function less its checks, which lead to the kernels on a GPU alone; chunks of 16 by default."""
    return by_name(functools.partial(chunk_triton, save_memory=save_memory), chunk_size=16)(**arguments)


@pytest.fixture
def check_gradients(evaluate, assert_close):
    return gradient_checker(evaluate, assert_close, through_kernels, recurrent_mdn)


# Of several value tiles or sequences too many to interpret; on a GPU they are tested.
MANY_PROGRAMS = ("largest V", "packed", "packed, chunks of 16", "packed, many short")


@pytest.mark.parametrize("feature", [name for name in FEATURES if name not in MANY_PROGRAMS])
def test_features(feature, make_inputs, check_gradients):
    check_gradients(*case_of(feature, torch.float32, make_inputs, T=20))


@pytest.mark.parametrize("feature", ["free p", "tied p", "no L2 norm", "packed, tied p, no initial state"])
def test_features_in_float16(feature, make_inputs, check_gradients):
    check_gradients(*case_of(feature, torch.float16, make_inputs))


@pytest.mark.parametrize(("T", "chunk_size"), [(1, 16), (15, 16), (63, 32), (65, 64), (130, 64), (130, 128)])
def test_lengths(T, chunk_size, make_inputs, check_gradients):
    dtype = torch.float16 if chunk_size == 128 else torch.float32
    inputs = inputs_of(make_inputs, "layer", dtype, {**SMALL, "T": T})
    check_gradients(inputs, options_of({"chunk_size": chunk_size}))


def test_gate_profiles(profile, make_inputs, check_gradients):
    """Of three chunks. Behind a beta of 0 what is 0 in truth is exactly 0."""
    inputs = inputs_of(make_inputs, profile, torch.float32, SMALL)
    check_gradients(inputs, options_of({}), zero_error=0 if profile == "beta_zero" else ZERO)


def test_gates_of_zero(make_inputs, check_gradients):
    """alpha, mu and beta 0 in turn and together, at the ends of chunks and within.

    A log gate of -inf has no gradient, a beta of 0 has.
    """
    inputs = inputs_of(make_inputs, "layer", torch.float32, SMALL, ("p",))
    for gate, zero, tokens in (
        ("log_alpha", float("-inf"), [0, 7, 16, 31, 39]),
        ("log_mu", float("-inf"), [0, 8, 15, 31, 32]),
        ("beta", 0.0, [0, 8, 9, 17, 31]),
    ):
        inputs[gate][:, tokens] = zero
    computed = check_gradients(inputs, options_of({}))
    for gate in ("log_alpha", "log_mu"):
        assert (computed[f"d{gate}"][inputs[gate].isinf()] == 0).all()
    assert (computed["dbeta"][inputs["beta"] == 0] != 0).any()


@pytest.mark.parametrize("arriving", FROM_BOTH_ENDS)
@pytest.mark.parametrize("free_p", [True, False], ids=["free p", "tied p"])
def test_gradients_that_arrive_at_one_end(arriving, free_p, make_inputs, check_gradients):
    inputs = inputs_of(make_inputs, "layer", torch.float32, {**SMALL, "T": 20}, () if free_p else ("p",))
    computed = check_gradients(inputs, options_of({}), arriving=(arriving,))
    assert (arriving == "o") == computed["dq"].any()


def test_a_final_state_that_nothing_is_done_with(make_inputs, evaluate):
    """Changes no bit of the gradients that come from the output."""
    inputs = inputs_of(make_inputs, "layer", torch.float32, {**SMALL, "T": 17})
    without = evaluate(through_kernels, inputs, arriving=("o",), output_final_state=False)
    computed = evaluate(through_kernels, inputs, arriving=("o",))
    assert equal(without, {name: computed[name] for name in without})


# H and HV: a single part of the value heads; two and one of them; one and a half groups each.
@pytest.mark.parametrize(("H", "HV"), [(1, 1), (1, 3), (2, 6)])
def test_less_memory_gives_the_same(H, HV, make_inputs, evaluate):
    """Bit for bit, since nothing but when it is computed differs."""
    inputs = inputs_of(
        make_inputs, "layer", torch.float32, {**SMALL, "T": 17 if HV == 1 else 5, "H": H, "HV": HV}, ("p",)
    )
    assert equal(
        poisoned(lambda: evaluate(through_kernels, inputs, save_memory=True)), evaluate(through_kernels, inputs)
    )


def test_less_memory_of_packed_sequences(make_inputs, check_gradients):
    inputs = inputs_of(make_inputs, "layer", torch.float32, {**SMALL, "T": 22, "N": 4, "HV": 2})
    check_gradients(inputs, options_of({"cu_seqlens": [0, 0, 17, 18, 22], "save_memory": True}))


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels, as they are launched."""
    names = []

    def call(launch, *tensors):
        names.append(launch.kernel.fn.__name__)
        original(launch, *tensors)

    original = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", call)
    return names


@pytest.mark.parametrize("name", ["q", "k", "v", "p", "log_alpha", "log_mu", "beta", "eta", "initial_state"])
def test_gradient_of_one_input_alone(name, launched, make_inputs, evaluate):
    """As beside the others, and no kernel launched that it does not need."""
    inputs = inputs_of(make_inputs, "layer", torch.float32, {**SMALL, "T": 20})
    expected = evaluate(through_kernels, inputs)[f"d{name}"]
    launched.clear()
    alone = poisoned(lambda: evaluate(through_kernels, inputs, wanted=[name]))[f"d{name}"]
    torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-6)
    if name in ("v", "initial_state"):
        assert launched == FORWARD_KERNELS + NO_GRADIENT_KERNELS
    else:
        assert ("gates_bwd_kernel" in launched) == (name in ("log_alpha", "log_mu", "beta", "eta"))


def test_nothing_wanted_is_nothing_kept(launched, make_inputs):
    inputs = inputs_of(make_inputs, "layer", torch.float32, {**SMALL, "T": 20})
    o, state = through_kernels(**inputs, **options_of({}))
    assert not o.requires_grad
    assert not state.requires_grad
    assert launched == FORWARD_KERNELS


NO_STATES = {"output_final_state": False}
BOTH, NEITHER = ["forward", "backward"], []


@pytest.mark.parametrize(
    ("sizes", "left_out", "options", "wanted", "expected"),
    [
        ({}, ("p", "initial_state"), NO_STATES, None, BOTH),
        ({}, ("initial_state",), NO_STATES, None, BOTH),
        ({"N": 2}, ("p", "initial_state"), {**NO_STATES, "cu_seqlens": [0, 9, 20]}, None, NEITHER),
        ({"HV": 2}, ("p", "initial_state"), NO_STATES, None, NEITHER),
        ({}, ("p", "initial_state", "beta"), NO_STATES, None, NEITHER),
        ({}, ("p", "initial_state", "eta"), NO_STATES, None, NEITHER),
        ({}, ("p",), NO_STATES, None, NEITHER),
        ({}, ("p", "initial_state"), {**NO_STATES, "use_qk_l2norm_in_kernel": False}, None, NEITHER),
        ({}, ("p", "initial_state"), {**NO_STATES, "use_p_times_alpha": False}, None, NEITHER),
        ({}, ("p", "initial_state"), {"output_final_state": True}, None, ["backward"]),
        ({}, ("p", "initial_state"), {**NO_STATES, "save_memory": True}, None, ["forward"]),
        ({}, ("p", "initial_state"), NO_STATES, ["q", "k", "v"], ["forward"]),
    ],
)
def test_stored_configurations_serve_the_calls_that_they_were_checked_in(
    sizes, left_out, options, wanted, expected, make_inputs, evaluate, monkeypatch
):
    asked = []
    for module in (forward, backward):
        monkeypatch.setattr(module, "tuned_config", lambda direction, *arguments: asked.append(direction))
    inputs = inputs_of(make_inputs, "layer", torch.float32, {**SMALL, "T": 20, **sizes}, left_out)
    evaluate(through_kernels, inputs, arriving=("o",), wanted=wanted, **options_of(options))
    assert asked == expected
    asked.clear()
    with torch.no_grad():
        through_kernels(**inputs, **options_of(options))
    assert asked == [direction for direction in expected if direction == "forward"]


@pytest.mark.parametrize(("HV", "parts"), [(1, 1), (2, 2), (3, 2)])
def test_value_heads_are_in_halves_when_memory_is_saved(HV, parts, launched, make_inputs, evaluate):
    """The larger half first."""
    inputs = inputs_of(make_inputs, "layer", torch.float32, {**SMALL, "T": 5, "HV": HV})
    for save_memory, times in ((False, 1), (True, parts)):
        launched.clear()
        evaluate(through_kernels, inputs, save_memory=save_memory)
        assert launched.count("scan_bwd_kernel") == launched.count("gradients_bwd_kernel") == times


def test_strides_and_dtypes(make_inputs, check_gradients):
    """As in the forward: any strides, gates in float16 or float64, a float16 state; gradients in the same dtypes."""
    inputs = inputs_of(make_inputs, "layer", torch.float16, {**SMALL, "T": 20, "H": 2, "HV": 2, "N": 3})
    inputs = awkward(inputs)
    bounds = torch.tensor([0, 9, 17, 9, 17, 9, 20], dtype=torch.int32, device=DEVICE)[::2]
    check_gradients(inputs, {"output_final_state": True, "cu_seqlens": bounds})


def test_gradients_that_arrive_expanded_or_transposed(make_inputs):
    """As those of a sum and of a product with head-major numbers do."""
    inputs = inputs_of(make_inputs, "layer", torch.float32, {**SMALL, "T": 17})
    grads = []
    for function in (through_kernels, recurrent_mdn):
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        o, state = function(**leaves, **options_of({}))
        head_major = torch.linspace(-1, 1, o.numel(), device=DEVICE).view_as(o.transpose(1, 2))
        loss = o.sum() + state.sum() + (o.transpose(1, 2) * head_major).sum()
        sum_alone = torch.autograd.grad(o.sum() + state.sum(), list(leaves.values()), retain_graph=True)
        grads.append([*sum_alone, *torch.autograd.grad(loss, list(leaves.values()))])
    for got, expected in zip(*grads):
        assert (got - expected).norm() <= LIMITS[torch.float32]["gradient_error"] * expected.norm()


@pytest.mark.parametrize("save_memory", [False, True])
def test_the_same_bits_again(save_memory, make_inputs):
    """From a graph that is kept, which the first pass must leave as it was, and from a call of its own."""
    inputs = inputs_of(make_inputs, "mild", torch.float32, {**SMALL, "T": 17})
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    grads = []
    for _ in range(2):
        o, state = through_kernels(**leaves, **options_of({"save_memory": save_memory}))
        loss = o.square().sum() + state.square().sum()
        grads += [torch.autograd.grad(loss, list(leaves.values()), retain_graph=True) for _ in range(2)]
    for again in grads[1:]:
        assert all(torch.equal(x, y) for x, y in zip(again, grads[0]))


@pytest.mark.parametrize("gate", ["log_alpha", "log_mu", "beta", "eta"])
def test_a_gate_that_is_nan_shows(gate, make_inputs, evaluate):
    """In the gradients of its token and of those before it."""
    inputs = inputs_of(make_inputs, "layer", torch.float32, {**SMALL, "T": 20})
    inputs[gate][:, 17] = float("nan")
    computed = evaluate(through_kernels, inputs)
    for name in ("dv", "dk", "dlog_alpha", "dlog_mu", "dbeta", "deta"):
        assert computed[name][:, :18].isnan().all()


def test_chunks_that_do_not_fit_are_refused_by_the_forward(make_inputs):
    """Where the backward needs more shared memory than an H200 has; without gradients the forward runs."""
    inputs = inputs_of(make_inputs, "layer", torch.float32, {**SMALL, "T": 5, "K": 64})
    through_kernels(**inputs, chunk_size=128)
    inputs["v"].requires_grad_()
    with pytest.raises(
        ValueError, match=r"chunk_size=128 with K=64 .* in the backward pass .* use a smaller chunk_size"
    ):
        through_kernels(**inputs, chunk_size=128)
