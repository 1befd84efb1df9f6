"""Benchmarks of the operators for pytest-benchmark:

    pytest tests/speed --benchmark-only --benchmark-json=speed.json

On the CPU the PyTorch forms at sizes that take milliseconds; on a GPU (`gpu`) all providers that run there, at real
sizes.
`pytest-benchmark compare` and the common CI actions read the JSON. Nothing is checked for correctness here, and host
and device are timed together: mdnbench sweep does better in both.
"""

from __future__ import annotations

import pytest
import torch

from mdnbench.baselines.inputs import make_inputs
from mdnbench.baselines.registry import providers
from mdnbench.baselines.workload import Workload
from mdnbench.bench.measure import open_call

MODES = ("forward", "forward_backward")
CPU = Workload(seq_len=256, head_dim_k=32, head_dim_v=32, heads=2, chunk_size=32)
GPU = {
    "h16d128": Workload(4096, 128, 128, batch=4, heads=16, chunk_size=64, dtype="bfloat16", device="cuda"),
    "paper-400m": Workload(4096, 128, 256, batch=8, heads=6, chunk_size=64, dtype="bfloat16", device="cuda"),
}
ON_CPU = [name for name, provider in providers().items() if provider.supports(CPU) is None]
# Some change what others import, and need a process of their own.
ON_GPU = [name for name, provider in providers().items() if "cuda" in provider.devices and provider.shares_process]


@pytest.fixture(autouse=True)
def _one_thread():
    """The matrices of these sizes are too small for threads to help."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ON_CPU)
def test_cpu(name, mode, benchmark):
    measure(benchmark, name, CPU, mode)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", GPU)
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu(name, shape, mode, benchmark):
    measure(benchmark, name, GPU[shape], mode)


def measure(benchmark, name, workload, mode):
    provider = providers()[name]
    reason = provider.supports(workload, mode)
    if reason is not None:
        pytest.skip(reason)
    if provider.chunk_sizes is None:
        workload = workload.with_(chunk_size=None)
    inputs, d_output = make_inputs(provider.operator, workload, seed=0, requires_grad=mode != "forward")
    step = open_call(provider.build(workload, inputs), mode, list(inputs.values()), d_output)

    def run():
        step()
        if workload.device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{mode} {workload.with_(chunk_size=None).label()}"
    benchmark.extra_info.update(provider=name, mode=mode, workload=workload.to_dict())
    benchmark.pedantic(run, rounds=30, warmup_rounds=3)
