"""The chunk form as an operator of PyTorch: schema, torch.compile, and gradients."""

from functools import partial

import pytest
import torch
from kernel_cases import DEVICE, OPTIONAL, REAL, by_name, check, gpu, inputs_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from mdnbench.kernels import chunk_momentum_delta_rule
from mdnbench.kernels.chunk import chunk_triton
from mdnbench.kernels.operator import _checked
from mdnbench.kernels.reference import recurrent_mdn

through_operator = by_name(chunk_triton, chunk_size=16)
SMALL = {"B": 1, "T": 20, "H": 1, "HV": 2, "K": 16, "V": 16}
ERROR = 5e-6 if DEVICE == "cpu" else 2e-5  # on a GPU products are of three TF32 products each


@pytest.fixture(autouse=True)
def no_traces_of_other_tests():
    """All trace the same function, and PyTorch stops at eight traces of one."""
    torch._dynamo.reset()


LEFT_OUT = pytest.mark.parametrize(
    "left_out", [(), ("p", "beta", "eta", "initial_state")], ids=["all", "optional left out"]
)
FIRST = ("q", "k", "v", "log_alpha", "log_mu")


def arguments_of(inputs, **options):
    """Of `mdnbench::chunk_mdn`, in order."""
    options = {"chunk_size": 16, "for_backward": True, "save_memory": False, **options}
    return [*(inputs[name] for name in FIRST), *{**OPTIONAL, **rest(inputs), **options}.values()]


def rest(inputs):
    return {name: x for name, x in inputs.items() if name not in FIRST}


@LEFT_OUT
def test_registration(left_out, make_inputs):
    """The schema, the shapes foretold, and the autograd formula, also when traced."""
    inputs = inputs_of(make_inputs, "layer", torch.float32, {**SMALL, "T": 5, "HV": 1}, left_out)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    torch.library.opcheck(
        torch.ops.mdnbench.chunk_mdn.default,
        arguments_of(inputs, output_final_state=not left_out, save_memory=bool(left_out)),
    )


@LEFT_OUT
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_registration_of_the_backward(left_out, dtype, make_inputs):
    """Of all gradients, and of some, and from what is kept to save memory."""
    inputs = inputs_of(make_inputs, "layer", dtype, {**SMALL, "T": 5}, left_out)
    arguments = arguments_of(inputs, output_final_state=not left_out, save_memory=bool(left_out))
    o, final_state, *kept = torch.ops.mdnbench.chunk_mdn(*arguments)
    tokens, (scale, initial_state, _, *options) = arguments[:8], arguments[8:15]
    wanted = [x is not None for x in (*tokens, initial_state)]
    if left_out:
        wanted[0] = wanted[3] = False
    results = (*(x if x.numel() else None for x in kept[2:]), o, torch.ones_like(o))
    torch.library.opcheck(
        torch.ops.mdnbench.chunk_mdn_backward.default,
        (
            *(*tokens, scale, initial_state, *options, *kept[:2], *results),
            *(None if left_out else torch.ones_like(final_state), wanted),
        ),
    )


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


@pytest.mark.parametrize("save_memory", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_gradients(packed, save_memory, make_inputs, evaluate, assert_close):
    inputs = inputs_of(make_inputs, "layer", torch.float32, {**SMALL, "N": 3 if packed else 1})
    options = {"cu_seqlens": torch.tensor([0, 17, 17, 20], device=DEVICE)} if packed else {}
    function = partial(chunk_triton, save_memory=save_memory)
    compiled = torch.compile(by_name(function, chunk_size=16), fullgraph=True, backend="aot_eager")
    truth = evaluate(recurrent_mdn, inputs, torch.float64, **options)
    assert_close(evaluate(compiled, inputs, **options), truth, ERROR, ERROR)


def test_compiled_gradients_with_sizes_that_vary(make_inputs, evaluate):
    """One trace for all; every bit as in the eager mode."""
    traces = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(through_operator, fullgraph=True, dynamic=True, backend=traces)
    for B, T in ((3, 20), (3, 33), (4, 17)):  # not 2, the number of states, which the trace would tie B to
        inputs = inputs_of(make_inputs, "layer", torch.float32, {**SMALL, "B": B, "T": T, "HV": 1})
        assert_equal(evaluate(compiled, inputs), evaluate(through_operator, inputs))
    assert traces.frame_count == 1


def assert_equal(results, expected):
    assert results.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(results[name], x), name


def test_second_derivatives_are_refused(make_inputs):
    inputs = inputs_of(make_inputs, "layer", torch.float32, SMALL)
    inputs["q"].requires_grad_()
    o, _ = through_operator(**inputs)
    with pytest.raises(RuntimeError, match="differentiable once: call without create_graph=True"):
        torch.autograd.grad(o.sum(), inputs["q"], create_graph=True)


@pytest.mark.parametrize("save_memory", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, save_memory, make_inputs, evaluate):
    """Computed again in the backward pass, to the same gradients."""
    inputs = inputs_of(make_inputs, "layer", torch.float32, {**SMALL, "HV": 1})
    function = by_name(partial(chunk_triton, save_memory=save_memory), chunk_size=16)
    names = [*inputs, "output_final_state"]

    def checkpointed(**arguments):
        def call(*values):
            return function(**dict(zip(names, values)))

        return checkpoint(call, *(arguments[name] for name in names), use_reentrant=reentrant)

    if reentrant:  # which knows backward() alone
        grads = []
        for run in (checkpointed, function):
            leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
            o, state = run(**leaves, output_final_state=True)
            (o.sum() + state.sum()).backward()
            grads.append({name: x.grad for name, x in leaves.items()})
        assert_equal(*grads)
    else:
        assert_equal(evaluate(checkpointed, inputs), evaluate(function, inputs))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast(compiled, make_inputs, evaluate):
    """Changes no bit of results and gradients."""
    inputs = inputs_of(make_inputs, "layer", torch.float32, {**SMALL, "T": 5, "HV": 1})
    function = torch.compile(through_operator, fullgraph=True, backend="aot_eager") if compiled else through_operator
    expected = evaluate(through_operator, inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_equal(evaluate(function, inputs), expected)


class TestOnGpu:
    """The public function compiled by Inductor, at real sizes: every bit as in the eager mode."""

    pytestmark = gpu

    @pytest.mark.parametrize("dynamic", [False, True], ids=["fixed sizes", "sizes that vary"])
    @pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
    def test_compile(self, packed, dynamic, make_inputs, evaluate):
        compiled = torch.compile(chunk_momentum_delta_rule, fullgraph=True, dynamic=dynamic)
        for tokens in (257, 300) if dynamic else (257,):
            sizes = {**REAL["h16d128"], "B": 1 if packed else 2, "T": tokens, "N": 3 if packed else 2}
            options = {"cu_seqlens": torch.tensor([0, 100, 100, tokens], device=DEVICE)} if packed else {}
            inputs = inputs_of(make_inputs, "layer", torch.bfloat16, sizes)
            expected = evaluate(chunk_momentum_delta_rule, inputs, **options)
            assert_equal(evaluate(compiled, inputs, **options), expected)

    def test_checkpoint_and_autocast(self, make_inputs, evaluate):
        inputs = inputs_of(make_inputs, "layer", torch.bfloat16, {**REAL["h16d128"], "B": 1, "T": 257})

        def checkpointed(**arguments):
            with torch.autocast("cuda", torch.float16):
                return checkpoint(chunk_momentum_delta_rule, use_reentrant=False, **arguments)

        assert_equal(evaluate(checkpointed, inputs), evaluate(chunk_momentum_delta_rule, inputs))
