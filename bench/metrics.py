"""What is computed from stored samples and records: medians, their intervals and the metrics of reports. No torch.

Metrics read records only, so that a new metric needs no new measurement. To add one, write a function from a record to
a number or None and give it an entry in `METRICS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from .results import Point, Record

MIN_CORRELATED = 20  # with fewer samples the correlation is not known well enough to correct by

# Largest relative error ||x - truth|| / ||truth|| by the dtype of q, k, v and o: (output, gradients of q, k, v).
# Gradients of the gates, which sum over a whole head in float32, may be off by twice that of q, k, v.
TOLERANCES: dict[str, tuple[float, float]] = {
    "float32": (1e-4, 1e-3),
    "float16": (5e-3, 1e-2),
    "bfloat16": (1e-2, 2e-2),
}
GATE_TOLERANCE_FACTOR = 2

# By how much medians of the same call differ between processes. Chosen from 18 graphs captured in two runs on an H200:
# 0.2 % in the middle, 0.7 % at worst, where the intervals of their samples are ± 0.05 to 0.4 %.
PROCESS_SPREAD = 0.005


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


def median_interval(
    samples: Sequence[float], confidence: float = 0.95, correlation_time: float = 1.0
) -> tuple[float, float] | None:
    """A confidence interval of the median that assumes nothing about the distribution of the samples.

    The number of n independent samples below the true median is binomial(n, 1/2), so the interval between the k-th
    smallest and the k-th largest sample misses the median with probability 2 P(binomial(n, 1/2) < k). It is the
    narrowest such interval that holds `confidence` (David and Nagaraja, Order Statistics, section 7.1).

    Args:
        samples: any numbers.
        confidence: between 0 and 1.
        correlation_time: n correlated samples know as much as n / correlation_time independent ones (see
            `correlation_time`): the ranks move away from the middle by its square root, at most to the extremes.

    Returns:
        (low, high) in the unit of the samples; None when the samples are too few, below 6 for 95 %.
    """
    rank = _interval_rank(len(samples), confidence)
    if rank is None:
        return None
    ordered = sorted(samples)
    middle = (len(ordered) + 1) / 2
    rank = max(1, math.floor(middle - (middle - rank) * math.sqrt(correlation_time)))
    return ordered[rank - 1], ordered[-rank]


def correlation_time(samples: Sequence[float]) -> float:
    """How many samples in sequence know as much about the median as one independent sample; 1 for independent ones.

    1 + 2 sum_k rho_k with the autocorrelation rho_k of "above or below the median", which is what the error of a sample
    median depends on. The sum ends where two neighbours add to nothing (the initial positive sequence of Geyer,
    Statistical Science 7, 1992). A drift, and levels that differ from block to block, are correlation too.

    Returns:
        At least 1; 1 for fewer than MIN_CORRELATED samples.
    """
    count = len(samples)
    if count < MIN_CORRELATED:
        return 1.0
    middle = median(samples)
    signs = np.sign(np.asarray(samples) - middle)
    variance = signs @ signs
    if not variance:
        return 1.0

    def rho(lag: int) -> float:
        return float(signs[: count - lag] @ signs[lag:] / variance)

    total = -1.0
    for lag in range(0, count // 2, 2):
        pair = rho(lag) + rho(lag + 1)
        if pair <= 0:
            break
        total += 2 * pair
    return max(1.0, total)


def sampled_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """The interval of the median of samples in the order taken, corrected for their correlation."""
    return median_interval(samples, confidence, correlation_time(samples))


def reported_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """Where the median of another run is to be expected: `sampled_interval`, and at least ± PROCESS_SPREAD.

    Samples of one process know nothing of what differs between processes, such as where memory lies.
    """
    interval = sampled_interval(samples)
    if interval is None:
        return None
    middle = median(samples)
    return min(interval[0], middle * (1 - PROCESS_SPREAD)), max(interval[1], middle * (1 + PROCESS_SPREAD))


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


def half_width(samples: Sequence[float]) -> float | None:
    """Half of `sampled_interval` as a part of the median, 0.005 for ± 0.5 %; None where there is no interval."""
    interval = sampled_interval(samples)
    middle = median(samples) if samples else 0.0
    return None if interval is None or not middle else (interval[1] - interval[0]) / 2 / middle


def is_precise(samples: Sequence[float], target: float = 0.005) -> bool:
    """Whether half of the 95 % confidence interval of the median is at most `target` of the median."""
    found = half_width(samples)
    return found is not None and found <= target


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


def tolerance(dtype: str, name: str) -> float:
    """The largest relative error allowed for tensor `name` ("o", "dq", "dbeta", ...) of a workload in `dtype`."""
    output, gradient = TOLERANCES[dtype]
    if name == "o":
        return output
    return gradient if name in ("dq", "dk", "dv") else GATE_TOLERANCE_FACTOR * gradient


def tflops(record: Record) -> float | None:
    """The operator's count of floating-point operations over the median time, in 10^12 a second."""
    latency = latency_ms(record)
    return record.flops / latency / 1e9 if latency and record.flops is not None else None


