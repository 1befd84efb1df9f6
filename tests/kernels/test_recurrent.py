"""The decoding kernel against the recurrence in float64: interpreted on the CPU, as it is on a GPU."""

import pytest
import torch
from kernel_cases import (
    DEVICE,
    REAL,
    awkward,
    by_name,
    check,
    compile_launches,
    gpu,
    inputs_of,
    options_of,
    poisoned,
)

from mdnbench.kernels import fused_recurrent_momentum_delta_rule
from mdnbench.kernels.recurrent import RecurrentConfig, default_config, recurrent_forward, recurrent_triton
from mdnbench.kernels.reference import recurrent_mdn

through_operators = by_name(recurrent_triton, inplace=False)
SMALL = {"B": 1, "T": 5, "H": 1, "HV": 2, "K": 16, "V": 24}

# name -> (changes to SMALL, names of inputs left out, options)
FEATURES = {
    "free p": ({}, (), {}),
    "tied p": ({}, ("p",), {}),
    "tied p, not decayed": ({}, ("p",), {"use_p_times_alpha": False}),
    "free p, not decayed": ({}, (), {"use_p_times_alpha": False}),
    "no L2 norm": ({"K": 8}, (), {"use_qk_l2norm_in_kernel": False}),
    "no beta": ({}, ("beta",), {}),
    "no beta, eta, p": ({}, ("beta", "eta", "p"), {}),
    "no initial state": ({}, ("initial_state",), {}),
    "no final state": ({}, (), {"output_final_state": False}),
    "no state at all": ({}, ("initial_state",), {"output_final_state": False}),
    "scale": ({}, (), {"scale": 2}),
    "one token": ({"B": 2, "T": 1}, (), {}),
    "one token, no initial state": ({"B": 2, "T": 1}, ("initial_state",), {}),
    "two sequences": ({"B": 2, "T": 3}, (), {}),
    "three value heads a head": ({"H": 2, "HV": 6, "T": 2}, (), {}),
    "as many value heads as heads": ({"H": 2, "HV": 2, "T": 2}, (), {}),
    "sizes that are no power of two": ({"K": 20, "V": 33}, (), {}),
    "largest K": ({"K": 256, "V": 16, "T": 2}, (), {}),
    "largest V": ({"K": 16, "V": 512, "T": 2, "HV": 1}, (), {}),
    "packed": ({"T": 6, "N": 6, "HV": 1}, (), {"cu_seqlens": [0, 0, 3, 4, 4, 6, 6]}),
    "packed, no initial state": ({"T": 4, "N": 3, "HV": 1}, ("initial_state",), {"cu_seqlens": [0, 2, 2, 4]}),
    "packed, one token": ({"T": 1, "N": 3, "HV": 1}, (), {"cu_seqlens": [0, 0, 1, 1]}),
}


