"""The history of points over commits: what is kept, how series are told apart, and where steps are found."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mdnbench.baselines.workload import Workload
from mdnbench.bench import history
from mdnbench.bench.cli import main
from mdnbench.bench.history import Entry, Machine, Value, find_steps, fit_levels, series_of
from mdnbench.bench.results import Point, Record, append_record

CPU = {"device": "cpu", "device_name": "Some CPU 9000", "torch": "2.13.0", "triton": "3.7.1", "git_dirty": False}
H200 = CPU | {"device": "cuda", "device_name": "NVIDIA H200", "gpu": {"driver": "580.12"}}
POINT = Point("mdn-torch", Workload(128, 32, 32), "forward", "eager")


def make_record(latency_ms: float | None, day: int, point: Point = POINT) -> Record:
    status = "ok" if latency_ms else "crashed"
    time = f"2026-02-{day:02d}T12:00:00.000+00:00"
    return Record(point, "mdn", status, None, seed=0, time=time, latency_ms=latency_ms)


def make_entry(latency_ms: float | None, day: int, commit: str | None = None, **environment) -> Entry:
    facts = CPU | {"git_commit": commit or f"{day:040d}"} | environment
    return history.entries_of([make_record(latency_ms, day)], facts)[0]


def values(logs) -> list[Value]:
    return [Value(f"{i:03d}", float(np.exp(log))) for i, log in enumerate(logs)]


@pytest.mark.parametrize(("noise", "most"), [(0.002, 0.01), (0.01, 0.02), (0.03, 0.06)])
@pytest.mark.parametrize("commits", [30, 100])
def test_noise_alone_rarely_makes_steps(commits: int, noise: float, most: float) -> None:
    rng = np.random.default_rng(commits)
    found = [len(find_steps(values(rng.normal(0, noise, commits)))) > 0 for _ in range(300)]
    assert np.mean(found) <= most


@pytest.mark.parametrize(("noise", "step"), [(0.002, 0.03), (0.01, 0.05), (0.01, -0.08), (0.03, 0.2)])
def test_a_step_is_found_where_it_is(noise: float, step: float) -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        logs = rng.normal(0, noise, 40)
        at = int(rng.integers(3, 37))
        logs[at:] += step
        steps = find_steps(values(logs))
        hits += any(abs(it.index - at) <= 1 and abs(np.log(it.ratio) - step) < abs(step) / 3 for it in steps)
    assert hits >= 190


def test_two_steps_and_an_outlier() -> None:
    logs = np.array([0.0] * 10 + [0.1] * 6 + [-0.05] * 8) + np.tile([0.004, -0.004], 12)
    logs[4] += 1.0  # an outlier is no step, however far
    steps = find_steps(values(logs))
    assert [(it.index, it.before, it.commit, it.confirmed) for it in steps] == [
        (10, "009", "010", True),
        (16, "015", "016", True),
    ]
    assert [it.ratio for it in steps] == pytest.approx([np.exp(0.1), np.exp(-0.15)], rel=0.01)


def test_the_newest_value_alone_is_unconfirmed_and_a_second_confirms_it() -> None:
    logs = [0.0, 0.002] * 5
    step = find_steps(values([*logs, 0.1]))[0]
    assert (step.index, step.commit, step.confirmed) == (10, "010", False)
    step = find_steps(values([*logs, 0.1, 0.102]))[0]
    assert (step.index, step.commit, step.confirmed) == (10, "010", True)


def test_steps_too_small_for_a_person_are_none() -> None:
    logs = np.concatenate((np.zeros(50), np.full(50, 0.015)))
    assert fit_levels(logs) == [0]
    assert fit_levels(logs * 3) == [0, 50]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_short_series_have_no_steps(count: int) -> None:
    assert [it for it in find_steps(values([0.0, 0.5, 1.0][:count])) if it.confirmed] == []


def test_a_long_history_takes_no_time() -> None:
    rng = np.random.default_rng(0)
    assert fit_levels(rng.normal(0, 0.01, 2000)) == [0]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "of" / "history.jsonl"
    entries = [make_entry(1.0, 1), make_entry(None, 2), make_entry(1.5, 3, **H200)]
    assert history.append(file, entries) == 3
    assert history.read(file) == entries
    assert history.append(file, [*entries, make_entry(1.0, 4)]) == 1  # what is there is not added again
    assert len(history.read(file)) == 4
    row = json.loads(file.read_text().splitlines()[2])
    key = {name: row[name] for name in ("commit", "device_name", "driver", "triton", "torch", "provider", "mode")}
    assert key == {
        "commit": f"{3:040d}",
        "device_name": "NVIDIA H200",
        "driver": "580.12",
        "triton": "3.7.1",
        "torch": "2.13.0",
        "provider": "mdn-torch",
        "mode": "forward",
    }


def test_series_are_told_apart_by_point_and_machine() -> None:
    other = replace(POINT, mode="backward")
    entries = [
        make_entry(1.0, 1),
        make_entry(1.1, 2),
        make_entry(3.0, 2, triton="3.9.0"),
        make_entry(0.1, 2, **H200),
        make_entry(0.2, 2, **{**H200, "gpu": {"driver": "570.1"}}),
        *history.entries_of([make_record(2.0, 1, other), make_record(None, 2, other)], CPU | {"git_commit": "a"}),
    ]
    found = series_of(entries)
    assert [len(it.values) for it in found] == [2, 1, 1, 1, 1]
    assert found[3].machine == Machine("NVIDIA H200", "570.1", "3.7.1", "2.13.0")
    assert found[4].point == other
    assert found[0].machine.label() == "Some CPU 9000, torch 2.13.0, triton 3.7.1"


def test_a_commit_measured_again_is_one_value_and_changes_are_not_of_the_commit() -> None:
    again = [make_entry(latency, day, "a") for day, latency in ((1, 1.0), (3, 1.2), (4, 1.1))]
    found = series_of([*again, make_entry(2.0, 2, "a", git_dirty=True)])
    assert {it.commit: it.latency_ms for it in found[0].values} == {"a": 1.1, "a+": 2.0}


def test_unsupported_points_and_runs_without_a_commit() -> None:
    record = replace(make_record(None, 1), status="unsupported")
    assert history.entries_of([record], CPU | {"git_commit": "a"}) == []
    with pytest.raises(ValueError, match="name its commit by --commit"):
        history.entries_of([make_record(1.0, 1)], CPU | {"git_commit": None})
    assert history.entries_of([make_record(1.0, 1)], CPU, commit="0123abc")[0].commit == "0123abc"
    for name in ("", "b", "no-such-branch"):
        with pytest.raises(ValueError, match="is no commit that git knows here"):
            history.entries_of([make_record(1.0, 1)], CPU, commit=name)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The current folder is a git repository; its commits, oldest first."""
    monkeypatch.chdir(tmp_path)
    commits = []
    subprocess.run(["git", "init", "--quiet"], check=True)
    for day in range(1, 7):
        time = f"2026-01-{day:02d}T00:00:00+02:00"
        monkeypatch.setenv("GIT_AUTHOR_DATE", time)
        monkeypatch.setenv("GIT_COMMITTER_DATE", time)
        identity = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, "commit", "--quiet", "--allow-empty", "-m", f"day {day}"], check=True)
        commits.append(subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip())
    return commits