def gbps(record: Record) -> float | None:
    """The bytes that have to be moved over the median time, in 10^9 bytes a second: a lower bound of the traffic."""
    latency = latency_ms(record)
    return record.bytes / latency / 1e6 if latency and record.bytes is not None else None


def arithmetic_intensity(record: Record) -> float | None:
    """Floating-point operations for each byte that has to be moved."""
    return record.flops / record.bytes if record.flops is not None and record.bytes else None


def matrix_peak(peaks: Mapping[str, Any] | None, dtype: str) -> float | None:
    """The measured rate of matrix products for a dtype in floating-point operations a second; None where unknown.

    For float32 that of three TF32 products where they are faster: a float32 product of the same accuracy, which Triton
    calls "tf32x3", is made of them.
    """
    rates = (peaks or {}).get("matmul_flops_per_s") or {}
    if dtype == "float32" and "float32" in rates:
        return max(rates["float32"], rates.get("tf32", 0.0) / 3)
    return rates.get(dtype)


def percent_of_roofline(record: Record, peaks: Mapping[str, Any] | None) -> float | None:
    """The rate as a percentage of what the machine's measured peaks allow at this arithmetic intensity.

    The roofline of Williams, Waterman and Patterson (Comm. ACM 52, 2009): min(matrix rate, intensity x copy bandwidth).

    Args:
        record: a row.
        peaks: as `mdnbench peaks` stores them; None where nothing was measured.
    """
    rate, intensity = tflops(record), arithmetic_intensity(record)
    peak = matrix_peak(peaks, record.point.workload.dtype)
    bandwidth = (peaks or {}).get("copy_bytes_per_s")
    if not (rate and intensity and peak and bandwidth):
        return None
    return 100 * rate * 1e12 / min(peak, intensity * bandwidth)


def host_overheads_ms(records: Sequence[Record]) -> dict[Point, float]:
    """For each eager point that was measured as a graph too: eager minus graph, what the host adds to a call.

    It is the part that the device waits for. Below zero means that the two are equal within their noise.
    """
    graphs = {replace(record.point, regime=record.point.regime.replace("graph", "eager")): latency_ms(record)
              for record in records if record.point.launch == "graph"}  # fmt: skip
    eager = {record.point: latency_ms(record) for record in records if record.point.launch == "eager"}
    return {
        point: latency - graphs[point] for point, latency in eager.items() if latency is not None and graphs.get(point)
    }


def sm_clock_mhz(record: Record) -> float | None:
    """The lowest SM clock that was read while samples were taken, or right after a block of them."""
    clocks = (it.sm_clock_mhz for block in record.gpu for it in block if it.at != "before")
    return min((clock for clock in clocks if clock), default=None)


def slowed_by(record: Record) -> tuple[str, ...]:
    """What kept the GPU's clocks down while samples were taken or right after; empty when nothing did."""
    readings = (reading for block in record.gpu for reading in block if reading.at != "before")
    return tuple(dict.fromkeys(name for reading in readings for name in reading.slowed_by))


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
    "tflops": Metric("Matrix rate", "TFLOP/s", tflops, True),
    "gbps": Metric("Bandwidth, least bytes", "GB/s", gbps, True),
    "arithmetic_intensity": Metric("Arithmetic intensity", "FLOP/byte", arithmetic_intensity, True),
    "sm_clock_mhz": Metric("Lowest SM clock", "MHz", sm_clock_mhz, True),
    "first_call_s": Metric("First call", "s", lambda record: record.first_call_s, False),
}
