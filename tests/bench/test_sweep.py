"""What is planned, in which order it is sampled, when sampling stops, and what resuming refuses."""

import itertools
import json
from dataclasses import replace

import pytest

from mdnbench.bench import sweep as sweep_module
from mdnbench.bench import worker as worker_module
from mdnbench.bench.requests import Failure, PointFailed, Prepared
from mdnbench.bench.results import read_records
from mdnbench.bench.sweep import MAX_SAMPLES, SweepSpec, estimate_seconds, plan, run_sweep

SPEC = SweepSpec(
    "small",
    ("gdn-torch", "attention-sdpa-math"),
    seq_lens=(64, 128),
    head_dims=((16, 16),),
    chunk_sizes=(16, 32),
    modes=("forward",),
    heads=2,
    time_limit_s=60.0,
    min_time_s=1e-9,
)


class ScriptedWorker:
    """Answers like a worker without running anything: `blocks` maps a provider to its blocks of samples in turn."""

    blocks: dict[str, list] = {}  # noqa: RUF012
    log: list[tuple] = []  # noqa: RUF012

    def __init__(self, *args) -> None:
        self.alive = True
        self.prepared = set()
        self.log.append(("start",))

    def prepare(self, request, limit_s):
        self.log.append(("prepare", request.point.provider, request.full))
        self.prepared.add(request.point)
        return Prepared(relative_error={"o": 0.0}, checked_seq_len=request.point.workload.seq_len)

    def block(self, request, limit_s, watch=None):
        watch()
        self.log.append(("block", request.point.provider))
        answer = self.blocks[request.point.provider].pop(0)
        if isinstance(answer, Failure):
            self.alive = answer.healthy
            raise PointFailed(answer)
        if answer is KeyboardInterrupt:
            raise KeyboardInterrupt
        return answer

    def stop(self) -> None:
        self.alive = False
        self.log.append(("stop",))


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(worker_module, "Worker", ScriptedWorker)
    monkeypatch.setattr(ScriptedWorker, "log", [])
    monkeypatch.setattr(ScriptedWorker, "blocks", {})
    return ScriptedWorker


ONE_WORKLOAD = replace(SPEC, seq_lens=(64,), chunk_sizes=(16,))
NOISY = [1.0, 2.0, 3.0, 4.0]
STEADY = [1.0] * 6