def write_run(folder: Path, latency_ms: float, day: int, commit: str | None) -> str:
    folder.mkdir(parents=True)
    append_record(folder, make_record(latency_ms, day))
    (folder / "environment.json").write_text(json.dumps(CPU | {"git_commit": commit}))
    return str(folder)


def test_track_in_the_order_of_commits(repository: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Measured in another order than committed: the step is where the code changed."""
    order = [3, 0, 5, 1, 4, 2]
    latencies = [1.0, 1.001, 0.999, 1.25, 1.251, 1.249]
    runs = [write_run(Path(f"runs/{day}"), latencies[at], day, repository[at]) for day, at in enumerate(order, start=1)]
    assert main(["track", *runs[:2]]) == 0
    assert capsys.readouterr().out == "2 rows added to history.jsonl; 1 series, 0 steps\n"
    assert main(["track", *runs, "--plot", "history.png"]) == 0
    printed = capsys.readouterr().out
    assert "4 rows added to history.jsonl, 2 were there; 1 series, 1 step; plot in history.png" in printed
    assert f"{repository[3][:7]} 25.0 % slower" in printed
    assert Path("history.png").stat().st_size > 10_000
    assert main(["track", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [value["commit"] for value in found[0]["values"]] == repository
    assert found[0]["steps"][0]["before"] == repository[2]


def test_track_for_a_repository_of_ones_own(tmp_path: Path, monkeypatch, capsys) -> None:
    """mdnbench comes from a package there, and the commit from the command."""
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run", 1.0, 1, None)
    assert main(["track", run]) == 2
    assert capsys.readouterr().err == (
        "mdnbench: RUN 'run': the run was not measured from a git checkout of mdnbench: name its commit by --commit\n"
    )
    assert main(["track", run, "--commit", "0123abc", "--history", "speed/history.jsonl"]) == 0
    assert history.read(tmp_path / "speed" / "history.jsonl")[0].commit == "0123abc"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("track", "--history 'history.jsonl' does not exist: name a RUN to begin it with"),
        ("track nowhere", "RUN 'nowhere' has no results.jsonl"),
        ("track run --history bad.jsonl", "bad.jsonl line 1: "),
        ("track run --plot history.gif", "--plot 'history.gif' must end with .png, .svg or .pdf"),
        ("track run --history run", "--history 'run' is a folder"),
        ("track run --plot no/where.png", "--plot 'no/where.png' cannot be written"),
    ],
)
def test_bad_input(arguments: str, words: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", 1.0, 1, "a")
    Path("bad.jsonl").write_text("{}\n")
    assert main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("mdnbench: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err
    assert "gif" not in arguments or not Path("history.jsonl").exists()
