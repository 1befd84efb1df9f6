"""What the tests of the Triton kernels share: sizes, inputs on the device at hand, and comparison with the truth."""

import json
import os
import subprocess
import sys
from itertools import accumulate

import pytest
import torch

from mdnbench.kernels.reference import chunk_mdn, recurrent_mdn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKEN_TENSORS = ("q", "k", "v", "p")
# Arguments after the five that every call has, in order, with their defaults.
OPTIONAL = {
    **dict.fromkeys(("p", "beta", "eta", "scale", "initial_state")),
    "output_final_state": False,
    "cu_seqlens": None,
    "use_qk_l2norm_in_kernel": True,
    "use_p_times_alpha": True,
}
REAL = {
    "h16d128": {"B": 4, "H": 16, "HV": 16, "K": 128, "V": 128},
    "paper-400m": {"B": 8, "H": 6, "HV": 6, "K": 128, "V": 256},
    "paper-1.3b": {"B": 4, "H": 6, "HV": 6, "K": 256, "V": 512},
    "grouped": {"B": 2, "H": 4, "HV": 16, "K": 64, "V": 64},
    "no power of two": {"B": 2, "H": 3, "HV": 6, "K": 100, "V": 33},
    "one head": {"B": 1, "H": 1, "HV": 1, "K": 96, "V": 80},
}
SMALL = {"B": 1, "T": 40, "H": 1, "HV": 1, "K": 16, "V": 24}
# name -> (changes to SMALL, names of inputs left out, options)
FEATURES = {
    "free p": ({}, (), {}),
    "tied p": ({}, ("p",), {}),
    "tied p, not decayed": ({}, ("p",), {"use_p_times_alpha": False}),
    "free p, not decayed": ({}, (), {"use_p_times_alpha": False}),
    "no L2 norm": ({}, (), {"use_qk_l2norm_in_kernel": False}),
    "no L2 norm, tied p": ({}, ("p",), {"use_qk_l2norm_in_kernel": False}),
    "no beta": ({}, ("beta",), {}),
    "no eta": ({}, ("eta",), {}),
    "no beta, eta, p": ({}, ("beta", "eta", "p"), {}),
    "no initial state": ({}, ("initial_state",), {}),
    "no final state": ({}, (), {"output_final_state": False}),
    "no state at all": ({}, ("initial_state",), {"output_final_state": False}),
    "scale": ({}, (), {"scale": 2}),
    "two sequences": ({"B": 2}, (), {}),
    "three value heads a head": ({"B": 2, "H": 2, "HV": 6}, (), {}),
    "as many value heads as heads": ({"H": 3, "HV": 3}, (), {}),
    "more value heads than a program of the gates": ({"H": 1, "HV": 17, "T": 5}, (), {}),
    "sizes that are no power of two": ({"K": 20, "V": 33}, (), {}),
    "three V tiles": ({"V": 150}, (), {}),
    "three slices of K": ({"K": 150, "T": 20}, (), {"chunk_size": 16}),
    "largest K": ({"K": 256, "T": 20}, (), {"chunk_size": 16}),
    "largest V": ({"V": 512, "T": 20}, (), {"chunk_size": 16}),
    "packed": ({"T": 170, "N": 8}, (), {"cu_seqlens": [0, 0, 32, 33, 33, 98, 162, 170, 170]}),
    "packed, chunks of 16": ({"T": 66, "N": 5, "HV": 2}, (), {"cu_seqlens": [0, 16, 47, 48, 48, 66], "chunk_size": 16}),
    "packed, chunks of 64": ({"T": 200, "N": 4}, (), {"cu_seqlens": [0, 64, 65, 193, 200], "chunk_size": 64}),
    "packed, tied p, no initial state": ({"T": 70, "N": 3}, ("p", "initial_state"), {"cu_seqlens": [0, 35, 35, 70]}),
    "packed, one token": ({"T": 1, "N": 3}, (), {"cu_seqlens": [0, 0, 1, 1]}),
    "packed, many short": (
        {"T": 104, "N": 20},
        (),
        {"cu_seqlens": [0, *accumulate([0, 5, 1, 3, 17] * 4)], "chunk_size": 16},
    ),
}

# On a GPU products of float32 numbers are of three TF32 products each. Where alpha or mu is 0 the kernels compute with
# e^-30 (1e-13): what is 0 in truth is that times other numbers.
LIMITS = {
    torch.float32: {"value_error": 5e-6, "gradient_error": 5e-6}
    if DEVICE == "cpu"
    else {"value_error": 2e-5, "gradient_error": 1e-4},
    torch.float16: {"value_error": 1e-3, "gradient_error": 2e-3, "log_gate_error": 4e-3},
    torch.bfloat16: {"value_error": 6e-3, "gradient_error": 1e-2, "log_gate_error": 2e-2},
}
ZERO = 1e-10
FROM_BOTH_ENDS = ("o", "final_state")

gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")]


def inputs_of(make_inputs, profile, dtype, sizes, left_out=(), device=DEVICE):
    inputs = {name: x.detach().to(device) for name, x in make_inputs(profile, **sizes).items() if name not in left_out}
    return {name: x.to(dtype) if name in TOKEN_TENSORS else x for name, x in inputs.items()}


def awkward(inputs):
    """The same as head-major tensors, gates cut out of one projection or in float16 or float64, a state in float16."""
    inputs = dict(inputs)
    for name in TOKEN_TENSORS:
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["beta"] = torch.stack((inputs["beta"], inputs["eta"]), dim=-1)[..., 0]
    inputs["eta"] = torch.tensor(0.5, device=DEVICE).expand_as(inputs["beta"])
    inputs["log_mu"], inputs["log_alpha"] = inputs["log_mu"].half(), inputs["log_alpha"].double()
    inputs["initial_state"] = inputs["initial_state"].half().transpose(3, 4).contiguous().transpose(3, 4)
    return inputs


def options_of(options):
    """Options of a case as arguments: the final state asked for, cu_seqlens as a tensor."""
    options = {"output_final_state": True, **options}
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], device=DEVICE)
    return options


def case_of(feature, dtype, make_inputs, **sizes):
    """Inputs and options of a feature; without the L2 norm of length 0.8, on average, for a stable recurrence."""
    changes, left_out, options = FEATURES[feature]
    inputs = inputs_of(make_inputs, "layer", dtype, {**SMALL, **sizes, **changes}, left_out)
    if not options.get("use_qk_l2norm_in_kernel", True):
        inputs.update({name: x * (0.8 * x.shape[-1] ** -0.5) for name, x in inputs.items() if name in ("q", "k", "p")})
    return inputs, options_of(options)


def by_name(function, **more):
    """`function`, which takes all arguments in order and then those of `more`, called as the public functions are."""

    def call(q, k, v, log_alpha, log_mu, **arguments):
        return function(q, k, v, log_alpha, log_mu, *{**OPTIONAL, **more, **arguments}.values())

    return call


def poisoned(function, **arguments):
    """With memory that PyTorch allocates, that of the results too, filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        return function(**arguments)
    finally:
        torch.use_deterministic_algorithms(False)


def check(computed, inputs, options, o_error, state_error=2e-6, truth=recurrent_mdn):
    """Output and state against those of `truth`, by relative norm."""
    o, state = computed
    expected_o, expected_state = truth(**inputs, **options)
    assert o.dtype == inputs["q"].dtype
    assert (state is None) == (expected_state is None)
    for got, expected, limit in ((o, expected_o, o_error), (state, expected_state, state_error)):
        if expected is not None:
            assert got.shape == expected.shape
            assert got.isfinite().all()
            assert (got - expected).norm() <= limit * expected.norm()


def exact(chunk_size=None, **arguments):
    """The chunk form in PyTorch in float64, itself tested against the recurrence; fast on a GPU."""
    return chunk_mdn(
        **{
            name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for name, x in arguments.items()
        }
    )


def gradient_checker(evaluate, assert_close, function, truth):
    """A function that compares o, final state and all gradients of `function` with those of `truth` in float64.

    The memory of the kernels is poisoned; `limits` are those of `assert_close` that differ from LIMITS.
    """

    def without_options(chunk_size=None, save_memory=None, **arguments):
        return truth(**arguments)

    def check(inputs, options, arriving=FROM_BOTH_ENDS, wanted=None, **limits):
        if not options["output_final_state"]:
            arriving = arriving[:1]
        computed = poisoned(lambda: evaluate(function, inputs, None, arriving, wanted, **options))
        assert computed["o"].dtype == inputs["q"].dtype
        for name in wanted or inputs:
            assert computed[f"d{name}"].dtype == inputs[name].dtype
        true = evaluate(without_options, inputs, torch.float64, arriving, wanted, **options)
        assert_close(computed, true, **{"zero_error": ZERO, **LIMITS[inputs["q"].dtype], **limits})
        return computed

    return check


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def compile_launches(cases):
    """What `mdnbench.bench.compile_launches` prints for `cases`: one list of launches for all of them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "mdnbench.bench.compile_launches"]
    result = subprocess.run(command, input=json.dumps(cases), env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]
