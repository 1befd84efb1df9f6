"""Two runs of the same sweep: what agrees, what an interval holds, and the table of misses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from mdnbench.bench.cli import main
from mdnbench.bench.results import GpuReading, Record, append_record
from mdnbench.reports.agreement import agreement, lines, markdown, rows
from mdnbench.reports.runs import Run

MakeRun = Callable[..., Run]


@pytest.fixture
def runs(make_run: MakeRun) -> tuple[list[Record], list[Record]]:
    """24 points; of the second run one is 5 % slower, one 0.4 %, one was held back, and one is missing."""
    first = list(make_run(providers=("mdn-torch", "gdn-torch"), chunk_sizes=(64,)).records)
    second = list(first)

    def scaled(record: Record, factor: float) -> Record:
        return replace(record, samples_ms=tuple(factor * x for x in record.samples_ms))

    second[0] = scaled(second[0], 1.05)
    second[1] = scaled(second[1], 1.009)
    held = (GpuReading("during", 1200, slowed_by=("power cap",)),)
    first[2] = replace(first[2], gpu=((GpuReading("during", 1980),),))
    second[2] = replace(scaled(second[2], 1.3), gpu=(held,))
    return first, second[:-1]


def test_counts(runs) -> None:
    found = agreement(*runs, limit=0.01)
    assert (len(found.pairs), found.alone) == (23, 1)
    points, agree, covered = found.count()
    assert (points, agree) == (23, 21)
    assert 20 <= covered <= 21  # 0.9 % may be in the interval of the second point
    assert found.count("graph") == (0, 0, 0)
    first, second = lines(found)
    assert first.startswith("eager: of 23 points, 21 medians (91.3%) agree within 1 %; ")
    assert first.endswith(" in that of its samples alone")
    assert second == "1 points have a time in one of the runs alone"


def test_what_processes_differ_by_is_in_the_interval_and_not_in_that_of_the_samples(runs) -> None:
    first = replace(runs[0][0], samples_ms=(1.0,) * 20)
    second = replace(first, samples_ms=(1.004,) * 20)
    (pair,) = agreement([first], [second]).pairs
    assert (pair.agrees, pair.covered, pair.sampled) == (True, True, False)


def test_misses_come_with_their_flags_the_furthest_first(runs) -> None:
    found = rows(agreement(*runs, limit=0.01))
    assert [row[3] for row in found[:2]] == ["+30.00%", "+5.00%"]
    assert found[0][6:] == ("1980 1200", "beyond the limit, outside of the interval; throttled")
    assert found[1][6] == "-"
    assert "| +30.00% |" in markdown(agreement(*runs))
    assert markdown(agreement(runs[0], runs[0])).endswith("No point misses.\n")


def test_the_command(runs, tmp_path, capsys) -> None:
    for name, records in zip("ab", runs):
        (tmp_path / name).mkdir()
        for record in records:
            append_record(tmp_path / name, record)
    arguments = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--repeat", "--threshold", "1%"]
    assert main([*arguments, "--markdown", str(tmp_path / "out.md")]) == 0
    assert "21 medians (91.3%) agree within 1 %" in capsys.readouterr().out
    assert "| point | first ms |" in (tmp_path / "out.md").read_text()
    assert main([*arguments, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["pairs"]) == 23
