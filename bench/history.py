"""The history of measured points over commits, and where their times step. Loads no torch.

A history is a file of JSON lines, appended to and never changed: a point's time at a commit, on a device, with a
driver, Triton and PyTorch. Times of different machines or versions never make one series.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from mdnbench.baselines.workload import Workload

from .results import Point, Record

SCHEMA_VERSION = 1
LEAST_STEP = math.log(1.02)  # smaller steps are not worth a person's time
LEAST_NOISE = 0.003  # of a log latency from commit to commit, where a history happens to be quieter
PENALTY = 3.0  # of a step, in units of noise^2 ln(n); the Bayesian criterion has 2 to 3
LEAST_VALUES = 2  # a level: one value alone may be an outlier
UNCONFIRMED = 5.0  # times the noise that the newest value is off its level, to be named


@dataclass(frozen=True)
class Machine:
    """What decides a time beside the code. Absent is None."""

    device_name: str | None
    driver: str | None
    triton: str | None
    torch: str | None

    def label(self) -> str:
        """One line for people."""
        named = (("driver", self.driver), ("torch", self.torch), ("triton", self.triton))
        return ", ".join([self.device_name or "unknown device", *(f"{name} {it}" for name, it in named if it)])


@dataclass(frozen=True)
class Entry:
    """One point, measured once.

    Attributes:
        commit: hash; "+" at its end where the code had uncommitted changes.
        commit_time: when it was made, ISO 8601; None where git does not tell.
        time: when it was measured, ISO 8601 in UTC.
        status: as in `results.Record`; entries without a time are kept, and make a gap.
    """

    point: Point
    machine: Machine
    commit: str
    commit_time: str | None
    time: str
    status: str
    latency_ms: float | None
    latency_low_ms: float | None
    latency_high_ms: float | None

    @property
    def key(self) -> tuple[Any, ...]:
        """What identifies an entry: tracking a run twice adds nothing."""
        return self.point, self.machine, self.commit, self.time

    def to_row(self) -> dict[str, Any]:
        """The flat JSON object of this entry."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        point, machine = values.pop("point"), values.pop("machine")
        place = {"provider": point.provider, "workload": point.workload.to_dict()}
        place |= {"mode": point.mode, "regime": point.regime}
        return {"schema_version": SCHEMA_VERSION, "commit": values.pop("commit"), **asdict(machine), **place, **values}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Entry:
        """The inverse of `to_row`.

        Raises:
            ValueError: when this is no row of this schema version.
        """
        if not isinstance(row, dict) or row.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"this is no row of a history of schema version {SCHEMA_VERSION}")
        try:
            point = Point(row["provider"], Workload.from_dict(row["workload"]), row["mode"], row["regime"])
            machine = Machine(*(row[field.name] for field in fields(Machine)))
            names = [field.name for field in fields(cls) if field.name not in ("point", "machine")]
            return cls(point, machine, **{name: row[name] for name in names})
        except (KeyError, TypeError) as fault:
            raise ValueError(f"this is no row of a history: {type(fault).__name__}: {fault}") from None


@dataclass(frozen=True)
class Value:
    """A series at one commit: the median, where it was measured more than once."""

    commit: str
    latency_ms: float


@dataclass(frozen=True)
class Step:
    """Where a series changes its level.

    Attributes:
        index: of the first value at the new level.
        before, commit: the last commit at the old level and the first at the new one.
        ratio: new level / old level; above 1 is slower.
        confirmed: False for the newest value, which alone may be an outlier.
    """

    index: int
    before: str
    commit: str
    ratio: float
    confirmed: bool = True


@dataclass(frozen=True)
class Series:
    """One point on one machine over commits, oldest first, with its steps."""

    point: Point
    machine: Machine
    values: tuple[Value, ...]
    steps: tuple[Step, ...]

    def levels_ms(self) -> list[tuple[int, int, float]]:
        """(first index, index after the last, median) of each level between confirmed steps."""
        starts = [0, *(step.index for step in self.steps if step.confirmed)]
        times = [value.latency_ms for value in self.values]
        return [(i, j, float(np.median(times[i:j]))) for i, j in zip(starts, [*starts[1:], len(times)])]


