"""What the tests of the Triton kernels share: sizes, inputs on the device at hand, and comparison with the truth."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mdnbench.kernels.reference import recurrent_mdn

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
gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")]


def inputs_of(make_inputs, profile, dtype, sizes, left_out=(), device=DEVICE):
    inputs = {name: x.detach().to(device) for name, x in make_inputs(profile, **sizes).items() if name not in left_out}
    return {name: x.to(dtype) if name in TOKEN_TENSORS else x for name, x in inputs.items()}


def options_of(options):
    """Options of a case as arguments: the final state asked for, cu_seqlens as a tensor."""
    options = {"output_final_state": True, **options}
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], device=DEVICE)
    return options


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


def compile_launches(cases):
    """What `mdnbench.bench.compile_launches` prints for `cases`: one list of launches for all of them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "mdnbench.bench.compile_launches"]
    result = subprocess.run(command, input=json.dumps(cases), env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]
