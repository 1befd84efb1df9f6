"""The same as on a CPU, on a GPU: events, CUDA graphs, memory, and faults that poison the CUDA context."""

import pytest
import torch

from mdnbench.baselines.registry import providers
from mdnbench.baselines.workload import Workload
from mdnbench.bench import correctness, measure, memory
from mdnbench.bench.results import read_records
from mdnbench.bench.sweep import SweepSpec, run_sweep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
MIB = 1 << 20


def test_events_time_the_call_and_not_the_flush_of_the_cache() -> None:
    time_calls = measure.time_on_cuda()
    x, y = (torch.ones(256 * MIB, device="cuda", dtype=torch.uint8) for _ in "xy")
    y.copy_(x)
    one, four = (sorted(time_calls(lambda n=n: [y.copy_(x) for _ in range(n)], 20))[10] for n in (1, 4))
    assert 0.05 < one < 1  # 512 MiB moved
    assert 3 < four / one < 5
    assert sorted(time_calls(lambda: None, 20))[10] < 0.05


@pytest.mark.parametrize("mode", ["forward", "backward", "forward_backward"])
def test_a_graph_replays_what_eager_computes(mode: str) -> None:
    x = torch.randn(64, 64, device="cuda", requires_grad=mode != "forward")
    d_output = torch.randn(64, 64, device="cuda")

    def call() -> torch.Tensor:
        return torch.tanh(x @ x)

    eager = measure.open_call(call, mode, [x], d_output)()
    replay = measure.open_graph(call, mode, [x], d_output)
    _, result = replay()
    torch.cuda.synchronize()
    expected, found = (eager, result) if mode == "forward" else (eager[0], result[0])
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        x.mul_(0.5)  # the graph reads its inputs anew
    replay()
    torch.cuda.synchronize()
    if mode == "forward":
        torch.testing.assert_close(result, torch.tanh(x @ x))


def test_peak_memory_of_known_allocations() -> None:
    def tensor_of(mebibytes: int) -> torch.Tensor:
        return torch.empty(mebibytes * MIB, dtype=torch.uint8, device="cuda")

    given = [tensor_of(30)]

    def call() -> torch.Tensor:
        a = tensor_of(40)
        b = tensor_of(80)
        del a, b
        return tensor_of(20)

    assert memory.peak_memory_bytes(lambda: call, given, torch.device("cuda")) == 150 * MIB

    def open_call():
        held = tensor_of(50)
        tensor_of(500)  # released before the call
        return lambda: (held, tensor_of(20))

    assert memory.peak_memory_bytes(open_call, given, torch.device("cuda")) == 100 * MIB


@pytest.mark.usefixtures("toys")
def test_unwritten_memory_is_seen() -> None:
    workload = Workload(seq_len=64, head_dim_k=16, head_dim_v=16, heads=2, device="cuda", dtype="bfloat16")
    check = correctness.check(providers()["toy-unwritten"], workload, "forward", 0, torch.device("cuda", 0))
    assert check.reason is not None


@pytest.mark.usefixtures("toys")
def test_a_fault_on_the_gpu_costs_its_point_alone(tmp_path) -> None:
    spec = SweepSpec(
        "cuda",
        (
            "toy-good",
            "toy-device-assert",
            "toy-uncapturable",
            "toy-says-uncapturable",
            "toy-allocates-at-once",
            "gdn-torch",
            "attention-sdpa-flash",
        ),
        seq_lens=(256,),
        head_dims=((64, 64),),
        dtypes=("bfloat16",),
        modes=("forward_backward",),
        regimes=("eager", "graph"),
        device="cuda",
        time_limit_s=0.1,
        setup_limit_s=120.0,
    )
    summary = run_sweep(spec, tmp_path)
    records = read_records(tmp_path)
    assert len(records) == 7 * 2

    def of(provider: str, regime: str):
        return [r for r in records if r.point.provider == provider and r.point.regime == regime]

    for provider, regime in (
        ("toy-good", "eager"),
        ("toy-good", "graph"),
        ("toy-uncapturable", "eager"),
        ("gdn-torch", "eager"),
        ("gdn-torch", "graph"),
        ("attention-sdpa-flash", "eager"),
        ("attention-sdpa-flash", "graph"),
    ):
        for record in of(provider, regime):
            assert record.status == "ok", (record.point.key, record.reason)
            assert record.latency_ms > 0
            assert record.threads is None
            assert record.peak_memory_bytes > 0
    for regime in spec.regimes:
        for record in of("toy-device-assert", regime):
            assert record.status == "error", record.reason
            assert "device-side assert" in record.reason
        for record in of("toy-allocates-at-once", regime):
            assert record.status == "out_of_memory", record.reason
    for record in of("toy-uncapturable", "graph"):
        assert record.status == "unsupported"
        assert record.reason.startswith("the capture in a CUDA graph failed: ")
    for record in of("toy-says-uncapturable", "graph"):
        assert record.reason == "its calls cannot be captured in a CUDA graph"
    assert sum(summary.statuses.values()) == len(records)
