"""The heat map of errors: levels, text, Markdown, and the command that makes it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from mdnbench.bench.cli import main
from mdnbench.bench.results import read_records
from mdnbench.reports import accuracy
from mdnbench.reports.runs import Run

MakeRun = Callable[..., Run]


@pytest.fixture
def checked(make_run: MakeRun) -> Run:
    """mdn-torch at two profiles, gdn-torch wrong at one; a provider that does not run here."""
    run = make_run(
        providers=("mdn-torch", "gdn-torch", "attention-flash"), seq_lens=(257,), head_dims=((64, 64),),
        chunk_sizes=(64,), modes=("forward_backward",),
    )  # fmt: skip
    errors = {
        ("mdn-torch", "mild"): {"o": 1e-7, "dq": 1e-4, "dlog_mu": 5e-4},
        ("mdn-torch", "layer"): {"o": 9e-5, "dq": 6e-4, "dlog_mu": 1e-3},
        ("gdn-torch", "mild"): {"o": 2e-7, "dq": 3e-7},
        ("gdn-torch", "layer"): {"o": float("nan"), "dq": 0.5},
    }
    records = []
    for record in run.records:
        for gates in ("mild", "layer"):
            name = record.point.provider
            point = replace(record.point, workload=record.point.workload.with_(gates=gates))
            values = {"point": point, "samples_ms": (), "latency_ms": None, "relative_error": errors.get((name, gates))}
            if (name, gates) == ("gdn-torch", "layer"):
                values |= {"status": "incorrect", "reason": "o holds NaN"}
            records.append(replace(record, **values))
    return replace(run, records=records)


@pytest.mark.parametrize(
    ("error", "expected"),
    [(0.0, 0), (0.9e-6, 0), (2e-6, 1), (2e-5, 2), (6e-5, 3), (1e-4, 3), (1.1e-4, 4), (None, 4), (float("nan"), 4)],
)
def test_levels_are_parts_of_what_is_allowed(error: float | None, expected: int) -> None:
    assert accuracy.level(error, 1e-4) == expected


def test_markdown_has_a_row_a_provider_and_profile_and_a_column_a_tensor(checked: Run) -> None:
    lines = accuracy.markdown([checked]).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table == [
        "| provider | gates | o | dq | dlog_mu |",
        "| --- | --- | ---: | ---: | ---: |",
        "| mdn-torch | mild | 1.0e-7 | 1.0e-4 | 5.0e-4 · |",
        "| mdn-torch | layer | 9.0e-5 ! | 6.0e-4 ! | 1.0e-3 · |",
        "| gdn-torch | mild | 2.0e-7 | 3.0e-7 | - |",
        "| gdn-torch | layer | NaN ✗ | 5.0e-1 ✗ | - |",
    ]
    assert "- 1 incorrect: gdn-torch: o holds NaN" in lines
    assert "- 2 unsupported: attention-flash: runs on cuda only, not on cpu" in lines


def test_the_terminal_has_colours_and_signs(checked: Run) -> None:
    def shown(terminal: bool) -> str:
        console = Console(file=io.StringIO(), force_terminal=terminal, width=120, _environ={"COLORTERM": "truecolor"})
        accuracy.show(console, [checked])
        return console.file.getvalue()

    plain, coloured = shown(False), shown(True)
    assert "\x1b" not in plain
    assert "9.0e-5 !" in plain
    assert "NaN ✗" in plain
    assert "\x1b[37;48;2;178;24;43m" in coloured  # white on red


def test_the_worst_of_several_checks_of_one_tensor_counts(checked: Run) -> None:
    record = checked.records[0]
    worse = replace(record, relative_error={"o": 3e-7, "dq": None})
    better = replace(record, relative_error={"o": 1e-9, "dq": 1e-9})
    (row,) = accuracy.to_data([replace(checked, records=[record, worse, better])])
    assert row["errors"] == {"o": 3e-7, "dq": None, "dlog_mu": 5e-4}


def test_the_command_shows_writes_and_keeps_the_heat_map(tmp_path, capsys) -> None:
    out, markdown, page = tmp_path / "run", tmp_path / "map.md", tmp_path / "map.html"
    arguments = ["check", "--profiles", "all", "--device", "cpu", "--provider", "mamba2-torch,attention-sdpa-math"]
    assert main([*arguments, "--out", str(out), "--markdown", str(markdown), "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    records = read_records(out)
    assert {record.point.workload.gates for record in records if record.operator == "mamba2"} >= {"mild", "layer"}
    assert printed.splitlines()[0].split()[:4] == ["provider", "gates", "o", "dq"]
    rows = [line for line in markdown.read_text().splitlines() if line.startswith(("| mamba2", "| attention"))]
    assert len(rows) == sum(record.status == "ok" for record in records)
    assert "Relative error against float64" in printed
    assert '"accuracy":[' in page.read_text()
    assert json.loads((out / "environment.json").read_text())["device"] == "cpu"

    assert main(["report", str(out), "--html", str(tmp_path / "again.html")]) == 0
    assert main([*arguments, "--out", str(out)]) == 2
    assert "holds results already" in capsys.readouterr().err
    assert main([*arguments, "--gates", "mild"]) == 2
    assert "--profiles and --gates both name gate profiles" in capsys.readouterr().err


@pytest.mark.parametrize("status", ["crashed", "timeout", "out_of_memory", "error"])
@pytest.mark.parametrize("before", ["ok", "unsupported"])
def test_a_fault_is_told_whatever_else_a_provider_can_or_cannot_do(status: str, before: str, checked: Run) -> None:
    record = replace(checked.records[0], relative_error=None)
    faulty = replace(record, status=status, reason="exit code 139")
    other = replace(record, status=before, reason=None if before == "ok" else "needs a GPU")
    if before == "ok":
        other = replace(other, relative_error={"o": 1e-7})
    for records in ([other, faulty], [faulty, other]):
        (row,) = accuracy.to_data([replace(checked, records=records)])
        assert (row["status"], row["reason"]) == (status, "exit code 139")
    assert accuracy.reasons([row]) == [f"1 {status}: {record.point.provider}: exit code 139"]