@pytest.mark.parametrize(("dtype", "o_error"), [(torch.float32, 2e-6), (torch.float16, 6e-4)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature, dtype, o_error, make_inputs):
    changes, left_out, options = FEATURES[feature]
    inputs = inputs_of(make_inputs, "layer", dtype, {**SMALL, **changes}, left_out)
    options = options_of(options)
    computed = poisoned(recurrent_forward, **inputs, **options, config=RecurrentConfig(BV=32, num_warps=2))
    check(computed, inputs, options, o_error)


def test_gate_profiles(profile, make_inputs):
    inputs = inputs_of(make_inputs, profile, torch.float32, {**SMALL, "T": 8, "HV": 1})
    options = options_of({})
    check(poisoned(recurrent_forward, **inputs, **options), inputs, options, 2e-6)


@pytest.mark.parametrize("config", [RecurrentConfig(8, 1), RecurrentConfig(16, 4), RecurrentConfig(64, 2), None])
def test_configurations_give_the_same(config, make_inputs):
    inputs = inputs_of(make_inputs, "mild", torch.float32, {**SMALL, "V": 40, "T": 2})
    options = options_of({})
    check(poisoned(recurrent_forward, **inputs, **options, config=config), inputs, options, 2e-6)


def test_default_configuration():
    assert default_config(128, 128, 1024) == RecurrentConfig(32, 4)
    assert default_config(128, 128, 16) == RecurrentConfig(16, 2)  # 128 programs
    assert default_config(256, 512, 1) == RecurrentConfig(8, 2)
    assert default_config(16, 16, 1024) == RecurrentConfig(16, 1)
    assert default_config(100, 33, 1024) == RecurrentConfig(32, 4)


def test_strides_and_dtypes_of_states_and_gates(make_inputs):
    """Head-major tensors, gates cut out of one projection or in float16 or float64, a state in float16."""
    inputs = inputs_of(make_inputs, "layer", torch.float16, {**SMALL, "H": 2})
    inputs = awkward(inputs)
    options = options_of({})
    check(poisoned(recurrent_forward, **inputs, **options), inputs, options, 6e-4)


def test_steps_in_place_give_the_whole_sequence(make_inputs):
    """One token at a time, the state overwritten; the pass over all tokens at once gives the same bits."""
    inputs = inputs_of(make_inputs, "layer", torch.float32, SMALL)
    whole_o, whole_state = recurrent_forward(**inputs, output_final_state=True)
    state = inputs.pop("initial_state").clone()
    for t in range(SMALL["T"]):
        token = {name: x[:, t : t + 1] for name, x in inputs.items()}
        o, final_state = recurrent_forward(**token, initial_state=state, output_final_state=True, inplace=True)
        assert final_state is state
        torch.testing.assert_close(o, whole_o[:, t : t + 1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state, whole_state, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("left_out", [(), ("p", "beta", "eta", "initial_state")], ids=["all", "optional left out"])
def test_gradients(left_out, make_inputs, evaluate, assert_close):
    inputs = inputs_of(make_inputs, "mild", torch.float32, {**SMALL, "T": 3}, left_out)
    assert_close(evaluate(through_operators, inputs), evaluate(recurrent_mdn, inputs, torch.float64))


def test_gradients_of_packed_sequences(make_inputs, evaluate, assert_close):
    inputs = inputs_of(make_inputs, "mild", torch.float32, {**SMALL, "T": 3, "N": 3})
    options = {"cu_seqlens": torch.tensor([0, 2, 2, 3], device=DEVICE)}
    assert_close(
        evaluate(through_operators, inputs, **options), evaluate(recurrent_mdn, inputs, torch.float64, **options)
    )


def test_gradient_of_one_input_alone(make_inputs):
    """The final state does not depend on q, so that no gradient arrives by it; a loss without the state is another."""
    inputs = inputs_of(make_inputs, "mild", torch.float32, {**SMALL, "T": 2})
    for name, keep_state in (("q", True), ("k", False)):
        grads = []
        for function in (through_operators, recurrent_mdn):
            leaf = inputs[name].clone().requires_grad_()
            o, _ = function(**{**inputs, name: leaf}, output_final_state=keep_state)
            grads.append(torch.autograd.grad(o.sum(), leaf)[0].float())
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_registration(inplace, make_inputs):
    """The schema, the shapes foretold, and the autograd formula, also when traced."""
    inputs = inputs_of(make_inputs, "mild", torch.float32, {**SMALL, "T": 1, "HV": 1})
    state = inputs.pop("initial_state")
    order = ("q", "k", "v", "log_alpha", "log_mu", "p", "beta", "eta")
    tensors = [inputs[name].requires_grad_(not inplace) for name in order]
    if inplace:
        operator, arguments = torch.ops.mdnbench.recurrent_mdn_inplace, (*tensors, None, state, None, True, True)
    else:
        operator, arguments = torch.ops.mdnbench.recurrent_mdn, (*tensors, None, state, True, None, True, True)
    torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("inplace", [False, True])
def test_compile_keeps_a_call_whole(inplace, make_inputs):
    inputs = inputs_of(make_inputs, "layer", torch.float32, {**SMALL, "T": 1, "HV": 1})
    start = inputs["initial_state"].clone()
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    function = fused_recurrent_momentum_delta_rule if DEVICE == "cuda" else through_operators
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    computed = compiled(**inputs, output_final_state=True, inplace=inplace)
    check(computed, {**inputs, "initial_state": start}, {"output_final_state": True}, 2e-6)
    if inplace:
        assert computed[1].data_ptr() == inputs["initial_state"].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_in_place_on_any_device(dtype, make_inputs):
    """The public function, by the PyTorch form where there is no GPU or the inputs are float64."""
    inputs = inputs_of(make_inputs, "mild", dtype, SMALL)
    state = inputs.pop("initial_state").to(torch.float64 if dtype == torch.float64 else torch.float32)
    options = {**inputs, "output_final_state": True}
    expected_o, expected_state = fused_recurrent_momentum_delta_rule(**options, initial_state=state)
    o, final_state = fused_recurrent_momentum_delta_rule(**options, initial_state=state, inplace=True)
    assert final_state is state
    assert torch.equal(o, expected_o)
    assert torch.equal(state, expected_state)


WRONG_IN_PLACE = {
    "none": (
        lambda state: {"initial_state": None},
        "initial_state is None: pass the state that inplace=True is to overwrite",
    ),
    "dtype": (
        lambda state: {"initial_state": state.half()},
        "initial_state has dtype torch.float16: convert it to torch.float32, which inplace=True writes",
    ),
    "strides": (
        lambda state: {"initial_state": state.transpose(3, 4).contiguous().transpose(3, 4)},
        r"initial_state has strides \[768, 768, 384, 1, 16\]: inplace=True needs a contiguous one",
    ),
    "not returned": (
        lambda state: {"output_final_state": False},
        "output_final_state is False: set it to True for inplace=True, which writes that state",
    ),
    "gradients": (
        lambda state: {"initial_state": state.requires_grad_()},
        r"inplace=True overwrites what a backward pass needs: call under torch.no_grad\(\)",
    ),
}


@pytest.mark.parametrize("case", WRONG_IN_PLACE)
def test_in_place_says_what_it_needs(case, make_inputs):
    change, message = WRONG_IN_PLACE[case]
    inputs = inputs_of(make_inputs, "mild", torch.float32, SMALL)
    arguments = {**inputs, "output_final_state": True, **change(inputs["initial_state"])}
    with pytest.raises(ValueError, match=message):
        fused_recurrent_momentum_delta_rule(**arguments, inplace=True)


def test_compiles_without_spills():
    """For GPUs that are not here: no spills, three programs of four warps a multiprocessor, 16 bytes a load."""
    sizes = {"form": "recurrent", "B": 256, "T": 64, "H": 2, "HV": 4}
    cases = [
        {**sizes, "K": 128, "V": 128, "dtype": "bfloat16", "T": 1},
        {**sizes, "K": 128, "V": 128, "dtype": "bfloat16", "free_p": True, "packed": True},
        {**sizes, "K": 256, "V": 512, "dtype": "float32", "free_p": True, "packed": True},
        {**sizes, "K": 64, "V": 64, "dtype": "float16", "T": 1, "free_p": True},
        {**sizes, "K": 16, "V": 16, "dtype": "bfloat16", "T": 1},
        {**sizes, "K": 128, "V": 128, "dtype": "bfloat16", "T": 1, "capability": 80},
    ]
    for case, usage in zip(cases, compile_launches(cases), strict=True):
        assert usage["stack_bytes"] == 0, (case, usage)
        assert usage["registers"] <= 168, (case, usage)
        assert usage["vector_loads"] >= 2, (case, usage)


def on_gpu_check(inputs, options, o_error):
    computed = poisoned(fused_recurrent_momentum_delta_rule, **inputs, **options)
    check(computed, inputs, options, o_error, state_error=1e-5)


class TestOnGpu:
    """In the public function, at real sizes."""

    pytestmark = gpu

    @pytest.mark.parametrize(
        ("dtype", "o_error"), [(torch.bfloat16, 4e-3), (torch.float32, 1e-5)], ids=["bf16", "fp32"]
    )
    @pytest.mark.parametrize("tokens", [1, 65])
    @pytest.mark.parametrize("shape", REAL)
    def test_shapes(self, shape, tokens, dtype, o_error, make_inputs):
        inputs = inputs_of(make_inputs, "layer", dtype, {**REAL[shape], "T": tokens})
        on_gpu_check(inputs, options_of({}), o_error)

    def test_gate_profiles(self, profile, make_inputs):
        inputs = inputs_of(make_inputs, profile, torch.bfloat16, {**REAL["h16d128"], "B": 1, "T": 257})
        on_gpu_check(inputs, options_of({}), 4e-3)

    @pytest.mark.parametrize("feature", FEATURES)
    def test_features(self, feature, make_inputs):
        changes, left_out, options = FEATURES[feature]
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, {**SMALL, "K": 128, "V": 128, **changes}, left_out)
        on_gpu_check(inputs, options_of(options), 4e-3)

    def test_step_in_a_graph(self, make_inputs):
        """Captured once and replayed, a step in place goes on from where the last one ended."""
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, {**REAL["h16d128"], "T": 1})
        state = inputs.pop("initial_state")
        expected = state.clone()
        step = {**inputs, "output_final_state": True, "inplace": True}
        fused_recurrent_momentum_delta_rule(**step, initial_state=state.clone())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, _ = fused_recurrent_momentum_delta_rule(**step, initial_state=state)
        for _ in range(3):
            graph.replay()
            expected_o, _ = fused_recurrent_momentum_delta_rule(**step, initial_state=expected)
            assert torch.equal(o, expected_o)
            assert torch.equal(state, expected)

    def test_states_of_more_than_2_31_numbers(self, make_inputs):
        sizes = {"T": 1, "H": 16, "HV": 16, "K": 64, "V": 64}
        inputs = inputs_of(make_inputs, "mild", torch.bfloat16, {**sizes, "B": 2})
        start = inputs.pop("initial_state")
        copies = 2**31 // start.numel() + 1
        inputs = {name: x.repeat(copies, *[1] * (x.ndim - 1)) for name, x in inputs.items()}
        state = start.repeat(1, copies, 1, 1, 1)
        o, _ = fused_recurrent_momentum_delta_rule(**inputs, initial_state=state, output_final_state=True, inplace=True)
        last = {name: x[-2:] for name, x in inputs.items()}
        check((o[-2:], state[:, -2:]), {**last, "initial_state": start}, {"output_final_state": True}, 4e-3)

    def test_values_of_more_than_2_31_numbers(self, make_inputs):
        sizes = {"T": 2, "H": 1, "HV": 32, "K": 16, "V": 512}
        inputs = inputs_of(make_inputs, "mild", torch.bfloat16, {**sizes, "B": 2}, ("initial_state",))
        copies = 2**31 // inputs["v"].numel() + 1
        many = {name: x.repeat(copies, *[1] * (x.ndim - 1)) for name, x in inputs.items()}
        o, _ = fused_recurrent_momentum_delta_rule(**many)
        check((o[-2:], None), inputs, {}, 4e-3)
