"""The same as on a CPU, on a GPU: events, CUDA graphs, memory, and faults that poison the CUDA context."""

import time

import pytest
import torch

from mdnbench.baselines.registry import providers
from mdnbench.baselines.workload import Workload
from mdnbench.bench import correctness, environment, measure, memory, peaks, profiling
from mdnbench.bench.gpu_state import FIRST_READING_S, GpuMonitor
from mdnbench.bench.results import REGIMES, read_records
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


def test_what_fits_into_the_cache_is_read_faster_when_it_is_warm() -> None:
    x = torch.ones(16 * MIB, device="cuda", dtype=torch.uint8)
    y = torch.empty_like(x)

    def call() -> None:
        torch.cuda._sleep(100_000)  # longer than the host takes to launch the copy, which would be in the warm time
        y.copy_(x)

    cold, warm = (sorted(measure.time_on_cuda(cold)(call, 50))[25] for cold in (True, False))
    assert warm < cold


def test_readings_of_the_gpu_are_plausible() -> None:
    monitor = GpuMonitor("cuda")
    if not monitor.available:
        pytest.skip("NVML does not answer here")
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    watch = monitor.watch()
    for _ in range(300):
        x @ x
    watch()
    time.sleep(2 * FIRST_READING_S)
    watch()
    torch.cuda.synchronize()
    _, during, *_ = watch.end()
    monitor.close()
    assert 200 < during.sm_clock_mhz < 4000
    assert during.temperature_c is None or 10 < during.temperature_c < 110
    assert during.power_w is None or 10 < during.power_w < 2000


def test_peaks_of_this_gpu_are_those_of_a_gpu() -> None:
    found = peaks.measure_peaks(environment.collect("cuda"), "cuda", sizes=(4096,), copy_bytes=1 << 28)
    rates = found["matmul_flops_per_s"]
    assert found["copy_bytes_per_s"] > 1e11
    assert rates.keys() == {"float32", "tf32", "float16", "bfloat16"}
    assert rates["float32"] < rates["tf32"] < rates["bfloat16"]
    assert found["driver"] is not None
    assert torch.backends.cuda.matmul.allow_tf32 is False


def test_a_profile_of_this_gpu_holds_kernels_gaps_and_bytes(tmp_path) -> None:
    workload = Workload(256, 64, 64, device="cuda", dtype="bfloat16")
    provider = providers()["gdn-torch"]
    found = profiling.record(provider, workload, "forward_backward", "cuda", 3, tmp_path / "trace.json.gz")
    assert found.launches > 20
    assert found.idle_ms > 0  # launched from Python, one small kernel after the other
    assert found.stages["matrix products"] > 0
    assert found.allocated_bytes > 1 << 20
    assert sum(found.stages.values()) == pytest.approx(found.span_ms)


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
        regimes=REGIMES,
        device="cuda",
        time_limit_s=0.1,
        setup_limit_s=120.0,
    )
    summary = run_sweep(spec, tmp_path)
    records = read_records(tmp_path)
    assert len(records) == 7 * len(REGIMES)
    timed = [record for record in records if record.status == "ok"]
    assert all(record.input_sets == (2 if record.point.cache == "cold" else 1) for record in timed)

    def of(provider: str, regime: str):
        return [r for r in records if r.point.provider == provider and r.point.regime == regime]

    for provider, regime in (
        ("toy-good", "eager"),
        ("toy-good", "graph"),
        ("toy-good", "eager-warm"),
        ("toy-good", "graph-warm"),
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