def entries_of(records: Iterable[Record], environment: dict[str, Any], commit: str | None = None) -> list[Entry]:
    """The entries that a run adds; points that are not supported on its machine add none.

    Args:
        records, environment: of the run.
        commit: that the run measured, as git names it; None means that of mdnbench in the environment.

    Raises:
        ValueError: when there is no commit, or it is neither known to git here nor a hash.
    """
    if commit is None:
        commit = environment.get("git_commit")
        if commit is None:
            raise ValueError("the run was not measured from a git checkout of mdnbench: name its commit by --commit")
        commit += "+" if environment.get("git_dirty") else ""
    else:
        commit = _hash_of(commit)
    gpu = environment.get("gpu") if environment.get("device") == "cuda" else None
    machine = Machine(
        environment.get("device_name"), gpu and gpu.get("driver"), environment.get("triton"), environment.get("torch")
    )
    made = _of_commit(commit.rstrip("+"), "%cI")
    return [
        Entry(
            record.point, machine, commit, made, record.time, record.status,
            record.latency_ms, record.latency_low_ms, record.latency_high_ms,
        )
        for record in records if record.status != "unsupported"
    ]  # fmt: skip


def _hash_of(name: str) -> str:
    """The full hash of a commit where git knows it here: HEAD, and a shortened hash, stand for it."""
    found = _of_commit(name, "%H")
    if found is None and not re.fullmatch(r"[0-9a-f]{7,40}", name):
        raise ValueError(f"--commit {name!r} is no commit that git knows here: give its hash, 7 to 40 hex digits")
    return found or name


def _of_commit(commit: str, form: str) -> str | None:
    """What git shows of a commit by a format, in the repository of the current folder or of mdnbench; None where
    neither knows it."""
    for folder in (Path.cwd(), Path(__file__).resolve().parent):
        command = ["git", "-C", str(folder), "show", "--no-patch", f"--format={form}", "--end-of-options"]
        try:
            run = subprocess.run([*command, f"{commit}^{{commit}}"], capture_output=True, text=True, check=False)
        except OSError:
            return None
        if run.returncode == 0 and run.stdout.strip():
            return run.stdout.strip()
    return None


def read(path: Path) -> list[Entry]:
    """All entries of a history; none where there is no file.

    Raises:
        ValueError: naming file and line, when a line is no row.
    """
    if path.is_dir():
        raise ValueError(f"--history {str(path)!r} is a folder: give a file, such as {path}/history.jsonl")
    if not path.exists():
        return []
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entries.append(Entry.from_row(json.loads(line)))
        except ValueError as fault:
            raise ValueError(f"{path} line {number}: {fault}: remove the line to go on") from None
    return entries


def append(path: Path, entries: Sequence[Entry]) -> int:
    """Add the entries that a history does not have yet. Returns how many those were.

    Raises:
        ValueError: as `read`, and when the file cannot be written to.
    """
    known = {entry.key for entry in read(path)}
    new = [entry for entry in {entry.key: entry for entry in entries}.values() if entry.key not in known]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry.to_row(), allow_nan=False) + "\n" for entry in new)
    except OSError as fault:
        raise ValueError(f"--history {str(path)!r} cannot be written to ({fault.strerror})") from None
    return len(new)


