"""Medians, their distribution-free intervals and the metrics of records."""

import math
import random
from dataclasses import replace

import pytest

from mdnbench.baselines.workload import Workload
from mdnbench.bench.metrics import METRICS, is_precise, median, median_interval
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
    assert not is_precise(noisy, half_width=1e-4)
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
        "first_call_s": 1.5,
    }
    assert [name for name, metric in METRICS.items() if metric.higher_is_better] == ["tokens_per_s"]


def test_a_record_that_is_not_ok_has_no_speed_and_an_error_of_nan_is_absent() -> None:
    record = replace(RECORD, status="incorrect", relative_error={"o": None, "dq": 0.5})
    assert METRICS["latency_ms"].function(record) is None
    assert METRICS["tokens_per_s"].function(record) is None
    assert METRICS["max_relative_error"].function(record) is None
    assert METRICS["max_relative_error"].function(RECORD) is None
