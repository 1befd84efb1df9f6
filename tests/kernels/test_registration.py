"""The chunk form as an operator of PyTorch: schema, torch.compile, and gradients."""

import pytest
import torch
from kernel_cases import DEVICE, OPTIONAL, by_name, check, inputs_of
from torch.utils.checkpoint import checkpoint

from mdnbench.kernels import chunk_momentum_delta_rule
from mdnbench.kernels.chunk import chunk_triton
from mdnbench.kernels.operator import _checked
from mdnbench.kernels.reference import recurrent_mdn

through_operator = by_name(chunk_triton, chunk_size=16)
SMALL = {"B": 1, "T": 20, "H": 1, "HV": 2, "K": 16, "V": 16}
ERROR = 5e-6 if DEVICE == "cpu" else 2e-5  # on a GPU products are of three TF32 products each


@pytest.mark.parametrize("left_out", [(), ("p", "beta", "eta", "initial_state")], ids=["all", "optional left out"])
def test_registration(left_out, make_inputs):
    """The schema, the shapes foretold, and the autograd formula, also when traced."""
    inputs = inputs_of(make_inputs, "layer", torch.float32, {**SMALL, "T": 5, "HV": 1}, left_out)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    first = [inputs.pop(name) for name in ("q", "k", "v", "log_alpha", "log_mu")]
    options = {
        **OPTIONAL,
        **inputs,
        "output_final_state": not left_out,
        "chunk_size": 16,
        "for_backward": True,
        "save_memory": False,
    }
    torch.library.opcheck(torch.ops.mdnbench.chunk_mdn.default, (*first, *options.values()))


@pytest.mark.parametrize("packed", [False, True])
def test_compile_keeps_a_call_whole(packed, make_inputs):
    inputs = inputs_of(make_inputs, "layer", torch.float32, {**SMALL, "N": 2 if packed else 1})
    options = {"output_final_state": True}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 17, 20], device=DEVICE)
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    function = chunk_momentum_delta_rule if DEVICE == "cuda" else through_operator
    check(torch.compile(function, fullgraph=True, backend=backend)(**inputs, **options), inputs, options, ERROR, ERROR)


def test_compile_with_sizes_and_scales_that_vary(make_inputs):
    """The shapes foretold from symbolic sizes, and argument checks that can be traced."""

    def function(scale, **inputs):
        arguments = _checked(**{**OPTIONAL, **inputs, "scale": scale, "output_final_state": True})
        return chunk_triton(*arguments.values(), 16)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, T, scale in ((2, 20, 0.5), (2, 33, 0.25), (3, 17, 2.0)):
        inputs = inputs_of(make_inputs, "layer", torch.float32, {**SMALL, "B": B, "T": T})
        for got, expected in zip(compiled(scale, **inputs), function(scale, **inputs)):
            assert torch.equal(got, expected)


def test_compiled_gradients(make_inputs, evaluate, assert_close):
    inputs = inputs_of(make_inputs, "layer", torch.float32, SMALL)
    compiled = torch.compile(through_operator, fullgraph=True, backend="aot_eager")
    assert_close(evaluate(compiled, inputs), evaluate(recurrent_mdn, inputs, torch.float64), ERROR)


@pytest.mark.parametrize("left_out", [(), ("p", "beta", "eta", "initial_state")], ids=["all", "optional left out"])
def test_gradients(left_out, make_inputs, evaluate, assert_close):
    inputs = inputs_of(make_inputs, "layer", torch.float32, SMALL, left_out)
    assert_close(evaluate(through_operator, inputs), evaluate(recurrent_mdn, inputs, torch.float64), ERROR)


def test_gradients_of_packed_sequences(make_inputs, evaluate, assert_close):
    inputs = inputs_of(make_inputs, "layer", torch.float32, {**SMALL, "N": 4})
    options = {"cu_seqlens": torch.tensor([0, 17, 17, 18, 20], device=DEVICE)}
    truth = evaluate(recurrent_mdn, inputs, torch.float64, **options)
    assert_close(evaluate(through_operator, inputs, **options), truth, ERROR)


@pytest.mark.parametrize("name", ["q", "k", "v", "p", "log_alpha", "log_mu", "beta", "eta", "initial_state"])
def test_gradient_of_one_input_alone(name, make_inputs):
    """From the output alone, with and without a final state that nothing is done with; none arrives elsewhere."""
    inputs = inputs_of(make_inputs, "layer", torch.float32, SMALL)
    grads = []
    for function, keep_state in ((through_operator, True), (through_operator, False), (recurrent_mdn, False)):
        leaf = inputs[name].clone().requires_grad_()
        o, _ = function(**{**inputs, name: leaf}, output_final_state=keep_state)
        grads.append(torch.autograd.grad(o.sum(), leaf)[0].float())
    torch.testing.assert_close(grads[0], grads[2], rtol=1e-4, atol=1e-6)
    assert torch.equal(grads[0], grads[1])


def test_second_derivatives_are_refused(make_inputs):
    inputs = inputs_of(make_inputs, "layer", torch.float32, SMALL)
    inputs["q"].requires_grad_()
    o, _ = through_operator(**inputs)
    (grad,) = torch.autograd.grad(o.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_checkpoint(make_inputs, evaluate, assert_close):
    """Computed again in the backward pass, to the same gradients."""

    def checkpointed(**arguments):
        return checkpoint(through_operator, use_reentrant=False, **arguments)

    inputs = inputs_of(make_inputs, "layer", torch.float32, SMALL)
    assert_close(evaluate(checkpointed, inputs), evaluate(through_operator, inputs), 0, 0, 0)
