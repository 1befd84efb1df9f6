"""Medians, their distribution-free intervals and the metrics of records."""

import math
import random
from dataclasses import replace

import pytest

from mdnbench.baselines.workload import Workload
from mdnbench.bench.metrics import (
    METRICS,
    correlation_time,
    host_overheads_ms,
    is_precise,
    median,
    median_interval,
    percent_of_roofline,
    reported_interval,
    sampled_interval,
)
from mdnbench.bench.results import Point, Record

POINT = Point("p", Workload(seq_len=100, head_dim_k=8, head_dim_v=8, batch=3), "forward", "eager")
RECORD = Record(POINT, "x", "ok", None, 0, "2026-01-01T00:00:00+00:00", samples_ms=(2.0, 1.0, 3.0))


def test_median() -> None:
    assert median([3, 1, 2]) == 2
    assert median([4, 1, 2, 3]) == 2.5
    with pytest.raises(ValueError, match="samples is empty"):
        median([])


@pytest.mark.parametrize(
    # The k of the tables of the sign test at 95 %, e.g. Conover, Practical Nonparametric Statistics: the interval is
    # from the k-th smallest to the k-th largest.
    ("count", "rank"),
    [(6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (15, 4), (20, 6), (25, 8), (30, 10), (40, 14), (50, 18), (100, 40)],
)
def test_interval_has_the_binomial_ranks(count: int, rank: int) -> None:
    samples = random.Random(count).sample(range(1, count + 1), count)
    assert median_interval(samples) == (rank, count + 1 - rank)


@pytest.mark.parametrize("count", [7, 19, 64, 333, 1500])
def test_interval_is_the_narrowest_that_holds_the_confidence(count: int) -> None:
    low, high = median_interval(list(range(1, count + 1)))
    assert low + high == count + 1

    def misses(rank: int) -> float:
        return 2 * sum(math.comb(count, i) for i in range(rank)) / 2**count

    assert misses(low) <= 0.05 < misses(low + 1)


def test_no_interval_from_fewer_than_six() -> None:
    assert median_interval([1.0] * 5) is None
    assert median_interval([]) is None
    assert median_interval([1.0] * 6) == (1.0, 1.0)
    assert median_interval([1.0] * 6, confidence=0.99) is None


def test_interval_covers_the_median_of_a_skewed_distribution() -> None:
    rng = random.Random(0)
    intervals = [median_interval([rng.expovariate(1) for _ in range(40)]) for _ in range(2000)]
    covered = sum(low <= math.log(2) <= high for low, high in intervals) / len(intervals)
    assert 0.945 <= covered <= 0.98  # the ranks 14 and 27 hold 96.2 %


def test_precision_is_that_of_the_median_not_of_a_sample() -> None:
    rng = random.Random(0)
    noisy = [10 * (1 + rng.gauss(0, 0.05)) for _ in range(2000)]  # each sample is off by 5 %
    assert not is_precise(noisy[:30])
    assert is_precise(noisy)
    assert not is_precise(noisy, target=1e-4)
    assert not is_precise([1.0] * 5)
    assert is_precise([1.0] * 6)


def test_metrics_of_a_record() -> None:
    record = replace(RECORD, relative_error={"o": 1e-7, "dq": 3e-7}, peak_memory_bytes=10, first_call_s=1.5)
    values = {name: metric.function(record) for name, metric in METRICS.items()}
    assert values == {
        "latency_ms": 2.0,
        "tokens_per_s": 300 / 2e-3,
        "peak_memory_bytes": 10,
        "saved_memory_bytes": None,
        "max_relative_error": 3e-7,
        "tflops": None,
        "gbps": None,
        "arithmetic_intensity": None,
        "sm_clock_mhz": None,
        "first_call_s": 1.5,
    }
    assert METRICS["tokens_per_s"].higher_is_better
    assert not METRICS["latency_ms"].higher_is_better


def test_rates_and_the_roofline_follow_from_the_counts_of_a_row() -> None:
    record = replace(RECORD, flops=8_000_000_000, bytes=2_000_000)  # in 2 ms: 4 TFLOP/s, 1 GB/s
    assert METRICS["tflops"].function(record) == pytest.approx(4)
    assert METRICS["gbps"].function(record) == pytest.approx(1)
    assert METRICS["arithmetic_intensity"].function(record) == 4000
    peaks = {"copy_bytes_per_s": 1e12, "matmul_flops_per_s": {"float32": 8e12}}
    assert percent_of_roofline(record, peaks) == pytest.approx(50)  # the matrix rate is the lower of the ceilings
    slow_memory = peaks | {"copy_bytes_per_s": 1.25e9}  # 5 TFLOP/s at 4000 FLOP a byte
    assert percent_of_roofline(record, slow_memory) == pytest.approx(80)
    tensor_cores = {"copy_bytes_per_s": 1e12, "matmul_flops_per_s": {"float32": 8e12, "tf32": 48e12}}
    assert percent_of_roofline(record, tensor_cores) == pytest.approx(25)  # three TF32 products make one of float32
    assert percent_of_roofline(record, None) is None
    assert percent_of_roofline(record, {"copy_bytes_per_s": 1e12, "matmul_flops_per_s": {"bfloat16": 8e12}}) is None
    assert percent_of_roofline(replace(record, flops=None), peaks) is None


def test_host_overhead_is_eager_minus_graph_of_the_same_cache() -> None:
    def of(regime: str, latency: float | None, provider: str = "p") -> Record:
        return replace(
            RECORD,
            point=replace(POINT, provider=provider, regime=regime, workload=POINT.workload.with_(device="cuda")),
            status="unsupported" if latency is None else "ok",
            samples_ms=() if latency is None else (latency,),
        )

    records = [of("eager", 5.0), of("graph", 3.0), of("eager-warm", 4.5), of("graph-warm", 2.0)]
    records += [of("eager", 7.0, "q"), of("graph", None, "q"), of("graph", 1.0, "r")]
    found = host_overheads_ms(records)
    assert {point.regime: value for point, value in found.items()} == {"eager": 2.0, "eager-warm": 2.5}
    assert {point.provider for point in found} == {"p"}


def test_correlated_samples_know_less() -> None:
    rng = random.Random(1)
    for share, expected in ((0.0, 1.0), (0.8, 9.0)):  # AR(1) with coefficient a: near (1 + a) / (1 - a)
        times = []
        for _ in range(20):
            x, samples = 0.0, []
            for _ in range(2000):
                x = share * x + rng.gauss(0, 1)
                samples.append(x)
            times.append(correlation_time(samples))
        # Signs are less correlated than the values: (2 / pi) asin(a^k) in place of a^k.
        assert 0.6 * expected <= sum(times) / len(times) <= 1.25 * expected
    assert correlation_time([1.0] * 100) == 1.0
    assert correlation_time([1.0, 2.0] * 9) == 1.0  # too few to say


def test_the_interval_of_correlated_samples_still_covers_the_median() -> None:
    rng = random.Random(2)
    covered = {"corrected": 0, "as if independent": 0}
    for _ in range(400):
        x, samples = rng.gauss(0, 1), []
        for _ in range(300):
            x = 0.8 * x + 0.6 * rng.gauss(0, 1)
            samples.append(x)
        for name, (low, high) in (
            ("corrected", sampled_interval(samples)),
            ("as if independent", median_interval(samples)),
        ):
            covered[name] += low <= 0 <= high
    assert covered["corrected"] / 400 >= 0.90
    assert covered["as if independent"] / 400 <= 0.60


def test_a_wide_correlation_takes_the_interval_to_the_extremes_and_not_beyond() -> None:
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], correlation_time=1e9) == (1.0, 6.0)
    assert sampled_interval([float(i) for i in range(40)]) == (0.0, 39.0)  # a steady drift


def test_a_record_that_is_not_ok_has_no_speed_and_an_error_of_nan_is_absent() -> None:
    record = replace(RECORD, status="incorrect", relative_error={"o": None, "dq": 0.5})
    assert METRICS["latency_ms"].function(record) is None
    assert METRICS["tokens_per_s"].function(record) is None
    assert METRICS["max_relative_error"].function(record) is None
    assert METRICS["max_relative_error"].function(RECORD) is None


def test_no_interval_is_reported_narrower_than_processes_differ() -> None:
    assert reported_interval([1.0] * 20) == pytest.approx((0.995, 1.005))
    wide = [0.9 + 0.01 * i for i in range(20)]
    assert reported_interval(wide) == sampled_interval(wide)
    assert reported_interval([1.0] * 15 + [2.0] * 15) == (1.0, 2.0)
    assert reported_interval([1.0] * 5) is None
