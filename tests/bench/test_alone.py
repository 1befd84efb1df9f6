"""Providers that need a process of their own, and what providers note about their rows."""

import os

import pytest

from mdnbench.baselines.workload import Workload
from mdnbench.bench.check import check_profiles, plan_checks
from mdnbench.bench.results import read_records
from mdnbench.bench.sweep import SweepSpec, run_sweep

SHARING = ("toy-tells-process", "toy-tells-process-too")
ALONE = ("toy-alone", "toy-alone-too")


def processes(records) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for record in records:
        assert record.status == "ok", record.reason
        found.setdefault(record.point.provider, set()).update(record.notes)
    return found


def assert_apart(found: dict[str, set[str]]) -> None:
    assert all(len(notes) == 1 for notes in found.values()), found  # a process each for the whole run
    shared = found["toy-tells-process"]
    assert found.pop("toy-tells-process-too", shared) == shared
    assert len(set.union(*found.values())) == len(found)
    assert f"built in {os.getpid()}" not in set.union(*found.values())


@pytest.mark.usefixtures("toys")
def test_sweep_gives_each_its_process(tmp_path) -> None:
    providers = (SHARING[0], ALONE[0], SHARING[1], ALONE[1])
    spec = SweepSpec("alone", providers, (16, 32), ((8, 8),), modes=("forward",), heads=1, time_limit_s=0.02)
    run_sweep(spec, tmp_path)
    assert_apart(processes(read_records(tmp_path)))


@pytest.mark.usefixtures("toys")
def test_check_gives_each_its_process() -> None:
    template = Workload(16, 8, 8, heads=1)
    points = plan_checks((SHARING[0], ALONE[0]), template, ["mild", "reset=-inf"])
    assert_apart(processes(check_profiles(points)))


@pytest.mark.usefixtures("toys")
def test_notes_are_part_of_why_a_row_is_incorrect() -> None:
    (record,) = check_profiles(plan_checks(["toy-wrong-and-known"], Workload(16, 8, 8, heads=1), ["mild"]))
    assert record.status == "incorrect"
    assert record.notes == ("its refusal was lifted (https://example.org/issues/1)",)
    assert record.reason.startswith("o has a relative error of 0.5 at 16 tokens")
    assert record.reason.endswith("; its refusal was lifted (https://example.org/issues/1)")
