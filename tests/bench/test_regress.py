"""Verdicts: the statistics against exact enumeration and simulation, then what becomes of points."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from mdnbench.baselines.workload import Workload
from mdnbench.bench import paired, regress
from mdnbench.bench.regress import BASE, HEAD, Comparison, MeasuredBlock, compare_blocks, compare_records
from mdnbench.bench.results import Point, Record

WORKLOAD = Workload(64, 16, 32, heads=2, chunk_size=32)


def record(
    provider: str = "mdn-torch", latency_ms: float | None = 1.0, workload: Workload = WORKLOAD, **values
) -> Record:
    samples = () if latency_ms is None else tuple(latency_ms * (1 + k / 1000) for k in range(20))
    status = {"status": "ok", "reason": None} if latency_ms else {"status": "crashed", "reason": "killed by SIGSEGV"}
    common = {"operator": "mdn", "seed": 0, "time": "2026-01-31T12:00:00.000+00:00", "samples_ms": samples}
    return Record(Point(provider, workload, "forward", "eager"), **common | status | values)


def blocks_of(times: dict[str, np.ndarray], pairs: int) -> list[MeasuredBlock]:
    """Blocks whose times in ms are given by provider, one a block in the order of measurement."""
    return [
        MeasuredBlock(side, [record(name, values[index]) for name, values in times.items()])
        for index, side in enumerate(regress.order(pairs))
    ]


def brute_force_p(values: np.ndarray) -> float:
    """Two-sided p of the signed-rank sum by all 2^n flips of signs."""
    ranks = np.argsort(np.argsort(np.abs(values))) + 1
    middle = ranks.sum() / 2
    seen = abs(ranks[values > 0].sum() - middle)
    flips = np.array(list(itertools.product((0, 1), repeat=len(values))))
    return float((np.abs(flips @ ranks - middle) >= seen - 1e-9).mean())


@pytest.mark.parametrize("count", [3, 6, 8, 11])
def test_p_is_that_of_all_flips_of_signs(count: int) -> None:
    draw = np.random.default_rng(count)
    for shift in (0.0, 0.3, 1.0):
        values = draw.normal(shift, 1, count)
        assert paired.estimate(values).p_value == pytest.approx(brute_force_p(values), abs=1e-12)


def test_eight_pairs_of_one_sign_reach_two_in_256() -> None:
    found = paired.estimate([0.1 + k / 1000 for k in range(8)])
    assert found.p_value == 2 / 256
    assert found.low < 0.1035 < found.high
    assert found.centre == pytest.approx(0.1035)


def test_ties_and_zeros_never_make_a_p_smaller() -> None:
    assert paired.estimate([0.0] * 8).p_value == 1.0
    values = np.array([0.1, -0.1, 0.1, 0.1, 0.2, 0.3, 0.3, 0.0])
    apart = values + np.arange(8) * 1e-9  # the same without ties, which the enumeration can rank
    assert paired.estimate(values).p_value >= brute_force_p(apart)


def test_few_pairs_have_an_estimate_and_no_interval() -> None:
    assert paired.estimate([0.1] * 5).low is None
    assert paired.estimate([0.1] * 6).low is not None
    with pytest.raises(ValueError, match="log_ratios is empty"):
        paired.estimate([])


@pytest.mark.parametrize("noise", ["normal", "heavy tails"])
def test_intervals_hold_the_centre_95_times_in_100(noise: str) -> None:
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        values = draw.normal(0, 1, 10) if noise == "normal" else draw.standard_t(1.5, 10)
        found = paired.estimate(values)
        held += found.low <= 0 <= found.high
    assert 0.945 <= held / 2000 <= 0.97  # 10 pairs: the exact coverage is 95.1 %


def test_one_disturbed_block_moves_neither_estimate_nor_interval() -> None:
    found = paired.estimate([*(0.001 * k for k in range(-5, 6)), 2.0])
    assert abs(found.centre) < 0.002
    assert found.high < 0.006


def test_benjamini_hochberg_against_its_definition() -> None:
    p_values = [0.01, 0.8, 0.02, 0.03, 0.005]
    adjusted = paired.adjust(p_values)
    assert adjusted == pytest.approx([0.025, 0.8, 1 / 30, 0.0375, 0.025])
    for rate in (0.02, 0.03, 0.035, 0.05):
        ordered = sorted(p_values)
        most = max((k for k in range(1, 6) if ordered[k - 1] <= k * rate / 5), default=0)
        assert sum(p <= rate for p in adjusted) == most
    assert paired.adjust([]) == []


def test_enough_pairs_are_taken_for_one_slow_point_among_many() -> None:
    for points in (1, 2, 10, 12, 100, 1000):
        pairs = paired.pairs_needed(points)
        p_values = [2 / 2**pairs, *[1.0] * (points - 1)]
        assert paired.adjust(p_values)[0] <= paired.FALSE_DISCOVERY_RATE
        assert pairs >= 12
        assert pairs % 2 == 0
    assert [paired.pairs_needed(points) for points in (1, 100, 1000)] == [12, 12, 16]


def test_order_is_base_head_head_base_and_neighbours_pair_up() -> None:
    assert regress.order(3) == [BASE, HEAD, HEAD, BASE, BASE, HEAD]
    blocks = blocks_of({"mdn-torch": np.array([1.0, 2.0, 4.0, 1.0, 1.1, 3.3])}, 3)
    (point,) = {it.records[0].point for it in blocks}
    assert regress.pair_log_ratios(blocks, point) == pytest.approx([math.log(2), math.log(4), math.log(3)])
    assert regress.same_code_log_ratios(blocks, point) == pytest.approx([math.log(2), math.log(1.1)])


def test_the_noise_floor_grows_with_the_noise_and_shrinks_with_pairs() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(0, 0.02, 200)
    floor = paired.noise_floor(values, 10, 10)
    assert 0.02 < floor < 0.05
    assert paired.noise_floor(values * 3, 10, 10) == pytest.approx(3 * floor, rel=0.1)
    assert paired.noise_floor(values, 40, 10) < 0.6 * floor
    assert paired.noise_floor(values, 10, 1) < floor
    assert paired.noise_floor(values, 10, 10) == floor  # the same data gives the same verdict
    assert paired.noise_floor(values[:5], 10, 10) is None
    assert paired.noise_floor(values, 5, 10) is None


@pytest.mark.parametrize(
    ("centre", "half", "p_value", "floor", "verdict"),
    [
        (0.10, 0.02, 0.01, None, "slower"),
        (-0.10, 0.02, 0.01, None, "faster"),
        (0.10, 0.02, 0.06, None, "undecided"),  # not significant
        (0.02, 0.005, 0.001, None, "same"),  # real, and below the threshold
        (0.00, 0.02, 0.8, None, "same"),
        (0.00, 0.04, 0.8, None, "undecided"),  # 4 % slower might be
        (0.00, 0.04, 0.8, 0.05, "same"),  # the machine cannot see less
        (0.04, 0.005, 0.001, 0.05, "undecided"),  # beyond the threshold, within the noise
        (0.06, 0.005, 0.001, 0.05, "slower"),
        (0.00, 0.10, 0.8, 0.30, "undecided"),  # nothing is the same to within 30 %
    ],
)
def test_verdicts(centre: float, half: float, p_value: float, floor: float | None, verdict: str) -> None:
    found = paired.Estimate(centre, centre - half, centre + half, p_value)
    assert regress.verdict_of(found, p_value, 0.03, floor) == verdict


def test_gates_without_and_with_a_change() -> None:
    """12 gates of 6 points and 24 pairs, with 1 % noise and one disturbed block in 100; and 12 with one provider 10 %
    slower."""
    draw = np.random.default_rng(3)
    names = [f"toy-{k}" for k in range(6)]
    wrong, found, alone = 0, 0, 0
    for gate in range(24):
        times = {}
        for name in names:
            noise = draw.normal(0, 0.007, 48) + (draw.random(48) < 0.01) * draw.exponential(0.3, 48)
            slower = [1.1 if gate % 2 and side == HEAD and name == "toy-0" else 1.0 for side in regress.order(24)]
            times[name] = np.exp(noise) * slower
        stored = {record(name).point.key: [draw.normal(0, 0.01, 30)] for name in names}
        changes, _ = compare_blocks(blocks_of(times, 24), 0.03, stored)
        slow = {change.point.provider for change in changes if change.verdict == "slower"}
        if gate % 2:
            found += slow == {"toy-0"}
        else:
            wrong += bool(slow)
            alone += Comparison("a", "b", 0.03, changes).exit_code == 0
    assert wrong == 0
    assert alone >= 10
    assert found >= 11


def test_a_point_that_fails_in_the_head_is_gone_and_the_gate_fails() -> None:
    blocks = blocks_of({"mdn-torch": np.ones(16), "gdn-torch": np.ones(16)}, 8)
    broken = [
        replace(it, records=[it.records[0], record("gdn-torch", None)]) if it.side == HEAD and index > 12 else it
        for index, it in enumerate(blocks)
    ]
    changes, untimed = compare_blocks(broken, 0.03)
    assert [(change.point.provider, change.verdict) for change in changes] == [
        ("mdn-torch", "same"), ("gdn-torch", "gone")
    ]  # fmt: skip
    assert changes[1].reason == "head: crashed: killed by SIGSEGV (in 2 of 8 blocks)"
    assert not untimed
    assert Comparison("a", "b", 0.03, changes).exit_code == 1


def test_a_point_that_fails_in_a_block_of_the_base_is_judged_by_the_other_pairs() -> None:
    blocks = blocks_of({"gdn-torch": np.array([1.0 if side == BASE else 1.5 for side in regress.order(8)])}, 8)
    blocks[0] = replace(blocks[0], records=[record("gdn-torch", None)])
    (change,), untimed = compare_blocks(blocks, 0.03)
    assert change.verdict == "slower"
    assert change.ratio == pytest.approx(1.5)
    assert change.reason == "base: crashed: killed by SIGSEGV (in 1 of 8 blocks)"
    assert len(regress.pair_log_ratios(blocks, change.point)) == 7
    assert not untimed


def test_a_new_point_and_one_without_a_time_do_not_fail_the_gate() -> None:
    blocks = [
        MeasuredBlock(side, [record(), record("new", 1.0 if side == HEAD else None), record("never", None)])
        for side in regress.order(8)
    ]
    changes, untimed = compare_blocks(blocks, 0.03)
    assert [change.verdict for change in changes] == ["same", "new"]
    assert [(it.point.provider, it.status) for it in untimed] == [("never", "crashed")]
    assert Comparison("a", "b", 0.03, changes).exit_code == 0


def test_more_memory_fails_the_gate_and_less_does_not() -> None:
    for head, code in ((1005, 0), (1020, 1), (500, 0)):
        blocks = [
            MeasuredBlock(side, [record(peak_memory_bytes=head if side == HEAD else 1000)]) for side in regress.order(8)
        ]
        changes, _ = compare_blocks(blocks, 0.03)
        assert changes[0].verdict == "same"
        assert Comparison("a", "b", 0.03, changes).exit_code == code


def test_a_block_gives_the_fastest_sample_on_a_cpu_and_the_median_on_a_gpu() -> None:
    samples = (3.0, 1.0, 2.0)
    assert regress.block_time_ms(record(samples_ms=samples)) == 1.0
    assert regress.block_time_ms(record(samples_ms=samples, workload=WORKLOAD.with_(device="cuda"))) == 2.0
    assert regress.block_time_ms(record(latency_ms=None)) is None


def test_points_without_a_time_in_two_runs_keep_their_reason() -> None:
    wrong = replace(record("wrong", None), status="incorrect", reason="o holds NaN")
    checked = replace(record("checked", None), status="ok", reason=None)
    for runs in (([], [wrong, checked]), ([wrong, checked], [])):
        changes, untimed = compare_records(*runs, 0.03)
        assert not changes
        assert [(it.status, it.reason) for it in untimed] == [
            ("incorrect", "o holds NaN"), ("ok", "it was checked, not timed")
        ]  # fmt: skip


def test_two_runs() -> None:
    base = [record("a"), record("b"), record("c"), record("d"), record("e", samples_ms=(1.0, 1.0)), record("x", None)]
    head = [record("a", 1.1), record("b", 1.001), record("c", 0.8), record("new"), record("e"), record("x", None)]
    changes, untimed = compare_records(base, head, 0.03)
    assert {change.point.provider: change.verdict for change in changes} == {
        "a": "slower", "b": "same", "c": "faster", "d": "gone", "e": "undecided", "new": "new",
    }  # fmt: skip
    slow = changes[0]
    assert slow.ratio == pytest.approx(1.1)
    assert slow.ratio_low < 1.1 < slow.ratio_high
    assert [it.point.provider for it in untimed] == ["x"]