def series_of(entries: Iterable[Entry]) -> list[Series]:
    """One series for each point and machine, in the order in which they first came.

    Values are in the order in which the commits were made, or measured where that is not known for all of them.
    """
    groups: dict[tuple[Point, Machine], list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.latency_ms is not None:
            groups[entry.point, entry.machine].append(entry)
    found = []
    for (point, machine), group in groups.items():
        made = all(entry.commit_time for entry in group)
        group.sort(key=lambda entry: (_utc(entry.commit_time) if made else 0.0, entry.commit.endswith("+"), entry.time))
        times: dict[str, list[float]] = defaultdict(list)
        for entry in group:
            times[entry.commit].append(entry.latency_ms)
        values = tuple(Value(commit, float(np.median(several))) for commit, several in times.items())
        found.append(Series(point, machine, values, tuple(find_steps(values))))
    return found


def _utc(time: str) -> float:
    return datetime.fromisoformat(time.replace("Z", "+00:00")).timestamp()


def find_steps(values: Sequence[Value]) -> list[Step]:
    """Where the level of the latencies changes, oldest first; the newest value may make a step that is unconfirmed."""
    logs = np.log([value.latency_ms for value in values])
    starts = fit_levels(logs)
    ends = [*starts[1:], len(logs)]
    levels = [float(np.median(logs[i:j])) for i, j in zip(starts, ends)]
    steps = [
        Step(i, values[i - 1].commit, values[i].commit, math.exp(now - before))
        for i, before, now in zip(starts[1:], levels, levels[1:])
    ]
    last = len(logs) - 1
    if last - starts[-1] >= LEAST_VALUES:
        level = float(np.median(logs[starts[-1] : last]))
        change = logs[last] - level
        if abs(change) > max(UNCONFIRMED * noise_of(logs), LEAST_STEP):
            steps.append(Step(last, values[last - 1].commit, values[last].commit, math.exp(change), confirmed=False))
    return steps


def noise_of(logs: np.ndarray) -> float:
    """The standard deviation of a value about its level: from differences of neighbours, few of which span a step."""
    if len(logs) < 3:
        return LEAST_NOISE
    return max(LEAST_NOISE, float(np.median(np.abs(np.diff(logs)))) / (0.6745 * math.sqrt(2)))


def fit_levels(logs: np.ndarray) -> list[int]:
    """First indices of the levels of the best piecewise-constant fit, 0 first.

    Minimises the squared distance from the levels plus a penalty for each step, over all placements (dynamic
    programming, O(n^2)). A running median of three goes before it: single outliers vanish, steps stay where they are,
    and a step needs two values after it.

    Args:
        logs: [n] log latencies, oldest first.
    """
    n = len(logs)
    if n < 2 * LEAST_VALUES:
        return [0]
    padded = np.pad(logs, 1, mode="reflect")
    smooth = np.median(np.stack((padded[:-2], padded[1:-1], padded[2:])), axis=0)
    smooth = smooth - smooth.mean()  # so that squares do not cancel
    noise = noise_of(logs) * (1 + 3 / n)  # it is itself estimated from few values
    penalty = PENALTY * noise**2 * math.log(n)
    sums, squares = (np.concatenate(([0.0], np.cumsum(x))) for x in (smooth, smooth**2))
    best, begin = np.full(n + 1, math.inf), np.zeros(n + 1, dtype=int)
    best[0] = -penalty
    for end in range(LEAST_VALUES, n + 1):
        i = np.arange(end - LEAST_VALUES + 1)
        cost = best[i] + penalty + squares[end] - squares[i] - (sums[end] - sums[i]) ** 2 / (end - i)
        begin[end] = int(np.argmin(cost))
        best[end] = cost[begin[end]]
    starts = [int(begin[n])]
    while starts[0] > 0:
        starts.insert(0, int(begin[starts[0]]))
    return _without_small_steps(logs, starts)


def _without_small_steps(logs: np.ndarray, starts: list[int]) -> list[int]:
    """Join levels, the closest first, until all steps are worth naming."""
    while len(starts) > 1:
        levels = [np.median(part) for part in np.split(logs, starts[1:])]
        sizes = np.abs(np.diff(levels))
        smallest = int(np.argmin(sizes))
        if sizes[smallest] >= LEAST_STEP:
            break
        del starts[smallest + 1]
    return starts