def test_plan_goes_workload_by_workload_with_providers_side_by_side() -> None:
    points = plan(replace(SPEC, modes=("forward", "forward_backward")))
    assert [(p.workload.seq_len, p.mode, p.provider, p.workload.chunk_size) for p in points] == [
        (seq_len, mode, provider, chunk_size)
        for seq_len in (64, 128)
        for mode in ("forward", "forward_backward")
        for provider, chunk_size in (("gdn-torch", 16), ("gdn-torch", 32), ("attention-sdpa-math", None))
    ]
    assert points == plan(replace(SPEC, modes=("forward", "forward_backward")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"providers": ("gdn",)}, "provider='gdn' is unknown"),
        ({"gates": "wild"}, "gates='wild' is unknown"),
        ({"dtypes": ("int8",)}, "dtype='int8' is unknown"),
        ({"value_heads": 3}, "value_heads=3 is not a multiple of heads=2"),
        ({"modes": ("backwards",)}, "modes='backwards' is unknown: choose from forward, backward, forward_backward"),
        ({"regimes": ("eager", "graph")}, "regimes='graph' needs a GPU"),
        ({"device": "gpu"}, "device='gpu' is unknown: choose cpu, cuda or cuda:N"),
        ({"seq_lens": ()}, "seq_lens is empty"),
        ({"time_limit_s": 0}, "time_limit_s=0 must be above 0"),
    ],
)
def test_a_bad_specification_is_refused_before_anything_runs(tmp_path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_sweep(replace(SPEC, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_samples_are_taken_in_turn_until_each_is_precise(scripted, tmp_path) -> None:
    scripted.blocks |= {"gdn-torch": [NOISY, NOISY, STEADY * 12], "attention-sdpa-math": [STEADY, STEADY]}
    run_sweep(ONE_WORKLOAD, tmp_path / "run")
    gdn, sdpa = "gdn-torch", "attention-sdpa-math"
    assert [entry[1] for entry in scripted.log if entry[0] == "block"] == [gdn, sdpa, gdn, sdpa, gdn]
    first, second = read_records(tmp_path / "run")
    assert first.point.provider == sdpa  # written as soon as it was done
    assert second.samples_ms == (*NOISY, *NOISY, *STEADY * 12)
    assert second.latency_ms == 1.0
    assert second.tokens_per_s == 64_000


def test_sampling_goes_on_after_the_time_limit_until_there_is_an_interval(scripted, tmp_path) -> None:
    calls_ms = [1e-8 * i for i in range(1, 9)]  # far below the limit, which the time around the first block exceeds
    scripted.blocks |= {"gdn-torch": [[call_ms] for call_ms in calls_ms]}
    run_sweep(replace(ONE_WORKLOAD, providers=("gdn-torch",), time_limit_s=1e-9), tmp_path / "run")
    (record,) = read_records(tmp_path / "run")
    assert record.samples_ms == tuple(calls_ms[:6])
    assert (record.latency_low_ms, record.latency_high_ms) == (calls_ms[0], calls_ms[5])


def test_calls_longer_than_the_time_limit_are_sampled_three_times(scripted, tmp_path) -> None:
    scripted.blocks |= {"gdn-torch": [[1.0], [2.0], [3.0], [4.0]]}
    run_sweep(replace(ONE_WORKLOAD, providers=("gdn-torch",), time_limit_s=1e-9), tmp_path / "run")
    (record,) = read_records(tmp_path / "run")
    assert record.samples_ms == (1.0, 2.0, 3.0)
    assert (record.latency_ms, record.latency_low_ms, record.latency_high_ms) == (2.0, None, None)


@pytest.mark.parametrize(
    ("blocks", "changes", "reason"),
    [
        ([STEADY, STEADY], {}, "precise"),
        ([NOISY] * 6, {"time_limit_s": 1e-9}, "time limit"),
        ([[1.0]] * 3, {"time_limit_s": 1e-9}, "long calls"),
        ([[float(i) for i in range(MAX_SAMPLES)]], {}, "most samples"),
    ],
)
def test_the_row_says_why_sampling_stopped(scripted, tmp_path, blocks: list, changes: dict, reason: str) -> None:
    if reason == "time limit":  # calls of a picosecond; five blocks reach the limit
        blocks = [[1e-9 * x for x in block] for block in blocks]
    scripted.blocks |= {"gdn-torch": list(blocks)}
    run_sweep(replace(ONE_WORKLOAD, providers=("gdn-torch",), **changes), tmp_path / "run")
    (record,) = read_records(tmp_path / "run")
    assert (record.stop_reason, record.precision) == (reason, 0.005)
    assert record.block_samples == tuple(len(block) for block in blocks[: len(record.block_samples)])


def test_a_point_is_sampled_for_the_least_time_however_steady(scripted, tmp_path, monkeypatch) -> None:
    clock = itertools.count()  # a second passes at every look at it: blocks take their full second
    monkeypatch.setattr(sweep_module.time, "monotonic", lambda: next(clock))
    scripted.blocks |= {"gdn-torch": [STEADY] * 9}
    run_sweep(replace(ONE_WORKLOAD, providers=("gdn-torch",), min_time_s=5.0), tmp_path / "run")
    (record,) = read_records(tmp_path / "run")
    assert record.stop_reason == "precise"
    assert len(record.block_samples) == 5
    with pytest.raises(ValueError, match=r"min_time_s=61\.0 is above time_limit_s=60\.0"):
        replace(SPEC, min_time_s=61.0)


def test_sampling_stops_at_the_largest_number_of_samples(scripted, tmp_path) -> None:
    scripted.blocks |= {"gdn-torch": [[float(i) for i in range(MAX_SAMPLES // 4)] for _ in range(5)]}
    run_sweep(replace(ONE_WORKLOAD, providers=("gdn-torch",), precision=1e-9), tmp_path / "run")
    (record,) = read_records(tmp_path / "run")
    assert len(record.samples_ms) == MAX_SAMPLES


def test_a_lost_worker_costs_its_point_and_the_others_keep_their_samples(scripted, tmp_path) -> None:
    fault = Failure("crashed", "killed", healthy=False)
    scripted.blocks |= {"attention-sdpa-math": [NOISY, fault], "gdn-torch": [NOISY, NOISY, STEADY * 12]}
    spec = replace(ONE_WORKLOAD, providers=("attention-sdpa-math", "gdn-torch"))
    run_sweep(spec, tmp_path / "run")
    lost, kept = read_records(tmp_path / "run")
    assert (lost.status, lost.reason, lost.samples_ms, lost.latency_ms) == ("crashed", "killed", tuple(NOISY), None)
    assert kept.status == "ok"
    assert kept.samples_ms == (*NOISY, *NOISY, *STEADY * 12)
    assert scripted.log == [
        ("start",),
        ("prepare", "attention-sdpa-math", True),
        ("prepare", "gdn-torch", True),
        ("block", "attention-sdpa-math"),
        ("block", "gdn-torch"),
        ("block", "attention-sdpa-math"),
        ("stop",),
        ("start",),
        ("prepare", "gdn-torch", False),  # built again, not checked again
        ("block", "gdn-torch"),
        ("block", "gdn-torch"),
        ("stop",),
    ]


def test_resume_measures_what_is_missing_and_retries_what_failed(scripted, tmp_path) -> None:
    spec = replace(SPEC, providers=("gdn-torch",))  # chunk sizes 16 and 32, lengths 64 and 128
    fault, wrong = Failure("timeout", "slow"), Failure("incorrect", "wrong")
    scripted.blocks |= {"gdn-torch": [STEADY, fault, STEADY, wrong, KeyboardInterrupt]}
    with pytest.raises(KeyboardInterrupt):
        run_sweep(spec, tmp_path / "run")
    assert scripted.log[-1] == ("stop",)
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    statuses = [record.status for record in read_records(tmp_path / "run")]
    assert statuses == ["timeout", "ok", "incorrect"]

    scripted.log.clear()
    scripted.blocks |= {"gdn-torch": [STEADY] * 6}
    summary = run_sweep(replace(spec, setup_limit_s=999.0), tmp_path / "run", resume=True)
    assert (summary.kept, summary.measured, summary.statuses) == (1, 3, {"ok": 4})
    after = (tmp_path / "run" / "results.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == 6  # the rows of what failed stay; the last row of a point counts
    assert [record.status for record in read_records(tmp_path / "run")] == ["ok"] * 4

    scripted.log.clear()
    assert run_sweep(spec, tmp_path / "run", resume=True).measured == 0
    assert scripted.log == []
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == after


@pytest.mark.parametrize(
    ("changes", "identity", "message"),
    [
        ({"dtypes": ("bfloat16",)}, {}, "was measured with dtypes float32, this sweep has bfloat16; resume with"),
        ({"seq_lens": (64,)}, {}, "was measured with seq_lens 64, 128, this sweep has 64;"),
        ({"head_dims": ((16, 32),)}, {}, "was measured with head_dims 16 x 16, this sweep has 16 x 32;"),
        ({"value_heads": 4}, {}, "was measured with value_heads none, this sweep has 4;"),
        ({}, {"torch": "2.0"}, "was measured with torch 2.13, this sweep has 2.0;"),
        ({}, {"gpu": "H200"}, "was measured with gpu none, this sweep has H200;"),
    ],
)
def test_resume_refuses_another_sweep(scripted, tmp_path, changes: dict, identity: dict, message: str) -> None:
    system = {"torch": "2.13", "gpu": None}
    scripted.blocks |= {"gdn-torch": [STEADY] * 8, "attention-sdpa-math": [STEADY] * 8}
    run_sweep(SPEC, tmp_path, identity=system)
    with pytest.raises(ValueError, match=message):
        run_sweep(replace(SPEC, **changes), tmp_path, resume=True, identity=system | identity)
    renamed = replace(SPEC, name="other", run_limit_s=5.0)
    assert run_sweep(renamed, tmp_path, resume=True, identity=system).measured == 0


def test_a_folder_with_results_is_refused_unless_resumed(scripted, tmp_path) -> None:
    scripted.blocks |= {"gdn-torch": [STEADY] * 4}
    spec = replace(ONE_WORKLOAD, providers=("gdn-torch",))
    with pytest.raises(ValueError, match=r"holds no sweep, sweep\.json is missing"):
        run_sweep(spec, tmp_path, resume=True)
    run_sweep(spec, tmp_path)
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert content["spec"]["providers"] == ["gdn-torch"]
    with pytest.raises(ValueError, match="holds results already: go on with them by --resume"):
        run_sweep(spec, tmp_path)


def test_estimate_grows_with_points_and_their_time_limit() -> None:
    points = plan(SPEC)
    assert estimate_seconds([], SPEC) == 0
    assert estimate_seconds(points, SPEC) > len(points) * SPEC.time_limit_s
    assert estimate_seconds(points, SPEC) < estimate_seconds(points, replace(SPEC, time_limit_s=120.0))
