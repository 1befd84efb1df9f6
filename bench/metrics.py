"""What is computed from stored samples and records: medians, their intervals and the metrics of reports. No torch.

Metrics read records only, so that a new metric needs no new measurement. To add one, write a function from a record to
a number or None and give it an entry in `METRICS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

from .results import Record


def median(samples: Sequence[float]) -> float:
    """The middle of the sorted samples, the mean of the two middle ones when their number is even.

    Raises:
        ValueError: when there are no samples.
    """
    if not samples:
        raise ValueError("samples is empty: a median needs at least one")
    ordered = sorted(samples)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """A confidence interval of the median that assumes nothing about the distribution of the samples.

    The number of n independent samples below the true median is binomial(n, 1/2), so the interval between the k-th
    smallest and the k-th largest sample misses the median with probability 2 P(binomial(n, 1/2) < k). It is the
    narrowest such interval that holds `confidence` (David and Nagaraja, Order Statistics, section 7.1).

    Returns:
        (low, high) in the unit of the samples; None when the samples are too few, below 6 for 95 %.
    """
    rank = _interval_rank(len(samples), confidence)
    if rank is None:
        return None
    ordered = sorted(samples)
    return ordered[rank - 1], ordered[-rank]


@cache
def _interval_rank(count: int, confidence: float) -> int | None:
    """The largest k >= 1 with 2 P(binomial(count, 1/2) < k) <= 1 - confidence, None when there is none."""
    log_total = math.lgamma(count + 1) - count * math.log(2)
    # Below 7 standard deviations the sum is under 1e-11: starting there makes this quick for any count.
    first = max(0, int(count / 2 - 3.5 * math.sqrt(count)))
    below = 0.0
    for i in range(first, count // 2 + 1):
        below += math.exp(log_total - math.lgamma(i + 1) - math.lgamma(count - i + 1))
        if 2 * below > 1 - confidence:
            return i if i >= 1 else None
    return None


def is_precise(samples: Sequence[float], half_width: float = 0.01) -> bool:
    """Whether the 95 % confidence interval of the median lies within the median times 1 ± `half_width`."""
    interval = median_interval(samples)
    if interval is None:
        return False
    middle = median(samples)
    return middle * (1 - half_width) <= interval[0] and interval[1] <= middle * (1 + half_width)


def latency_ms(record: Record) -> float | None:
    """Median time of one call."""
    return median(record.samples_ms) if record.status == "ok" and record.samples_ms else None


def tokens_per_s(record: Record) -> float | None:
    """Tokens of the workload, all sequences together, over the median time of one call."""
    latency = latency_ms(record)
    return record.point.workload.tokens / (latency / 1e3) if latency else None


def max_relative_error(record: Record) -> float | None:
    """The largest relative error of the output and the gradients; None where one of them is not a number."""
    errors = (record.relative_error or {}).values()
    return max(errors) if errors and None not in errors else None


class Metric(NamedTuple):
    """One number a record has for reports, None where it has none."""

    title: str
    unit: str | None  # None for a pure number
    function: Callable[[Record], float | None]
    higher_is_better: bool


METRICS: dict[str, Metric] = {
    "latency_ms": Metric("Latency", "ms", latency_ms, False),
    "tokens_per_s": Metric("Throughput", "tokens/s", tokens_per_s, True),
    "peak_memory_bytes": Metric("Peak memory", "bytes", lambda record: record.peak_memory_bytes, False),
    "saved_memory_bytes": Metric("Saved for backward", "bytes", lambda record: record.saved_memory_bytes, False),
    "max_relative_error": Metric("Largest relative error", None, max_relative_error, False),
    "first_call_s": Metric("First call", "s", lambda record: record.first_call_s, False),
}
