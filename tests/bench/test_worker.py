"""The worker process ends with its parent, and a sweep that is killed goes on where it stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mdnbench.baselines.workload import Workload
from mdnbench.bench.check import check_profiles, plan_checks
from mdnbench.bench.results import read_records
from mdnbench.bench.sweep import SweepSpec, plan, run_sweep
from mdnbench.bench.worker import available_memory_bytes

SPEC = SweepSpec(
    "killed",
    ("toy-sleeps", "toy-good", "toy-forward-only"),
    seq_lens=(16, 32, 48, 64, 80),
    head_dims=((16, 16),),
    modes=("forward_backward",),
    heads=2,
    precision=1e-9,
    time_limit_s=0.4,
)
SCRIPT = """
import sys
from mdnbench.bench.sweep import SweepSpec, run_sweep

if __name__ == "__main__":
    spec = SweepSpec(**{spec!r})
    try:
        run_sweep(spec, sys.argv[1], resume=sys.argv[2:] == ["--resume"], on_event=lambda p: print(p.step, flush=True))
    except KeyboardInterrupt:
        sys.exit(130)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and process groups as on Linux")


class Sweep:
    """A sweep in a process group of its own."""

    def __init__(self, script: Path, folder: Path, *options: str) -> None:
        self.folder = folder
        self.rows = folder / "results.jsonl"
        self.process = subprocess.Popen(
            [sys.executable, script, folder, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def await_rows(self, count: int) -> psutil.Process:
        """Wait until so many rows are written in all; the worker process."""
        deadline = time.monotonic() + 60
        while self.row_count() < count:
            assert self.process.poll() is None, self.process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        children = psutil.Process(self.process.pid).children()
        return max(children, key=lambda child: child.memory_info().rss)  # the other one is Python's resource tracker

    def row_count(self) -> int:
        return self.rows.read_bytes().count(b"\n") if self.rows.exists() else 0


@pytest.fixture
def script(toys, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.replace("{spec!r}", repr(SPEC.to_dict())))
    return path


def test_a_killed_sweep_is_resumed_without_losing_or_repeating_a_point(script, tmp_path) -> None:
    folder = tmp_path / "run"
    rows = folder / "results.jsonl"

    first = Sweep(script, folder)
    first.await_rows(4)
    os.killpg(first.process.pid, signal.SIGKILL)  # all of it at once
    first.process.wait()
    after_first = rows.read_bytes()
    assert 4 <= len(read_records(folder)) < len(plan(SPEC))
    rows.write_bytes(after_first + b'{"schema_version": 1, "prov')  # as if the kill had come within a write

    second = Sweep(script, folder, "--resume")
    worker = second.await_rows(8)
    os.kill(second.process.pid, signal.SIGKILL)  # the worker is not told
    second.process.wait()
    gone, alive = psutil.wait_procs([worker], timeout=5)
    assert gone, alive
    after_second = rows.read_bytes()
    assert after_second.startswith(after_first)

    kept = len(read_records(folder))
    assert 8 <= kept < len(plan(SPEC))
    summary = run_sweep(SPEC, folder, resume=True)
    assert (summary.kept, summary.measured) == (kept, len(plan(SPEC)) - kept)
    assert rows.read_bytes().startswith(after_second)
    lines = rows.read_text().splitlines()
    assert len(lines) == len(plan(SPEC))  # every point once: none was measured twice
    assert {record.point for record in read_records(folder)} == set(plan(SPEC))
    assert summary.statuses == {"ok": 10, "unsupported": 5}
    assert all(json.loads(line)["samples_ms"] for line in lines if '"ok"' in line)


def test_ctrl_c_keeps_rows_ends_the_worker_and_prints_no_traceback(script, tmp_path) -> None:
    sweep = Sweep(script, tmp_path / "run")
    worker = sweep.await_rows(2)
    os.killpg(sweep.process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    output, _ = sweep.process.communicate(timeout=20)
    assert sweep.process.returncode == 130
    assert set(output.split()) <= {"preparing", "sampling", "finished"}
    assert psutil.wait_procs([worker], timeout=5)[0]
    assert "Traceback" not in (tmp_path / "run" / "worker.log").read_text()
    assert len(read_records(tmp_path / "run")) >= 2


@pytest.mark.usefixtures("toys")
def test_check_profiles_runs_each_distinct_profile_without_timing(tmp_path) -> None:
    template = Workload(seq_len=32, head_dim_k=16, head_dim_v=16, heads=2, chunk_size=16)
    names = ("toy-good", "toy-segfaults", "toy-forward-only", "mamba2-torch")
    profiles = ("mild", "log_mu=-1", "alpha=1", "reset=-inf")
    points = plan_checks(names, template, profiles)
    assert [p.workload.gates for p in points if p.provider == "toy-good"] == ["mild", "reset=-inf", "alpha=1"]
    records = list(check_profiles(points, log_path=tmp_path / "log"))
    statuses = {name: [r.status for r in records if r.point.provider == name] for name in names}
    assert statuses == {
        "toy-good": ["ok"] * 3,
        "toy-segfaults": ["crashed"] * 3,
        "toy-forward-only": ["ok"] * 3,
        "mamba2-torch": ["ok", "unsupported", "unsupported"],
    }
    assert {r.point.mode for r in records if r.point.provider == "toy-forward-only"} == {"forward"}
    assert all(r.samples_ms == () and r.latency_ms is None for r in records)
    assert max(e for r in records if r.status == "ok" for e in r.relative_error.values()) < 1e-5


def test_available_memory_is_positive_and_within_the_machine() -> None:
    assert 0 < available_memory_bytes() <= psutil.virtual_memory().total
