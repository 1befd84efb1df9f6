"""Is the head slower than the base? The statistics of `mdnbench gate` and `mdnbench compare`. Loads no torch.

A gate measures both revisions in fresh processes, in the order base, head, head, base, ... Each process is a block and
gives one time a point (`block_time_ms`). A block and its neighbour of the other revision are a pair, and
ln(head / base) of a pair is the unit of everything here (`paired`): what the machine does to both cancels, and a steady
drift cancels between pairs of opposite order.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from . import metrics
from .paired import CONFIDENCE, FALSE_DISCOVERY_RATE, Estimate, adjust, estimate, noise_floor
from .results import Point, Record

VERDICTS = ("slower", "undecided", "gone", "new", "faster", "same")
BASE, HEAD = "base", "head"
MOST_NOISE = 0.10  # where the machine varies by more than this, nothing is called the same
MEMORY_THRESHOLD = 0.01  # memory hardly varies from run to run: it is judged more strictly than time


@dataclass(frozen=True)
class Sides:
    """One quantity of a point on both sides; None where it is absent."""

    base: float | None = None
    head: float | None = None

    @property
    def ratio(self) -> float | None:
        """head / base."""
        return self.head / self.base if self.base and self.head is not None else None


@dataclass(frozen=True)
class Change:
    """What became of one point.

    Attributes:
        verdict: one of `VERDICTS`. "gone": it has a time in the base alone; "new": in the head alone.
        latency_ms: of two runs, the medians; of a gate, the medians of `block_time_ms` over the blocks.
        ratio, ratio_low, ratio_high: latency of head / base and its 95 % interval.
        p_value: two-sided, adjusted for the number of points; None where there was no test.
        limit: slower is only what is above 1 + limit: the threshold, or the noise floor of the machine where that is
            larger.
        floor: the noise floor, None where it is not known.
        peak_memory_bytes, saved_memory_bytes, relative_error: medians; the error is that of the worst tensor.
        reason: why a time is missing.
    """

    point: Point
    operator: str
    verdict: str
    latency_ms: Sides
    peak_memory_bytes: Sides = Sides()
    saved_memory_bytes: Sides = Sides()
    relative_error: Sides = Sides()
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    p_value: float | None = None
    limit: float | None = None
    floor: float | None = None
    reason: str | None = None

    @property
    def more_memory(self) -> bool:
        """Whether the head needs more memory, or keeps more for backward, by over 1 %."""
        return any((it.ratio or 1) > 1 + MEMORY_THRESHOLD for it in (self.peak_memory_bytes, self.saved_memory_bytes))


@dataclass(frozen=True)
class Untimed:
    """A point without a time on either side."""

    point: Point
    status: str
    reason: str | None


@dataclass(frozen=True)
class Comparison:
    """A comparison as reports show it.

    Attributes:
        base, head: what was compared, for people.
        threshold: 0.03 for 3 %.
        changes: a row a point.
        untimed: the points that no side has a time of.
        notes: what a reader must know beside the rows, a sentence each.
    """

    base: str
    head: str
    threshold: float
    changes: Sequence[Change]
    untimed: Sequence[Untimed] = ()
    notes: Sequence[str] = ()

    @property
    def exit_code(self) -> int:
        """1 when a point is slower, gone or needs more memory, else 3 when one is undecided, else 0."""
        if any(change.verdict in ("slower", "gone") or change.more_memory for change in self.changes):
            return 1
        return 3 if any(change.verdict == "undecided" for change in self.changes) else 0


@dataclass(frozen=True)
class MeasuredBlock:
    """The rows of one process: `side` is BASE or HEAD."""

    side: str
    records: Sequence[Record]


def block_time_ms(record: Record) -> float | None:
    """The time that a block gives for a point: the median of the samples on a GPU, the fastest one on a CPU.

    On a CPU, who else uses the machine makes samples longer and never shorter: on two busy cores, medians of the same
    code differed from process to process by 2 to 45 %, the fastest samples by 1 to 9 %.
    """
    time_ms = metrics.latency_ms(record)
    return min(record.samples_ms) if time_ms and record.point.workload.device == "cpu" else time_ms


def order(pairs: int) -> list[str]:
    """The sides of 2 `pairs` blocks in the order of measurement: base head head base, and so on."""
    return [side for pair in range(pairs) for side in ((BASE, HEAD) if pair % 2 == 0 else (HEAD, BASE))]


def verdict_of(found: Estimate, adjusted_p: float, threshold: float, floor: float | None = None) -> str:
    """slower, faster, same or undecided.

    The limit is the larger of `threshold` and `floor`. Slower and faster: significant, and the estimate is beyond the
    limit. Same: the estimate is within the threshold and its interval within the limit, so that a larger difference
    would have been seen; and the limit is no more than the threshold or 10 %. Undecided: neither.

    Args:
        threshold, floor: 0.03 stands for ratios between 1 / 1.03 and 1.03.
    """
    edge = math.log1p(max(threshold, floor or 0.0))
    if adjusted_p <= FALSE_DISCOVERY_RATE and abs(found.centre) > edge:
        return "slower" if found.centre > 0 else "faster"
    useful = edge <= math.log1p(max(threshold, MOST_NOISE))
    within = useful and found.low is not None and -edge <= found.low and found.high <= edge
    return "same" if within and abs(found.centre) <= math.log1p(threshold) else "undecided"


def compare_blocks(
    blocks: Sequence[MeasuredBlock], threshold: float, stored: Mapping[str, Sequence[Sequence[float]]] | None = None
) -> tuple[list[Change], list[Untimed]]:
    """The verdicts of a gate.

    Args:
        blocks: in the order measured, which is that of `order`.
        threshold: 0.03 for 3 %.
        stored: by the key of a point, for each earlier gate on this machine, log-ratios of the same code. The noise
            floor is the median of the floors of these gates and of this one.
    """
    rows = [{record.point: record for record in block.records} for block in blocks]
    changes: list[Change] = []
    untimed: list[Untimed] = []
    judged: list[tuple[Change, Estimate, float | None]] = []
    points = list(dict.fromkeys(point for row in rows for point in row))
    by_side = {side: [row for block, row in zip(blocks, rows) if block.side == side] for side in (BASE, HEAD)}
    by_point = {point: {side: [row.get(point) for row in its] for side, its in by_side.items()} for point in points}
    timed = [point for point in points if all(map(_has_time, by_point[point][HEAD])) and timed_pairs(blocks, point)]
    for point, sides in by_point.items():
        if point not in timed:
            _add_missing(point, sides, changes, untimed)
            continue
        log_ratios = pair_log_ratios(blocks, point)
        same_code = [*(stored or {}).get(point.key, ()), same_code_log_ratios(blocks, point)]
        found = [noise_floor(values, len(log_ratios), len(timed)) for values in same_code]
        known = [value for value in found if value is not None]
        floor = statistics.median_low(known) if known else None  # one gate in a busy hour does not blunt all to come
        lost = [it for it in sides[BASE] if not _has_time(it)]  # such pairs are left out: the head may still be slower
        reason = _why(BASE, lost, len(sides[BASE])) if lost else None
        change = _change(point, sides, "same", reason, block_time=True)
        judged.append((change, estimate(log_ratios), floor))
    adjusted = adjust([found.p_value for _, found, _ in judged])
    for (change, found, floor), p_value in zip(judged, adjusted):
        limit = max(threshold, floor or 0.0)
        ratios = {
            "ratio": math.exp(found.centre),
            "ratio_low": None if found.low is None else math.exp(found.low),
            "ratio_high": None if found.high is None else math.exp(found.high),
        }
        values = vars(change) | ratios
        values |= {
            "verdict": verdict_of(found, p_value, threshold, floor),
            "p_value": p_value,
            "limit": limit,
            "floor": floor,
        }
        changes.append(Change(**values))
    rank = {point: index for index, point in enumerate(points)}
    return sorted(changes, key=lambda change: rank[change.point]), untimed


def timed_pairs(blocks: Sequence[MeasuredBlock], point: Point) -> list[MeasuredBlock]:
    """The blocks of the pairs that have two times of a point."""
    has = [any(it.point == point and _has_time(it) for it in block.records) for block in blocks]
    return [blocks[i + k] for i in range(0, len(blocks) - 1, 2) if has[i] and has[i + 1] for k in (0, 1)]


def pair_log_ratios(blocks: Sequence[MeasuredBlock], point: Point) -> list[float]:
    """ln(head / base) of each pair of blocks that has two times of a point."""
    blocks = timed_pairs(blocks, point)
    times = _times(blocks, point)
    return [
        math.log(second / first) if blocks[index].side == BASE else math.log(first / second)
        for index, (first, second) in zip(range(0, len(times), 2), zip(times[::2], times[1::2]))
    ]


def same_code_log_ratios(blocks: Sequence[MeasuredBlock], point: Point) -> list[float]:
    """ln(later / earlier) of neighbouring blocks of one side: what the machine does by itself, at no extra cost."""
    blocks = timed_pairs(blocks, point)
    times = _times(blocks, point)
    return [
        math.log(times[index + 1] / times[index])
        for index in range(len(blocks) - 1)
        if blocks[index].side == blocks[index + 1].side
    ]


def compare_records(
    base: Sequence[Record], head: Sequence[Record], threshold: float
) -> tuple[list[Change], list[Untimed]]:
    """The verdicts of two runs of one process each.

    The interval of the ratio comes from the intervals of the two medians at 97.5 %, so that it holds at least 95 %. It
    covers the samples of the two processes, not how processes differ from one another: a gate measures that.
    """
    sides = {BASE: {it.point: it for it in base}, HEAD: {it.point: it for it in head}}
    changes: list[Change] = []
    untimed: list[Untimed] = []
    for point in dict.fromkeys([*sides[BASE], *sides[HEAD]]):
        rows = {side: [records.get(point)] for side, records in sides.items()}
        (before,), (after,) = rows[BASE], rows[HEAD]
        if not (_has_time(before) and _has_time(after)):
            _add_missing(point, rows, changes, untimed)
            continue
        part = (1 + CONFIDENCE) / 2
        first, second = (
            metrics.sampled_interval(before.samples_ms, part),
            metrics.sampled_interval(after.samples_ms, part),
        )
        change = _change(point, rows, "undecided")
        centre = math.log(change.latency_ms.ratio)
        low = math.log(second[0] / first[1]) if first and second else None
        high = math.log(second[1] / first[0]) if first and second else None
        different = low is not None and (low > 0 or high < 0)
        found = Estimate(centre, low, high, 0.0 if different else 1.0)
        values = {
            "verdict": verdict_of(found, found.p_value, threshold),
            "ratio": math.exp(centre),
            "ratio_low": None if low is None else math.exp(low),
            "ratio_high": None if high is None else math.exp(high),
            "limit": threshold,
        }
        changes.append(Change(**vars(change) | values))
    return changes, untimed


def _has_time(record: Record | None) -> bool:
    return record is not None and bool(metrics.latency_ms(record))


def _times(blocks: Sequence[MeasuredBlock], point: Point) -> list[float]:
    return [block_time_ms(next(it for it in block.records if it.point == point)) for block in blocks]


def _change(
    point: Point,
    sides: Mapping[str, Sequence[Record | None]],
    verdict: str,
    reason: str | None = None,
    block_time: bool = False,
) -> Change:
    present = {side: [it for it in records if it is not None] for side, records in sides.items()}

    def both(function: Callable[[Record], float | None]) -> Sides:
        values = {
            side: [value for it in records if (value := function(it)) is not None] for side, records in present.items()
        }
        return Sides(*(metrics.median(values[side]) if values[side] else None for side in (BASE, HEAD)))

    functions = {name: metric.function for name, metric in metrics.METRICS.items()}
    return Change(
        point,
        next(it.operator for records in present.values() for it in records),
        verdict,
        both(block_time_ms if block_time else functions["latency_ms"]),
        both(functions["peak_memory_bytes"]),
        both(functions["saved_memory_bytes"]),
        both(functions["max_relative_error"]),
        reason=reason,
    )


def _add_missing(
    point: Point,
    sides: Mapping[str, Sequence[Record | None]],
    changes: list[Change],
    untimed: list[Untimed],
) -> None:
    """A point that not every block has a time of: gone when a block of the head lacks it, though the base has it."""
    missing = {side: [it for it in records if not _has_time(it)] for side, records in sides.items()}
    there = {side: len(missing[side]) < len(records) for side, records in sides.items()}
    side = HEAD if missing[HEAD] and there[BASE] else BASE
    if not there[BASE] and not there[HEAD]:
        first = next(it for records in (missing[HEAD], missing[BASE]) for it in records if it is not None)
        reason = "it was checked, not timed" if first.status == "ok" else first.reason
        untimed.append(Untimed(point, first.status, reason))
        return
    reason = _why(side, missing[side], len(sides[side]))
    changes.append(_change(point, sides, "gone" if side == HEAD else "new", reason))


def _why(side: str, lost: Sequence[Record | None], blocks: int) -> str:
    """Why a side has no time in some of its blocks, by the first of the rows without one."""
    first = lost[0]
    reason = "it is not in this side's run" if first is None else f"{first.status}: {first.reason or 'no reason given'}"
    return f"{side}: {reason}" + (f" (in {len(lost)} of {blocks} blocks)" if len(lost) < blocks else "")
