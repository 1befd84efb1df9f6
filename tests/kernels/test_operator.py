"""The public functions: signature, results, and what they say about arguments they cannot take."""

import inspect

import numpy as np
import pytest
import torch

from mdnbench.kernels import chunk_momentum_delta_rule, fused_recurrent_momentum_delta_rule
from mdnbench.kernels.reference import recurrent_mdn

FUNCTIONS = [chunk_momentum_delta_rule, fused_recurrent_momentum_delta_rule]
# Of fla-core 0.6.0: (name, default) in order; the chunk form takes chunk_size=64 as well, the recurrence our inplace.
SIGNATURE = [
    *((name, inspect.Parameter.empty) for name in ("q", "k", "v", "log_alpha", "log_mu")),
    *((name, None) for name in ("p", "beta", "eta", "scale", "initial_state")),
    ("output_final_state", False),
    ("cu_seqlens", None),
    ("use_qk_l2norm_in_kernel", True),
    ("use_p_times_alpha", True),
]


def test_signatures_are_those_of_fla():
    chunk, recurrent = (
        [(x.name, x.default) for x in inspect.signature(function).parameters.values()] for function in FUNCTIONS
    )
    assert recurrent == [*SIGNATURE, ("inplace", False)]
    assert chunk == [*SIGNATURE, ("chunk_size", 64), ("save_memory", False)]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_the_results(function, dtype, make_inputs):
    """Gates stay in float32, as layers compute them."""
    inputs = {name: x.to(dtype) if name in "qkvp" else x for name, x in make_inputs(B=2, T=20).items()}
    o, state = function(**inputs, output_final_state=True)
    assert (o.dtype, o.shape) == (dtype, (2, 20, 4, 24))
    assert (state.dtype, state.shape) == (torch.float64 if dtype == torch.float64 else torch.float32, (2, 2, 4, 16, 24))
    assert function(**inputs)[1] is None
    o.float().sum().backward()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float32_results_and_gradients(function, make_inputs, evaluate, assert_close):
    inputs = make_inputs("layer", B=2, T=150)
    options = {"chunk_size": 128} if function is chunk_momentum_delta_rule else {}
    assert_close(evaluate(function, inputs, **options), evaluate(recurrent_mdn, inputs, torch.float64))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_packed_sequences(function, make_inputs, evaluate, assert_close):
    inputs = make_inputs(T=90, N=4)
    cu_seqlens = torch.tensor([0, 33, 33, 34, 90])
    truth = evaluate(recurrent_mdn, inputs, torch.float64, cu_seqlens=cu_seqlens)
    assert_close(evaluate(function, inputs, cu_seqlens=cu_seqlens), truth)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_strides_do_not_matter(function, make_inputs):
    """Head-major tensors, gates cut out of one projection, a gate expanded from one number."""
    inputs = {name: x.detach() for name, x in make_inputs(B=2).items()}
    expected, _ = function(**{**inputs, "eta": torch.full((2, 70, 4), 0.5)})
    for name in ("q", "k", "v", "p"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    gates = torch.stack([inputs[name] for name in ("log_alpha", "log_mu", "beta")], dim=-1)
    inputs.update(zip(("log_alpha", "log_mu", "beta"), gates.unbind(-1)))
    inputs["eta"] = torch.tensor(0.5).expand(2, 70, 4)
    leaves = [x.requires_grad_() for x in inputs.values() if x.is_leaf]
    computed, _ = function(**inputs)
    torch.testing.assert_close(computed, expected, rtol=0, atol=0)
    computed.transpose(1, 3).sum().backward()  # the gradient that arrives has no dense strides either
    assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_graph_without_gradients(function, make_inputs):
    inputs = make_inputs(T=20)
    with torch.no_grad():
        assert not function(**inputs)[0].requires_grad
    assert not function(**{name: x.detach() for name, x in inputs.items()})[0].requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("index_device", [None, "cpu", "cuda"])
def test_on_a_gpu(function, index_device, make_inputs, evaluate, assert_close):
    """A batch (None), and packed sequences whose bounds lie on either device; the truth is computed on the CPU."""
    bounds = None if index_device is None else torch.tensor([0, 33, 33, 34, 90])
    inputs = make_inputs("resets_-inf", B=2 if bounds is None else 1, T=90, N=2 if bounds is None else 4)
    truth = evaluate(recurrent_mdn, inputs, torch.float64, cu_seqlens=bounds)
    on_gpu = {name: x.detach().cuda() for name, x in inputs.items()}
    computed = evaluate(function, on_gpu, cu_seqlens=None if bounds is None else bounds.to(index_device))
    assert_close({name: x.cpu() for name, x in computed.items()}, truth)


def changed(name, change):
    return lambda inputs: {name: change(inputs.get(name))}


def packed(values, **options):
    return lambda inputs: {"initial_state": None, "cu_seqlens": torch.tensor(values, **options)}


WRONG = {
    "no tensor": (changed("k", lambda x: x.tolist()), "k is a list: pass a torch.Tensor"),
    "gate left out": (changed("log_mu", lambda x: None), "log_mu is a NoneType: pass a torch.Tensor"),
    "integer q": (
        changed("q", lambda x: x.int()),
        "q has dtype torch.int32: convert it to torch.float16, torch.bfloat16, torch.float32 or torch.float64",
    ),
    "k of another dtype": (
        changed("k", lambda x: x.half()),
        "k has dtype torch.float16: convert it to torch.float32, the dtype of q",
    ),
    "integer gate": (
        changed("beta", lambda x: x.long()),
        "beta has dtype torch.int64: convert it to torch.float16, torch.bfloat16, torch.float32 or torch.float64",
    ),
    "another device": (
        changed("v", lambda x: x.to("meta")),
        "v is on meta: move it to cpu, the device of q",
    ),
    "rank of q": (
        changed("q", lambda x: x[0]),
        "q has shape [70, 2, 16]: it must be [B, T, H, K], each at least 1",
    ),
    "no tokens": (
        changed("q", lambda x: x[:, :0]),
        "q has shape [1, 0, 2, 16]: it must be [B, T, H, K], each at least 1",
    ),
    "length of v": (
        changed("v", lambda x: x[:, 1:]),
        "v has shape [1, 69, 4, 24]: it must be [B, T, HV, V] with B, T = 1, 70 as in q",
    ),
    "value heads": (changed("v", lambda x: x[:, :, :3]), "v has 3 heads: use a multiple of the 2 heads of q and k"),
    "heads of k": (
        changed("k", lambda x: x[:, :, :1]),
        "k has shape [1, 70, 1, 16]: it must be [1, 70, 2, 16] ([B, T, H, K], the shape of q)",
    ),
    "width of p": (
        changed("p", lambda x: x[..., :8]),
        "p has shape [1, 70, 2, 8]: it must be [1, 70, 2, 16] ([B, T, H, K], the shape of q)",
    ),
    "heads of a gate": (
        changed("log_alpha", lambda x: x[..., :2]),
        "log_alpha has shape [1, 70, 2]: it must be [1, 70, 4] ([B, T, HV])",
    ),
    "rank of a gate": (
        changed("eta", lambda x: x[..., None]),
        "eta has shape [1, 70, 4, 1]: it must be [1, 70, 4] ([B, T, HV])",
    ),
    "scale": (lambda inputs: {"scale": "1"}, "scale='1' must be a finite number, or None for K ** -0.5"),
    "infinite scale": (
        lambda inputs: {"scale": float("inf")},
        "scale=inf must be a finite number, or None for K ** -0.5",
    ),
    "scale that is no number": (
        lambda inputs: {"scale": float("nan")},
        "scale=nan must be a finite number, or None for K ** -0.5",
    ),
    "initial state": (
        changed("initial_state", lambda x: x[0]),
        "initial_state has shape [1, 4, 16, 24]: it must be [2, 1, 4, 16, 24] ([2, N, HV, K, V])",
    ),
    "states of packed sequences": (
        lambda inputs: {"cu_seqlens": torch.tensor([0, 30, 70])},
        "initial_state has shape [2, 1, 4, 16, 24]: it must be [2, 2, 4, 16, 24] ([2, N, HV, K, V])",
    ),
    "cu_seqlens as a list": (
        lambda inputs: {"cu_seqlens": [0, 70]},
        "cu_seqlens is a list: pass a torch.Tensor of int32 or int64",
    ),
    "cu_seqlens as floats": (
        packed([0.0, 70.0]),
        "cu_seqlens has dtype torch.float32: convert it to torch.int32 or torch.int64",
    ),
    "cu_seqlens of one number": (packed([0]), "cu_seqlens has shape [1]: it must be [N + 1] with N of at least 1"),
    "cu_seqlens of rank 2": (
        packed([[0, 70]]),
        "cu_seqlens has shape [1, 2]: it must be [N + 1] with N of at least 1",
    ),
    "cu_seqlens elsewhere": (
        packed([0, 70], device="meta"),
        "cu_seqlens is on meta: move it to cpu, the device of q, or to the CPU",
    ),
    "cu_seqlens starts late": (packed([1, 70]), "cu_seqlens starts at 1: it must start at 0"),
    "cu_seqlens ends early": (
        packed([0, 69]),
        "cu_seqlens ends at 69: it must end at 70, the number of tokens in q",
    ),
    "cu_seqlens decreases": (packed([0, 40, 30, 70]), "cu_seqlens goes from 40 down to 30: it must not decrease"),
    "cu_seqlens and a batch": (
        lambda inputs: {
            **{name: torch.cat((x, x)) for name, x in inputs.items() if name != "initial_state"},
            **packed([0, 70])(inputs),
        },
        "q has batch size 2 beside cu_seqlens: pack the sequences into a batch of 1",
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(function, case, make_inputs):
    change, message = WRONG[case]
    inputs = {name: x.detach() for name, x in make_inputs().items()}
    with pytest.raises(ValueError, match=r"^.+$") as caught:  # `.` matches no line break: one line
        function(**{**inputs, **change(inputs)})
    assert str(caught.value) == message


def test_cu_seqlens_that_numpy_changes_are_checked_again(make_inputs):
    """They have the same version then, and the kernels would write out of bounds."""
    inputs = {name: x.detach() for name, x in make_inputs(T=20, N=2).items()}
    bounds = np.array([0, 5, 20])
    cu_seqlens = torch.from_numpy(bounds)
    chunk_momentum_delta_rule(**inputs, cu_seqlens=cu_seqlens)
    bounds[1] = 50
    with pytest.raises(ValueError, match="cu_seqlens goes from 50 down to 20: it must not decrease"):
        chunk_momentum_delta_rule(**inputs, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("chunk_size", [0, 8, 48, 256, None])
def test_wrong_chunk_sizes(chunk_size, make_inputs):
    with pytest.raises(ValueError, match=f"chunk_size={chunk_size} is not offered: use 16, 32, 64 or 128"):
        chunk_momentum_delta_rule(**make_inputs(T=20), chunk_size=chunk_size)
