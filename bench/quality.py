"""What a reader of a time must know: slow starts, outliers, wide intervals, throttling, clocks that drift. No torch.

Every note says what was seen and what to do about it. All are computed from stored rows: nothing is dropped.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from .metrics import half_width, median, slowed_by, sm_clock_mhz
from .results import Point, Record, under_load

MOST_CLOCK_DRIFT = 0.03  # between points that are compared
MOST_SLOW_START = 0.05  # the first block against those after it
FAR = 14.826  # robust z-score of an outlier: ten times the median distance from the median, of a normal distribution
FAR_TIMES = 1.05  # and by so much of the median at least: samples that agree to less are no outliers
MOST_OUTLIERS = 0.02  # part of the samples: fewer are usual
USUAL_PRECISION = 0.005  # part of the median that the interval of a row without a target should stay within


class Note(NamedTuple):
    """One thing that was seen.

    Attributes:
        kind: "throttled", "slow start", "outliers" or "imprecise".
        seen: what, with its figures, of one row.
        remedy: what to do.
        size: how much of it, to find the worst of a kind.
    """

    kind: str
    seen: str
    remedy: str
    size: float


def notes(record: Record) -> list[Note]:
    """What there is to know about the samples of a row; empty for one without a time."""
    if record.status != "ok" or not record.samples_ms:
        return []
    found = (_throttled(record), _slow_start(record), _outliers(record), _imprecise(record))
    return [note for note in found if note is not None]


def clock_drift(records: Sequence[Record]) -> str | None:
    """A sentence, with its remedy, when the lowest SM clocks of points that are compared differ by over 3 %; else None.

    A comparison is two or more points of one workload, mode and regime, which are measured in alternation.
    """
    alike: dict[Point, list[tuple[float, str]]] = defaultdict(list)
    for record in records:
        clock = sm_clock_mhz(record) if record.status == "ok" else None
        if clock is not None:
            alike[record.point.group].append((clock, record.point.provider))
    groups = {group: clocks for group, clocks in alike.items() if len(clocks) > 1}
    apart = [
        (max(clocks)[0] / min(clocks)[0], group)
        for group, clocks in groups.items()
        if max(clocks)[0] > min(clocks)[0] * (1 + MOST_CLOCK_DRIFT)
    ]
    if not apart:
        return None
    ratio, group = max(apart, key=lambda pair: pair[0])
    (low, slowest), (high, fastest) = min(groups[group]), max(groups[group])
    return (
        f"SM clocks differ by more than {MOST_CLOCK_DRIFT:.0%} in {len(apart)} of {len(groups)} comparisons, at worst "
        f"by {ratio - 1:.1%} within {group.key.strip()}: {slowest} fell to {low:.0f} MHz, {fastest} to {high:.0f} MHz; "
        f"lock them with nvidia-smi --lock-gpu-clocks={_steady_clock(low)} (as root), or compare the times knowing this"
    )


def clocks_between(first: Sequence[Record], second: Sequence[Record]) -> list[str]:
    """A sentence, with its remedy, when points of two runs were measured at SM clocks over 3 % apart."""
    clocks = [
        {record.point: sm_clock_mhz(record) for record in run if record.status == "ok"} for run in (first, second)
    ]
    ratios = {point: clocks[1][point] / clock for point, clock in clocks[0].items() if clock and clocks[1].get(point)}
    apart = [point for point, ratio in ratios.items() if max(ratio, 1 / ratio) > 1 + MOST_CLOCK_DRIFT]
    if not apart:
        return []
    worst = max(apart, key=lambda point: abs(math.log(ratios[point])))
    return [
        f"SM clocks of {len(apart)} of {len(ratios)} points differ by more than {MOST_CLOCK_DRIFT:.0%} between the "
        f"runs, at worst {clocks[0][worst]:.0f} and {clocks[1][worst]:.0f} MHz at {worst.key}: measure both again with "
        f"locked clocks (nvidia-smi --lock-gpu-clocks)."
    ]


def summary(records: Sequence[Record]) -> list[str]:
    """The notes of many rows, one sentence a kind with how many rows it concerns and the worst of them."""
    kinds: dict[str, list[tuple[Note, Record]]] = defaultdict(list)
    for record in records:
        for note in notes(record):
            kinds[note.kind].append((note, record))
    lines = []
    for kind, found in kinds.items():
        worst, record = max(found, key=lambda pair: pair[0].size)
        count = f"{len(found)} of {len(records)} rows"
        lines.append(f"{kind.capitalize()}: {count}, at worst {record.point.key}: {worst.seen}; {worst.remedy}")
    return lines


def _throttled(record: Record) -> Note | None:
    reasons = slowed_by(record)
    if not reasons:
        return None
    blocks = sum(any(r.slowed_by for r in under_load(block)) for block in record.gpu)
    clock = sm_clock_mhz(record)
    at = "" if clock is None else f", down to {clock:.0f} MHz"
    return Note(
        "throttled",
        f"the GPU was held back by {' and '.join(reasons)} in {blocks} of {len(record.gpu)} blocks{at}",
        "lock lower clocks with nvidia-smi --lock-gpu-clocks, cool the GPU, or read the time as that of a hot GPU",
        blocks / len(record.gpu),
    )


def _slow_start(record: Record) -> Note | None:
    sizes = record.block_samples
    if len(sizes) < 2:
        return None
    first, rest = record.samples_ms[: sizes[0]], record.samples_ms[sizes[0] :]
    if not rest or median(first) <= median(rest) * (1 + MOST_SLOW_START):
        return None
    ends = list(accumulate(sizes))
    slowest_later = max(median(record.samples_ms[start:end]) for start, end in pairwise(ends) if end > start)
    if median(first) <= slowest_later * (1 + MOST_SLOW_START):  # blocks vary as much later on: not a start
        return None
    return Note(
        "slow start",
        f"the first block took {median(first) / median(rest):.2f} times as long as those after it",
        "measure for longer with --min-time, so that what warms up weighs less",
        median(first) / median(rest),
    )


def _outliers(record: Record) -> Note | None:
    middle = median(record.samples_ms)
    distances = [abs(x - middle) for x in record.samples_ms]
    scale = median(distances)
    far_ms = max(FAR * scale, (FAR_TIMES - 1) * middle)
    far = [x for x, distance in zip(record.samples_ms, distances) if scale and distance > far_ms]
    if len(far) <= MOST_OUTLIERS * len(distances) or len(far) < 2:
        return None
    farthest = max(far, key=lambda x: abs(math.log(x / middle)))
    return Note(
        "outliers",
        f"{len(far)} of {len(distances)} samples are far from the median, the farthest {farthest / middle:.2f} "
        f"times it",
        "end other programs on this machine and measure again; the median itself is little moved",
        len(far) / len(distances),
    )


def _imprecise(record: Record) -> Note | None:
    width, target = half_width(record.samples_ms), record.precision
    if width is not None and width <= (USUAL_PRECISION if target is None else target):
        return None
    known = "no interval" if width is None else f"± {width:.1%}"
    aim = "" if target is None else f" in place of ± {target:.1%}"
    stop = "" if record.stop_reason is None else f" (stopped by: {record.stop_reason})"
    return Note(
        "imprecise",
        f"{known}{aim} after {len(record.samples_ms)} samples{stop}",
        "raise --time-limit: four times the samples halve an interval",
        math.inf if width is None else width,
    )


def _steady_clock(clock_mhz: float) -> int:
    """A clock that a GPU which was held at `clock_mhz` keeps: a little below, in the steps of 15 MHz that GPUs have."""
    return int(clock_mhz * 0.9) // 15 * 15
