"""How well two runs of the same sweep on the same machine agree: the repeatability of medians and their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mdnbench.bench.metrics import latency_ms, reported_interval, sampled_interval, sm_clock_mhz
from mdnbench.bench.quality import notes
from mdnbench.bench.results import Record

if TYPE_CHECKING:
    from rich.console import Console

HEADER = ("point", "first ms", "second ms", "difference", "± first", "± second", "SM MHz", "flags")


@dataclass(frozen=True)
class Pair:
    """One point in both runs.

    Attributes:
        first, second: its rows, both with a time.
        difference: second / first - 1, of the medians.
        agrees: whether the difference is within the limit.
        covered: whether the second median lies in the first one's interval as reported; None where there is none.
        sampled: the same of the interval of the samples, without the least width of what is reported.
    """

    first: Record
    second: Record
    difference: float
    agrees: bool
    covered: bool | None
    sampled: bool | None


@dataclass(frozen=True)
class Agreement:
    """Two runs of one sweep.

    Attributes:
        limit: 0.01 for 1 %.
        pairs: the points that both runs have a time of.
        alone: how many points only one of them has a time of.
    """

    limit: float
    pairs: Sequence[Pair]
    alone: int

    def count(self, regime: str | None = None) -> tuple[int, int, int]:
        """Points, those that agree, and those whose first interval holds the second median, of one regime or all."""
        chosen = [pair for pair in self.pairs if regime in (None, pair.first.point.regime)]
        return len(chosen), sum(pair.agrees for pair in chosen), sum(pair.covered is True for pair in chosen)


def agreement(first: Sequence[Record], second: Sequence[Record], limit: float = 0.01) -> Agreement:
    """Pair the points of two runs."""
    times = [{record.point: record for record in run if latency_ms(record)} for run in (first, second)]
    pairs = []
    for point in [point for point in times[0] if point in times[1]]:
        before, after = times[0][point], times[1][point]
        middle = latency_ms(after)
        difference = middle / latency_ms(before) - 1
        covered, sampled = (
            None if interval is None else interval[0] <= middle <= interval[1]
            for interval in (reported_interval(before.samples_ms), sampled_interval(before.samples_ms))
        )
        pairs.append(Pair(before, after, difference, abs(difference) <= limit, covered, sampled))
    return Agreement(limit, pairs, len(times[0].keys() ^ times[1].keys()))


def lines(found: Agreement) -> list[str]:
    """The counts in words, a line a regime."""
    regimes = list(dict.fromkeys(pair.first.point.regime for pair in found.pairs))
    texts = []
    for regime in regimes:
        points, agree, covered = found.count(regime)
        sampled = sum(pair.sampled is True for pair in found.pairs if pair.first.point.regime == regime)
        texts.append(
            f"{regime}: of {points} points, {agree} medians ({agree / points:.1%}) agree within "
            f"{100 * found.limit:g} %; {covered} second medians ({covered / points:.1%}) lie in the first interval, "
            f"{sampled} ({sampled / points:.1%}) in that of its samples alone"
        )
    return texts + ([f"{found.alone} points have a time in one of the runs alone"] if found.alone else [])


def rows(found: Agreement) -> list[tuple[str, ...]]:
    """The points that miss either, those furthest apart first, with what is known about their measurement."""
    misses = [pair for pair in found.pairs if not pair.agrees or not pair.covered]
    return [_row(pair) for pair in sorted(misses, key=lambda pair: -abs(pair.difference))]


def markdown(found: Agreement) -> str:
    """Counts and misses as a Markdown document."""
    table = [HEADER, ("---", *["---:"] * 6, "---"), *rows(found)]
    text = [f"| {' | '.join(line)} |" for line in table] if len(table) > 2 else ["No point misses."]
    return "\n".join([*(f"- {line}." for line in lines(found)), "", *text, ""])


def show(console: Console, found: Agreement) -> None:
    """Print misses, then the counts."""
    from .render import print_table
    from .tables import Cell

    cells = [[Cell(text) for text in row] for row in rows(found)]
    if cells:
        print_table(console, HEADER, cells, [False, *[True] * 6, False])
        console.print()
    for line in lines(found):
        console.print(line, markup=False, soft_wrap=True)


def to_json(found: Agreement) -> dict[str, Any]:
    """Plain values."""
    return {
        "limit": found.limit,
        "alone": found.alone,
        "pairs": [
            {
                "point": it.first.point.key,
                "difference": it.difference,
                "agrees": it.agrees,
                "covered": it.covered,
                "sampled": it.sampled,
            }
            for it in found.pairs
        ],
    }


def _row(pair: Pair) -> tuple[str, ...]:
    flags = dict.fromkeys(note.kind for record in (pair.first, pair.second) for note in notes(record))
    clocks = [sm_clock_mhz(record) for record in (pair.first, pair.second)]
    parts = [] if pair.agrees else ["beyond the limit"]
    parts += {True: [], False: ["outside of the interval"], None: ["no interval"]}[pair.covered]
    return (
        pair.first.point.key,
        f"{latency_ms(pair.first):.4g}",
        f"{latency_ms(pair.second):.4g}",
        f"{pair.difference:+.2%}",
        _width(pair.first),
        _width(pair.second),
        "-" if None in clocks else " ".join(f"{clock:.0f}" for clock in clocks),
        "; ".join([", ".join(parts), *flags]),
    )


def _width(record: Record) -> str:
    interval = reported_interval(record.samples_ms)
    return "-" if interval is None else f"{(interval[1] - interval[0]) / 2 / latency_ms(record):.2%}"
