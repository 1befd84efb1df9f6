"""The history as a table and a plot: steps marked, commits named, machines apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mdnbench.baselines.workload import Workload
from mdnbench.bench.history import Entry, Machine, Series, series_of
from mdnbench.bench.results import Point
from mdnbench.reports.history import MOST_PANELS, step_rows, write_plot

POINT = Point("mdn-torch", Workload(128, 32, 32), "forward", "eager")
MACHINE = Machine("Some CPU 9000", None, "3.7.1", "2.13.0")


def make_series(latencies, point: Point = POINT, machine: Machine = MACHINE) -> list[Series]:
    entries = [
        Entry(point, machine, f"{i:02d}c0ffee", None, f"2026-02-{i + 1:02d}", "ok", latency, None, None)
        for i, latency in enumerate(latencies)
    ]
    return series_of(entries)


SLOWER = [1.0, 1.001, 0.999] * 3 + [1.2, 1.201, 1.199, 1.2]
FASTER = [2.0, 2.002, 1.998] * 3 + [1.0, 1.001, 0.999, 1.0]


def test_steps_are_rows_the_largest_first() -> None:
    other = replace(POINT, provider="gdn-torch")
    header, rows = step_rows([*make_series(SLOWER), *make_series(FASTER, other), *make_series([*FASTER, 1.3], other)])
    assert header[:4] == ["point", "machine", "commit", "change"]
    assert [(row[0].split()[0], *row[2:4], *row[4:6]) for row in rows] == [
        ("gdn-torch", "09c0ffe", "50.0 % faster", "2", "1"),
        ("gdn-torch", "09c0ffe", "50.0 % faster", "2", "1"),
        ("gdn-torch", "13c0ffe", "30.0 % slower", "1", "1.3"),
        ("mdn-torch", "09c0ffe", "20.0 % slower", "1", "1.2"),
    ]
    assert [row[6] for row in rows] == ["", "", "newest value alone: one more run confirms it", ""]


def test_plot_marks_steps_and_names_commits(tmp_path: Path) -> None:
    newer = replace(MACHINE, triton="3.9.0")
    drawn = [*make_series(SLOWER), *make_series([0.9] * 5, machine=newer), *make_series([1.0], machine=MACHINE)]
    file = write_plot(drawn, tmp_path / "history.svg")
    svg = file.read_text()
    for text in (
        "09c0ffe: 20.0 % slower",
        "Latency by commit",
        "latency (ms)",
        "mdn-torch fwd eager: B1 T128 H4 K32 V32 C64",
        "- Some CPU 9000, torch 2.13.0, triton 3.7.1",
        "- Some CPU 9000, torch 2.13.0, triton 3.9.0",
        ">00c0ffe<",
    ):
        assert text in svg, text
    assert write_plot(drawn, tmp_path / "again.svg").read_text() == svg


def test_devices_have_panels_of_their_own_and_steps_come_first(tmp_path: Path) -> None:
    quiet = [
        it
        for length in range(64, 64 * (MOST_PANELS + 2), 64)
        for it in make_series([1.0] * 4, replace(POINT, workload=Workload(length, 16, 16)))
    ]
    gpu = make_series(SLOWER, machine=Machine("NVIDIA H200", "580.12", "3.7.1", "2.13.0"))
    svg = write_plot([*quiet, *gpu], tmp_path / "history.svg").read_text()
    assert "- NVIDIA H200, driver 580.12, torch 2.13.0, triton 3.7.1" in svg
    assert svg.count("latency (ms)") == MOST_PANELS
    assert "2 more points, whose steps are no larger, are not drawn" in svg


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no times yet"):
        write_plot([], tmp_path / "history.png")
