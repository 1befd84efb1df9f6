"""What passes between the sweep's process and its worker: requests, answers and faults. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .results import Point

TIMED_CALLS = "the timed calls"  # the phase in which samples are taken


@dataclass(frozen=True)
class Prepare:
    """Build a point and call it once. With `full`, also check it and measure its memory."""

    point: Point
    seed: int
    full: bool = True


@dataclass(frozen=True)
class Check:
    """Check a point, without timing it."""

    point: Point
    seed: int


@dataclass(frozen=True)
class Block:
    """Take samples of a prepared point for so many seconds."""

    point: Point
    max_seconds: float
    max_samples: int


@dataclass(frozen=True)
class Trace:
    """Record calls of a point under torch.profiler."""

    point: Point
    calls: int
    file: Path  # gets the Chrome trace


@dataclass(frozen=True)
class Prepared:
    """What was found out about a point before its samples are taken; fields as in `results.Record`."""

    relative_error: dict[str, float] | None = None
    checked_seq_len: int | None = None
    first_call_s: float | None = None
    peak_memory_bytes: int | None = None
    saved_memory_bytes: int | None = None
    threads: int | None = None
    input_sets: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why a point has no speed. `healthy` says whether the process may go on to the next one."""

    status: str
    reason: str
    healthy: bool = True
    found: Prepared = Prepared()


class PointFailed(Exception):
    """Ends the work on one point."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.status}: {failure.reason}")
        self.failure = failure


@dataclass(frozen=True)
class Phase:
    """What the process is doing now, in words that follow "during"."""

    name: str
