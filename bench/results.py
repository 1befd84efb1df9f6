"""The record of one measured point, and the append-only file it is kept in. Loads no torch.

A run folder holds `results.jsonl`: one JSON object a line, written when its point is done and never changed. A point
that is measured again gets a new line, and the last line of a point counts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mdnbench.baselines.workload import Workload

SCHEMA_VERSION = 1
RESULTS_FILE = "results.jsonl"
SWEEP_FILE = "sweep.json"  # beside it: what is measured there
LIMITS = ("precision", "time_limit_s", "min_time_s")  # of sampling: in the specification of a sweep and in its rows
MODES = ("forward", "backward", "forward_backward")
# How calls reach the device (launched one by one, or replayed from a CUDA graph), and what its L2 cache holds before
# each: nothing of the call's on a GPU, or, "-warm", what the call before left there. On a CPU nothing is emptied.
REGIMES = ("eager", "graph", "eager-warm", "graph-warm")
STOP_REASONS = ("precise", "time limit", "most samples", "long calls")
STATUSES = ("ok", "unsupported", "incorrect", "out_of_memory", "timeout", "crashed", "error")


@dataclass(frozen=True)
class Point:
    """One thing to measure: which provider, on what, in which mode and regime."""

    provider: str
    workload: Workload
    mode: str
    regime: str

    @property
    def key(self) -> str:
        """One line that identifies the point, such as `mdn-torch forward eager B1 T512 H4 K64 V64 C64 float32 cpu`."""
        return f"{self.provider} {self.mode} {self.regime} {self.workload.label()}"

    @property
    def launch(self) -> str:
        """How calls reach the device: "eager" or "graph"."""
        return self.regime.partition("-")[0]

    @property
    def cache(self) -> str:
        """What the last-level cache holds before a call: "cold" or, always so on a CPU, "warm"."""
        return "warm" if self.regime.endswith("-warm") or self.workload.device == "cpu" else "cold"

    @property
    def group(self) -> Point:
        """The same for points that differ in provider and chunk size alone: those that are measured in alternation."""
        return replace(self, provider="", workload=self.workload.with_(chunk_size=None))


@dataclass(frozen=True)
class GpuReading:
    """What NVML says of a GPU at one moment; None where it does not say.

    Attributes:
        at: "before", "during" or "after" a block of samples.
        sm_clock_mhz, memory_clock_mhz: present clocks.
        power_w, power_limit_w: what it draws (where the driver does not tell: drew in the last second), and may draw.
        temperature_c: of the chip.
        slowed_by: why the clocks are below what the GPU could do: of "power cap", "hardware slowdown", "heat",
            "power brake", "sync boost"; empty when they are not, or when idle.
    """

    at: str
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: int | None = None
    slowed_by: tuple[str, ...] = ()


def under_load(block: Sequence[GpuReading]) -> list[GpuReading]:
    """Those of the readings of a block of samples that were taken in it or right after it."""
    return [reading for reading in block if reading.at != "before"]


@dataclass(frozen=True)
class Record:
    """One row of results.jsonl: a point and what came of it.

    Absent values are None. `samples_ms` holds every sample in the order taken; nothing is dropped.
    `relative_error` maps tensor names ("o", "dq", "dlog_alpha", ...) to ||x - truth|| / ||truth||, None where that is
    not a number, as it is for an output that holds NaN.

    `peak_memory_bytes` and `saved_memory_bytes` are those of the eager call in both regimes: what a CUDA graph reserves
    for itself is not counted. `checked_seq_len` is the workload's own seq_len, or less where the check was shortened;
    a shortened check takes at most 2 sequences of the batch as well.
    """

    point: Point
    operator: str
    status: str
    reason: str | None
    seed: int
    time: str  # when the row was written, ISO 8601 in UTC
    samples_ms: tuple[float, ...] = ()
    latency_ms: float | None = None  # median of the samples
    latency_low_ms: float | None = None  # `metrics.reported_interval` of the median
    latency_high_ms: float | None = None
    tokens_per_s: float | None = None
    first_call_s: float | None = None  # build and first call, with what is not yet in caches or done by earlier points
    peak_memory_bytes: int | None = None  # inputs, output, gradients and work space at their highest
    saved_memory_bytes: int | None = None  # kept from forward for backward, inputs not counted
    relative_error: dict[str, float | None] | None = None
    checked_seq_len: int | None = None  # sequence length of the correctness check, which may be shortened
    threads: int | None = None  # CPU threads in use; None on a GPU
    notes: tuple[str, ...] = ()  # what the provider says about its rows, such as a check of its package passed over
    flops: int | None = None  # of one call, by the operator's count
    bytes: int | None = None  # that one call has to move at least
    block_samples: tuple[int, ...] = ()  # how many of the samples each block holds: between blocks others were measured
    gpu: tuple[tuple[GpuReading, ...], ...] = ()  # readings by block; empty on a CPU and without NVML
    input_sets: int | None = None  # the calls take so many sets of inputs in turn
    stop_reason: str | None = None  # why sampling ended: one of STOP_REASONS
    precision: float | None = None  # part of the median that its interval was to stay within
    time_limit_s: float | None = None  # of sampling, at most
    min_time_s: float | None = None  # of sampling, at least; None: as the limit has it
    idle_s: float | None = None  # pauses between blocks because the GPU was at its power or heat limit
    schema_version: int = SCHEMA_VERSION

    def to_row(self) -> dict[str, Any]:
        """The flat JSON object of this record: `point` is spread into provider, workload, mode and regime."""
        row: dict[str, Any] = {
            "schema_version": self.schema_version,
            "provider": self.point.provider,
            "operator": self.operator,
            "workload": self.point.workload.to_dict(),
            "mode": self.point.mode,
            "regime": self.point.regime,
            "launch": self.point.launch,
            "cache": self.point.cache,
        }
        for field in fields(self):
            if field.name not in ("point", "operator", "schema_version"):
                row[field.name] = _plain(getattr(self, field.name))
        return row

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Record:
        """The inverse of `to_row`. Keys it does not know are ignored.

        Raises:
            ValueError: when the row has another schema version or lacks a value that every row has.
        """
        if not isinstance(row, dict):
            raise ValueError(f"this is no row of results: {type(row).__name__} in place of an object")
        if row.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"schema_version={row.get('schema_version')!r}, but this version of mdnbench reads {SCHEMA_VERSION}: "
                f"use the version that wrote it"
            )
        known = {field.name for field in fields(cls)} - {"point"}
        try:
            point = Point(row["provider"], Workload.from_dict(row["workload"]), row["mode"], row["regime"])
            values = {name: value for name, value in row.items() if name in known}
            lists = {name: tuple(row.get(name) or ()) for name in ("samples_ms", "notes", "block_samples")}
            gpu = tuple(tuple(map(_reading, block)) for block in row.get("gpu") or ())
            return cls(point, **values | lists | {"gpu": gpu})
        except (KeyError, TypeError) as fault:
            raise ValueError(f"this is no row of results: {type(fault).__name__}: {fault}") from None


def _reading(values: dict[str, Any]) -> GpuReading:
    known = {field.name for field in fields(GpuReading)}
    values = {name: value for name, value in values.items() if name in known}
    return GpuReading(**values | {"slowed_by": tuple(values.get("slowed_by") or ())})


def now() -> str:
    """The present time as rows state it: ISO 8601 in UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def append_record(folder: str | Path, record: Record) -> None:
    """Add a row to the folder's results.jsonl; on return it is on disk, so that no later fault can lose it.

    A last line cut short by a kill is removed first: a row counts only with its end of line.
    """
    line = json.dumps(record.to_row(), allow_nan=False, ensure_ascii=False) + "\n"
    with open(results_path(folder), "a+b") as file:
        _cut_torn_line(file)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_records(path: str | Path) -> list[Record]:
    """The records of a run, the last one of each point, in the order in which the points first came.

    Args:
        path: a run folder or its results.jsonl. A last line cut short by a kill is passed over.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming file and line, when a line is not a row of this schema version.
    """
    path = results_path(path)
    last: dict[Point, Record] = {}
    for number, line in enumerate(_whole_lines(path.read_bytes()), start=1):
        try:
            record = Record.from_row(json.loads(line))
        except ValueError as fault:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            raise ValueError(f"{path} line {number}: {fault}") from None
        last[record.point] = record
    return list(last.values())


def results_path(path: str | Path) -> Path:
    """The results.jsonl of a run folder; a path that is a file already stays as it is."""
    path = Path(path)
    return path if path.suffix == ".jsonl" else path / RESULTS_FILE


def _whole_lines(content: bytes) -> Iterable[bytes]:
    return (line for line in content.split(b"\n")[:-1] if line.strip())


def _cut_torn_line(file) -> None:
    """Truncate a file opened "a+b" to the end of its last whole line."""
    end = file.seek(0, os.SEEK_END)
    keep = end
    while keep > 0:  # backwards in blocks: rows with many samples are long, files longer
        start = max(0, keep - 65536)
        file.seek(start)
        newline = file.read(keep - start).rfind(b"\n")
        if newline >= 0:
            keep = start + newline + 1
            break
        keep = start
    if keep != end:
        file.truncate(keep)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinities: they become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, GpuReading):  # without what is absent: a row holds dozens
        return {name: item for name, item in _plain(vars(value)).items() if item not in (None, [])}
    return value
