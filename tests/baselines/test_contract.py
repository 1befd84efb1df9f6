"""Every registered provider against the float64 truth of its operator: the output and the gradient of every input.

The PyTorch providers at every gate profile, length and dtype. Those that wrap a package run where it is installed and
there is a GPU: at one profile in bfloat16, as `mdnbench check` judges them. Which profiles they fail is a result of
`mdnbench check`, not a fault of the adapter.
"""

from functools import cache

import pytest
import torch

from mdnbench.baselines.inputs import distinct_profiles, make_inputs, truth_of
from mdnbench.baselines.registry import operators, providers
from mdnbench.baselines.workload import Workload
from mdnbench.bench.check import check_profiles, plan_checks

PROVIDERS = providers()
OPERATORS = {operator.name: operator for operator in operators()}
PEERS = [name for name, p in PROVIDERS.items() if p.package is not None or not p.shares_process]
OURS = [name for name in PROVIDERS if name not in PEERS]
PROFILES = [(name, gates) for name in OURS for gates in distinct_profiles(PROVIDERS[name].operator)]
HAS_GPU = torch.cuda.is_available()
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")]),
]
SHAPES = (  # the first that a provider takes
    {"head_dim_k": 32, "head_dim_v": 40, "batch": 2, "heads": 2, "value_heads": 4},
    {"head_dim_k": 32, "head_dim_v": 40, "batch": 2, "heads": 2},
    {"head_dim_k": 32, "head_dim_v": 32, "batch": 2, "heads": 2},
)
# (output, gradients), as ||x - truth|| / ||truth||. The worst seen on a CPU, over all providers, profiles and lengths:
# 7e-7, 1e-6 in float32; 2.4e-4, 4.8e-4 in float16; 1.9e-3, 3.8e-3 in bfloat16 (output and gradients are rounded to it).
TOLERANCES = {"float32": (1e-5, 1e-4), "float16": (1e-3, 2e-3), "bfloat16": (8e-3, 1.5e-2)}
# Where the truth is zero up to the rounding of float64, as attention's dq for a single token: what is left in float32
# is the rounding of terms that cancel, 2e-6 there.
ZERO_NORM = 1e-9
ABSOLUTE_TOLERANCE = 1e-5


@cache
def inputs_and_truth(operator_name: str, workload: Workload):
    inputs, d_output = make_inputs(OPERATORS[operator_name], workload, seed=1)
    return inputs, d_output, *truth_of(OPERATORS[operator_name], workload, inputs, d_output)


def workload_for(provider, **fields) -> Workload:
    """The first shape that the provider takes, or a skip with its reason."""
    if provider.chunk_sizes is None:
        fields["chunk_size"] = None
    for shape in SHAPES:
        workload = Workload(**shape, **fields)
        reason = provider.supports(workload, "forward_backward")
        if reason is None:
            return workload
    pytest.skip(f"{provider.name}: {reason}")


def assert_near(what: str, x: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    difference, norm = float((x.detach().double() - truth).norm()), float(truth.norm())
    bound = tolerance * norm if norm > ZERO_NORM else ABSOLUTE_TOLERANCE
    assert difference < bound, f"{what}: off by {difference:.1e}, allowed {bound:.1e}"  # NaN fails too


def check(provider, workload: Workload) -> None:
    inputs, d_output, truth, true_gradients = inputs_and_truth(provider.operator.name, workload.with_(chunk_size=None))
    output = provider.build(workload, inputs)()
    assert output.dtype == getattr(torch, workload.dtype)
    assert output.shape == (workload.batch, workload.seq_len, workload.value_heads, workload.head_dim_v)
    gradients = torch.autograd.grad(output, list(inputs.values()), d_output)
    output_tolerance, gradient_tolerance = TOLERANCES[workload.dtype]
    assert_near("output", output, truth, output_tolerance)
    for name, gradient in zip(inputs, gradients):
        assert_near(f"d{name}", gradient, true_gradients[name], gradient_tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "gates"), PROFILES)
def test_every_gate_profile(name, gates, device):
    provider = PROVIDERS[name]
    for chunk_size in (16, 64):
        check(provider, workload_for(provider, seq_len=130, gates=gates, device=device, chunk_size=chunk_size))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seq_len", [1, 15, 70, 130])
@pytest.mark.parametrize("name", OURS)
def test_every_chunk_size(name, seq_len, device):
    provider = PROVIDERS[name]
    for chunk_size in provider.chunk_sizes or (None,):
        check(provider, workload_for(provider, seq_len=seq_len, device=device, chunk_size=chunk_size))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", OURS)
def test_sixteen_bit_inputs(name, dtype, device):
    provider = PROVIDERS[name]
    check(provider, workload_for(provider, seq_len=130, dtype=dtype, device=device))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")
@pytest.mark.timeout(1800)  # they autotune
@pytest.mark.parametrize("name", PEERS)
def test_peer(name):
    # The published chunk form of MDN, with chunks of 64, is right where memory is short only: see baselines/mdn.py.
    gates = "layer" if PROVIDERS[name].operator.name == "mdn" else "mild"
    template = Workload(130, 64, 64, batch=2, heads=2, dtype="bfloat16", device="cuda")
    (record,) = check_profiles(plan_checks([name], template, [gates]), "cuda", limit_s=1500)
    if record.status == "unsupported":
        pytest.skip(record.reason)
    if record.notes and record.status == "incorrect":
        pytest.xfail(record.reason)  # a refusal of the package was lifted, and was right
    assert record.status == "ok", record.reason


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", [name for name in OURS if PROVIDERS[name].cuda_graph])
def test_forward_in_a_cuda_graph(name):
    provider = PROVIDERS[name]
    workload = workload_for(provider, seq_len=130, dtype="bfloat16", device="cuda")
    inputs, _ = make_inputs(provider.operator, workload, seed=1, requires_grad=False)
    run = provider.build(workload, inputs)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        eager = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    captured.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, eager)
