"""Notes on samples: throttling, slow starts, outliers, wide intervals, clocks that drift."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from mdnbench.baselines.workload import Workload
from mdnbench.bench.quality import clock_drift, clocks_between, notes, summary
from mdnbench.bench.results import GpuReading, Point, Record

POINT = Point("p", Workload(seq_len=128, head_dim_k=8, head_dim_v=8, device="cuda"), "forward", "graph")


def record(samples=(1.0,) * 40, blocks=(20, 20), provider: str = "p", clock: int | None = None, **changes) -> Record:
    gpu = (
        () if clock is None else ((GpuReading("before", 345), GpuReading("during", clock), GpuReading("after", 1980)),)
    )
    values = {"samples_ms": tuple(samples), "block_samples": tuple(blocks), "gpu": gpu, "precision": 0.005}
    found = Record(replace(POINT, provider=provider), "x", "ok", None, 0, "2026-01-01", **values)
    return replace(found, **changes)


def kinds(found: Record) -> list[str]:
    return [note.kind for note in notes(found)]


def noise(count: int, seed: int = 0, scale: float = 0.001) -> list[float]:
    rng = random.Random(seed)
    return [1 + rng.gauss(0, scale) for _ in range(count)]


def test_a_good_measurement_has_no_notes() -> None:
    assert notes(record(noise(200), (100, 100))) == []
    assert notes(record(status="timeout")) == []
    assert notes(record(samples=(), blocks=())) == []


def test_a_slow_first_block_is_a_slow_start_and_a_restless_machine_is_not() -> None:
    slow = [1.2 * x for x in noise(50)]
    (note,) = [note for note in notes(record(slow + noise(150), (50, 50, 50, 50))) if note.kind == "slow start"]
    assert note.seen == "the first block took 1.20 times as long as those after it"
    assert "--min-time" in note.remedy
    restless = slow + noise(50) + slow + noise(50)
    assert "slow start" not in kinds(record(restless, (50, 50, 50, 50)))
    assert "slow start" not in kinds(record(slow, (50,)))


def test_outliers_are_counted_and_kept() -> None:
    disturbed = [*noise(95), 3.0, 3.5, 2.0, 4.0, 2.5]
    (note,) = [note for note in notes(record(disturbed, (100,))) if note.kind == "outliers"]
    assert note.seen.startswith("5 of 100 samples are far from the median, the farthest 4.00 times it")
    assert "outliers" not in kinds(record([*noise(99), 3.0], (100,)))  # one in a hundred is usual
    assert "outliers" not in kinds(record([1.0, 1.0001, 0.9999, 1.0001, 1.02, 0.98], (6,)))  # they agree to 2 %
    assert "outliers" in kinds(record([1.0, 1.0001, 0.9999, 1.0001, 1.2, 1.3], (6,)))
    assert "outliers" not in kinds(record([1.0] * 30 + [1.1] * 10, (40,)))  # no scale to judge by


def test_a_wide_interval_says_why_sampling_ended() -> None:
    wide = record(noise(40, scale=0.2), stop_reason="time limit")
    (note,) = notes(wide)
    assert note.kind == "imprecise"
    assert note.seen.endswith("in place of ± 0.5% after 40 samples (stopped by: time limit)")
    assert notes(record((1.0, 1.1, 1.2), (3,), stop_reason="long calls"))[0].seen.startswith("no interval in place")
    (note,) = notes(replace(wide, precision=None, stop_reason=None))  # rows of earlier versions have no target
    assert note.seen.endswith("% after 40 samples")
    assert "in place of" not in note.seen
    assert notes(record(noise(200), (100, 100), precision=None)) == []


def test_throttling_is_named_with_blocks_and_clock() -> None:
    held = GpuReading("during", 1200, slowed_by=("power cap",))
    found = record(gpu=((GpuReading("before"), held), (GpuReading("before"), GpuReading("during", 1300))))
    (note,) = notes(found)
    assert note.seen == "the GPU was held back by power cap in 1 of 2 blocks, down to 1200 MHz"
    before = GpuReading("before", slowed_by=("power cap",))  # of whatever ran before
    assert notes(record(gpu=((before, GpuReading("during", 1980)),))) == []


def test_clock_drift_is_seen_within_a_comparison_only() -> None:
    other = replace(POINT, workload=POINT.workload.with_(seq_len=256))
    near = [record(provider="a", clock=1980), record(provider="b", clock=1930)]
    apart = replace(record(provider="c", clock=1200), point=other)
    assert clock_drift([*near, apart]) is None
    text = clock_drift([*near, record(provider="c", clock=1800), apart])
    assert text.startswith("SM clocks differ by more than 3% in 1 of 1 comparisons, at worst by 10.0% within forward")
    beside = replace(apart, point=replace(other, provider="d"))  # with it there are two of the other workload
    assert "in 1 of 2 comparisons" in clock_drift([*near, record(provider="c", clock=1800), apart, beside])
    assert "c fell to 1800 MHz, a to 1980 MHz" in text
    assert "--lock-gpu-clocks=1620" in text
    after = ((GpuReading("before", 1980), GpuReading("during", 1980), GpuReading("after", 1815)),)
    assert "b fell to 1815 MHz, a to 1980" in clock_drift([*near[:1], record(provider="b", gpu=after)])
    assert clock_drift([record(provider="a"), replace(record(provider="b", clock=900), status="crashed")]) is None


def test_clocks_of_two_runs_are_compared_point_by_point() -> None:
    first = [record(provider="a", clock=1980), record(provider="b", clock=1980), record(provider="c")]
    second = [record(provider="a", clock=1950), record(provider="b", clock=1500), record(provider="c", clock=900)]
    (text,) = clocks_between(first, second)
    assert text.startswith("SM clocks of 1 of 2 points differ by more than 3% between the runs, at worst 1980 and 1500")
    assert clocks_between(first, first) == []


def test_a_summary_has_one_sentence_a_kind() -> None:
    wide = [
        record(noise(40, 0, scale), provider=name, stop_reason="time limit")
        for name, scale in (("a", 0.1), ("b", 0.3), ("c", 0.2))
    ]
    (text,) = summary([*wide, record()])
    assert text.startswith("Imprecise: 3 of 4 rows, at worst b forward graph B1 T128")
    assert text.endswith("raise --time-limit: four times the samples halve an interval")


@pytest.mark.parametrize("blocks", [(), (40,)])
def test_rows_without_blocks_have_no_start(blocks: tuple[int, ...]) -> None:
    assert kinds(record([2.0] * 20 + [1.0] * 20, blocks)) == ["imprecise"]
