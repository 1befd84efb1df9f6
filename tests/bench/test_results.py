"""Records survive the trip through results.jsonl, whatever a kill leaves at its end."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from mdnbench.baselines.workload import Workload
from mdnbench.bench.results import REGIMES, GpuReading, Point, Record, append_record, read_records

POINT = Point(
    "gdn-torch", Workload(seq_len=512, head_dim_k=64, head_dim_v=128, heads=2, value_heads=4), "forward", "eager"
)
RECORD = Record(
    point=POINT,
    operator="gdn",
    status="ok",
    reason=None,
    seed=3,
    time="2026-01-02T03:04:05.678+00:00",
    samples_ms=(1.25, 1.5),
    notes=("a refusal was lifted",),
    latency_ms=1.375,
    tokens_per_s=512 / 1.375e-3,
    first_call_s=0.5,
    peak_memory_bytes=1 << 33,
    relative_error={"o": 1e-7, "dq": 2e-7},
    checked_seq_len=512,
    threads=2,
    flops=10**12,
    bytes=10**9,
    block_samples=(1, 1),
    gpu=(
        (GpuReading("before", 345, 3201, 80.5, 700.0, 31), GpuReading("during", 1980, slowed_by=("power cap",))),
        (GpuReading("after"),),
    ),
    input_sets=2,
    stop_reason="precise",
    precision=0.005,
    idle_s=0.5,
)


def other(seq_len: int, **changes) -> Record:
    return replace(RECORD, point=replace(POINT, workload=POINT.workload.with_(seq_len=seq_len)), **changes)


def test_round_trip(tmp_path) -> None:
    append_record(tmp_path, RECORD)
    assert read_records(tmp_path) == [RECORD]
    assert read_records(tmp_path / "results.jsonl") == [RECORD]


def test_row_is_flat_and_names_the_whole_point(tmp_path) -> None:
    append_record(tmp_path, RECORD)
    row = json.loads((tmp_path / "results.jsonl").read_text())
    assert row["schema_version"] == 1
    assert (row["provider"], row["operator"], row["mode"], row["regime"]) == ("gdn-torch", "gdn", "forward", "eager")
    assert row["workload"] == POINT.workload.to_dict()
    assert row["samples_ms"] == [1.25, 1.5]
    assert row["notes"] == ["a refusal was lifted"]
    assert row["saved_memory_bytes"] is None
    assert row["gpu"][0][1] == {"at": "during", "sm_clock_mhz": 1980, "slowed_by": ["power cap"]}
    assert row["gpu"][1] == [{"at": "after"}]
    assert "point" not in row


def test_every_row_names_launch_and_cache() -> None:
    workload = POINT.workload.with_(device="cuda")
    points = [replace(POINT, workload=workload, regime=regime) for regime in REGIMES]
    named = [("eager", "cold"), ("graph", "cold"), ("eager", "warm"), ("graph", "warm")]
    assert [(point.launch, point.cache) for point in points] == named
    rows = [replace(RECORD, point=point).to_row() for point in points]
    assert [(row["launch"], row["cache"]) for row in rows] == named
    assert (POINT.launch, POINT.cache) == ("eager", "warm")  # on a CPU nothing empties the cache


def test_rows_of_earlier_versions_still_load() -> None:
    published = Path(__file__).parents[2] / "reports/published/h200-pytorch"
    records = read_records(published)
    assert len(records) > 90
    assert all(r.gpu == () and r.flops is None and r.stop_reason is None for r in records)
    assert {(r.point.launch, r.point.cache) for r in records} == {("eager", "cold")}


def test_numbers_that_json_lacks_become_null(tmp_path) -> None:
    append_record(tmp_path, replace(RECORD, relative_error={"o": math.nan, "dv": math.inf}, latency_ms=-math.inf))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    row = json.loads((tmp_path / "results.jsonl").read_text(), parse_constant=refuse)
    assert row["relative_error"] == {"o": None, "dv": None}
    assert row["latency_ms"] is None


def test_last_row_of_a_point_counts_at_the_place_of_its_first(tmp_path) -> None:
    again = replace(RECORD, status="ok", time="2026-01-02T04:00:00.000+00:00")
    for record in (replace(RECORD, status="timeout", reason="slow"), other(1024), again):
        append_record(tmp_path, record)
    assert read_records(tmp_path) == [again, other(1024)]


@pytest.mark.parametrize("keep", [1, 40, -1])
def test_torn_last_line_is_passed_over_and_removed_before_the_next_row(tmp_path, keep: int) -> None:
    file = tmp_path / "results.jsonl"
    append_record(tmp_path, RECORD)
    first = file.read_bytes()
    append_record(tmp_path, other(1024, samples_ms=(0.1,) * 30_000))  # longer than the blocks it is searched in
    torn = file.read_bytes()[len(first) :][:keep]
    assert b"\n" not in torn

    file.write_bytes(first + torn)
    assert read_records(tmp_path) == [RECORD]
    append_record(tmp_path, other(2048))
    assert file.read_bytes().startswith(first)
    assert read_records(tmp_path) == [RECORD, other(2048)]


def test_file_that_is_one_torn_line(tmp_path) -> None:
    (tmp_path / "results.jsonl").write_bytes(b'{"schema_version": 1, "provi')
    assert read_records(tmp_path) == []
    append_record(tmp_path, RECORD)
    assert read_records(tmp_path) == [RECORD]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps(RECORD.to_row() | {"schema_version": 7}), r"line 2: schema_version=7, but .* reads 1"),
        ("not json", r"line 2: Expecting value"),
        ("[1, 2]", r"line 2: this is no row of results: list in place of an object"),
        (
            json.dumps({"schema_version": 1, "provider": "x"}),
            r"line 2: this is no row of results: KeyError",
        ),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line: str, message: str) -> None:
    append_record(tmp_path, RECORD)
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path)


def test_key_tells_points_apart() -> None:
    points = [
        Point(provider, POINT.workload.with_(**changes), mode, regime)
        for provider in ("a", "b")
        for mode in ("forward", "backward")
        for regime in ("eager", "graph")
        for changes in ({}, {"chunk_size": None}, {"gates": "layer"}, {"value_heads": 2}, {"dtype": "bfloat16"})
    ]
    assert len({point.key for point in points}) == len(points)
    assert POINT.key == "gdn-torch forward eager B1 T512 H2/4 K64 V128 C64 float32 cpu"


def test_group_is_shared_by_providers_and_chunk_sizes_only() -> None:
    def group(provider="a", mode="forward", **changes):
        return Point(provider, POINT.workload.with_(**changes), mode, "eager").group

    assert group() == group("b") == group(chunk_size=128) == group("c", chunk_size=None)
    assert len({group(), group(mode="backward"), group(seq_len=8), group(dtype="float16"), group(gates="layer")}) == 5
