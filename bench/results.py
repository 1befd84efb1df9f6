"""The record of one measured point, and the append-only file it is kept in. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from mdnbench.baselines.workload import Workload

SCHEMA_VERSION = 1
MODES = ("forward", "backward", "forward_backward")
REGIMES = ("eager", "graph")  # how calls reach the device: launched one by one, or replayed from a CUDA graph
STATUSES = ("ok", "unsupported", "incorrect", "out_of_memory", "timeout", "crashed", "error")


@dataclass(frozen=True)
class Point:
    """One thing to measure: which provider, on what, in which mode and regime."""

    provider: str
    workload: Workload
    mode: str
    regime: str


@dataclass(frozen=True)
class Record:
    """One row of results.jsonl: a point and what came of it.

    Absent values are None. `samples_ms` holds every sample in the order taken; nothing is dropped.
    `relative_error` maps tensor names ("o", "dq", "dlog_alpha", ...) to ||x - truth|| / ||truth||.
    """

    point: Point
    operator: str
    status: str
    reason: str | None
    seed: int
    time: str  # when the row was written, ISO 8601 in UTC
    samples_ms: tuple[float, ...] = ()
    latency_ms: float | None = None  # median of the samples
    latency_low_ms: float | None = None  # 95 % confidence interval of the median
    latency_high_ms: float | None = None
    tokens_per_s: float | None = None
    first_call_s: float | None = None  # build and first call: compilation and autotuning included
    peak_memory_bytes: int | None = None  # inputs, output, gradients and work space at their highest
    saved_memory_bytes: int | None = None  # kept from forward for backward, inputs not counted
    relative_error: dict[str, float] | None = None
    checked_seq_len: int | None = None  # sequence length of the correctness check, which may be shortened
    threads: int | None = None  # CPU threads in use; None on a GPU
    schema_version: int = SCHEMA_VERSION
