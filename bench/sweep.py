"""Runs a sweep: every point in the worker process, providers of one workload in alternation, each row kept at once.

Importing this loads no torch, running a sweep does.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import metrics
from .costs import costs
from .gpu_state import GpuMonitor, needs_rest
from .requests import Block, Failure, PointFailed, Prepare, Prepared
from .results import (
    SCHEMA_VERSION,
    SWEEP_FILE,
    GpuReading,
    Point,
    Record,
    append_record,
    now,
    read_records,
    results_path,
)
from .spec import SweepSpec, estimate_seconds, first_difference, plan, providers_alone, providers_of
from .worker import MEMORY_LIMIT_FRACTION, Workers, available_memory_bytes

__all__ = ["Progress", "Summary", "SweepSpec", "estimate_seconds", "plan", "run_sweep"]

WORKER_LOG = "worker.log"

FINAL_STATUSES = ("ok", "unsupported")  # the others failed: by chance, or by a fault that may be mended by now
NOT_COMPARED = ("name", "setup_limit_s", "run_limit_s", "memory_limit_bytes")  # they change no number

BLOCKS_PER_POINT = 5  # into which the time limit is cut, so that providers alternate at least so often
MAX_BLOCK_S = 1.0
MIN_BLOCKS = 2  # one block cannot show a drift
MIN_SAMPLES = 6  # fewer have no 95 % interval
MIN_SAMPLES_OF_LONG_CALLS = 3  # of calls that each take longer than the time limit of the point
MAX_SAMPLES = 2000  # the interval of the median is 4 % of the ranks wide then
MAX_SAMPLES_PER_BLOCK = 200
REST_S = 0.5  # after a block in which the GPU was at its limit of power or heat


@dataclass(frozen=True)
class Progress:
    """Told to the caller of `run_sweep` before and after each step.

    Attributes:
        step: "preparing" (build, first call, check), "sampling" (a block of samples) or "finished".
        point: which point.
        record: its row, already on disk; None unless finished.
        done: points finished, those kept from before included.
        total: points of the sweep.
        seconds_left: an estimate for the points not finished.
    """

    step: str
    point: Point
    record: Record | None
    done: int
    total: int
    seconds_left: float


@dataclass(frozen=True)
class Summary:
    """What a sweep came to.

    Attributes:
        folder: where everything is.
        statuses: number of points by status, those kept from before included.
        measured, kept: points that were run now, and before.
        seconds: wall time.
    """

    folder: Path
    statuses: dict[str, int]
    measured: int
    kept: int
    seconds: float


def run_sweep(
    spec: SweepSpec,
    folder: str | Path,
    resume: bool = False,
    on_event: Callable[[Progress], None] | None = None,
    identity: dict[str, Any] | None = None,
) -> Summary:
    """Measure every point of `spec` and keep a row of each in `folder`.

    Args:
        spec: what to measure.
        folder: made when absent. It gets sweep.json (the specification and `identity`), results.jsonl and worker.log.
        resume: go on with a sweep that stopped: points whose last row is ok or unsupported stay as they are, the
            others are measured.
        on_event: called with the progress, in this process.
        identity: what must be equal for times to be comparable, such as hardware and versions; plain JSON values.

    Raises:
        ValueError: before anything is run: for a bad specification, a folder that holds results when not resuming,
            and, when resuming, a folder that holds no sweep or a different one, naming the difference.
        RuntimeError: when no worker process can be started.
        KeyboardInterrupt: on Ctrl-C; the rows written stay.
    """
    points = plan(spec)
    folder = Path(folder)
    kept = _resume(spec, folder, identity) if resume else _start(spec, folder, identity)
    kept = {point: kept[point] for point in points if point in kept}
    run = _Run(spec, folder, on_event or (lambda progress: None), kept, len(points))
    remaining = [point for point in points if point not in kept]
    try:
        for _, group in itertools.groupby(remaining, key=lambda point: point.group):
            run.measure_group(list(group))
    finally:
        run.workers.stop()
        run.monitor.close()
    statuses = Counter(record.status for record in run.finished.values())
    return Summary(folder, dict(statuses), len(remaining), len(kept), time.monotonic() - run.started)


def _start(spec: SweepSpec, folder: Path, identity: dict[str, Any] | None) -> dict[Point, Record]:
    if results_path(folder).exists():
        raise ValueError(f"{folder} holds results already: go on with them by --resume, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    content = {"schema_version": SCHEMA_VERSION, "spec": spec.to_dict(), "identity": identity or {}}
    (folder / SWEEP_FILE).write_text(json.dumps(content, indent=2) + "\n")
    return {}


def _resume(spec: SweepSpec, folder: Path, identity: dict[str, Any] | None) -> dict[Point, Record]:
    """The rows that stay, after a check that the folder holds this very sweep."""
    file = folder / SWEEP_FILE
    if not file.exists():
        raise ValueError(f"--resume: {folder} holds no sweep, {SWEEP_FILE} is missing: start it without --resume")
    try:
        before = json.loads(file.read_text())
        spec_before, identity_before = before["spec"], before["identity"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--resume: {file} is damaged: start in another folder") from None
    plain = json.loads(json.dumps({"spec": spec.to_dict(), "identity": identity or {}}))
    difference = first_difference(spec_before, plain["spec"], NOT_COMPARED)
    difference = difference or first_difference(identity_before, plain["identity"])
    if difference:
        name, was, asked = difference
        raise ValueError(
            f"--resume: {folder} was measured with {name} {_words(was)}, this sweep has {_words(asked)}; "
            f"resume with the same sweep on the same system, or choose another folder"
        )
    records = read_records(folder) if results_path(folder).exists() else []
    return {record.point: record for record in records if record.status in FINAL_STATUSES}


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(" x ".join(map(str, x)) if isinstance(x, list) else str(x) for x in value)
    return "none" if value is None else str(value)


@dataclass
class _Sampling:
    """A prepared point and the samples it has so far."""

    point: Point
    found: Prepared
    samples_ms: list[float] = field(default_factory=list)
    block_samples: list[int] = field(default_factory=list)
    gpu: list[tuple[GpuReading, ...]] = field(default_factory=list)
    seconds: float = 0.0
    idle_s: float = 0.0

    def stop_reason(self, spec: SweepSpec) -> str | None:
        """Why sampling ends now, one of `results.STOP_REASONS`; None while it goes on."""
        long = metrics.median(self.samples_ms) / 1e3 > spec.time_limit_s
        if len(self.samples_ms) < (MIN_SAMPLES_OF_LONG_CALLS if long else MIN_SAMPLES):
            return None
        enough = self.seconds >= spec.min_seconds and len(self.block_samples) >= MIN_BLOCKS
        if enough and metrics.is_precise(self.samples_ms, spec.precision):
            return "precise"
        if len(self.samples_ms) >= MAX_SAMPLES:
            return "most samples"
        if self.seconds >= spec.time_limit_s:
            return "long calls" if long else "time limit"
        return None


class _Run:
    """The workers of a sweep and the rows written so far."""

    def __init__(
        self,
        spec: SweepSpec,
        folder: Path,
        on_event: Callable[[Progress], None],
        kept: dict[Point, Record],
        total: int,
    ) -> None:
        self.spec, self.folder, self.on_event, self.total = spec, folder, on_event, total
        self.finished = dict(kept)
        self.kept = len(kept)
        self.providers = providers_of(spec.providers)
        self.monitor = GpuMonitor(spec.device)
        self.started = time.monotonic()
        memory_limit_bytes = spec.memory_limit_bytes or int(MEMORY_LIMIT_FRACTION * available_memory_bytes())
        alone = providers_alone(spec.providers)
        self.workers = Workers(spec.device, folder / WORKER_LOG, alone, memory_limit_bytes)

    def measure_group(self, points: Sequence[Point]) -> None:
        """Prepare all, then take blocks of samples in turn until each is precise or out of time."""
        active: list[_Sampling] = []
        for point in points:
            self._tell("preparing", point)
            try:
                active.append(_Sampling(point, self._prepare(point, full=True)))
            except PointFailed as stop:
                self._finish(point, stop.failure.found, failure=stop.failure)
        while active:
            for sampling in list(active):
                self._tell("sampling", sampling.point)
                failure = None
                try:
                    self._take_block(sampling)
                except PointFailed as stop:
                    failure = stop.failure
                if failure or sampling.stop_reason(self.spec):
                    active.remove(sampling)
                    self._finish(sampling.point, sampling.found, sampling, failure)

    def _prepare(self, point: Point, full: bool) -> Prepared:
        request = Prepare(point, self.spec.seed, full)
        return self.workers.of(point.provider).prepare(request, self.spec.setup_seconds)

    def _take_block(self, sampling: _Sampling) -> None:
        point, spec = sampling.point, self.spec
        worker = self.workers.of(point.provider)
        if point not in worker.prepared:
            self._prepare(point, full=False)  # it was checked in a worker that another point has ended
        seconds = min(spec.time_limit_s / BLOCKS_PER_POINT, MAX_BLOCK_S)
        count = min(MAX_SAMPLES_PER_BLOCK, MAX_SAMPLES - len(sampling.samples_ms))
        watch = self.monitor.watch()
        start = time.monotonic()
        samples = worker.block(Block(point, seconds, count), spec.run_limit_s + seconds, watch)
        took = time.monotonic() - start
        sampling.seconds += min(took, max(seconds, sum(samples) / 1e3))  # capturing graphs is not sampling
        sampling.samples_ms += samples
        sampling.block_samples.append(len(samples))
        readings = watch.end()
        if readings:
            sampling.gpu.append(readings)
        if needs_rest(readings):  # the next block, of whichever provider, starts from a rested GPU
            time.sleep(REST_S)
            sampling.idle_s += REST_S

    def _finish(
        self, point: Point, found: Prepared, sampling: _Sampling | None = None, failure: Failure | None = None
    ) -> None:
        """Write the row of a point."""
        provider = self.providers[point.provider]
        record = make_record(
            point, provider.operator.name, self.spec.seed, found, sampling.samples_ms if sampling else (), failure
        )
        limits = {name: getattr(self.spec, name) for name in ("precision", "time_limit_s", "min_time_s")}
        record = replace(record, **costs(provider, point), **limits)
        if sampling:
            record = replace(
                record,
                block_samples=tuple(sampling.block_samples),
                gpu=tuple(sampling.gpu),
                stop_reason=None if failure else sampling.stop_reason(self.spec),
                idle_s=sampling.idle_s if self.monitor.available else None,
            )
        append_record(self.folder, record)
        self.finished[point] = record
        self._tell("finished", point, record)

    def _tell(self, step: str, point: Point, record: Record | None = None) -> None:
        done = len(self.finished)
        measured = done - self.kept
        if measured:
            seconds_left = (time.monotonic() - self.started) / measured * (self.total - done)
        else:
            seconds_left = estimate_seconds([point] * (self.total - done), self.spec)
        self.on_event(Progress(step, point, record, done, self.total, seconds_left))


def make_record(
    point: Point,
    operator: str,
    seed: int,
    found: Prepared,
    samples_ms: Sequence[float] = (),
    failure: Failure | None = None,
) -> Record:
    """The row of a point, dated now. One that failed keeps its samples and has no speed."""
    latency = metrics.median(samples_ms) if samples_ms and not failure else None
    low, high = (metrics.reported_interval(samples_ms) if latency is not None else None) or (None, None)
    return Record(
        point=point,
        operator=operator,
        status=failure.status if failure else "ok",
        reason=failure.reason if failure else None,
        seed=seed,
        time=now(),
        samples_ms=tuple(samples_ms),
        latency_ms=latency,
        latency_low_ms=low,
        latency_high_ms=high,
        tokens_per_s=point.workload.tokens / (latency / 1e3) if latency else None,
        first_call_s=found.first_call_s,
        peak_memory_bytes=found.peak_memory_bytes,
        saved_memory_bytes=found.saved_memory_bytes,
        relative_error=found.relative_error,
        checked_seq_len=found.checked_seq_len,
        threads=found.threads,
        input_sets=found.input_sets,
        notes=found.notes,
    )
