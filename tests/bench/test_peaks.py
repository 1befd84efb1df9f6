"""Peaks: measured on this CPU, stored once a device and driver, and found again by sweeps and reports."""

from __future__ import annotations

import json

import pytest

from mdnbench.bench import measure, peaks
from mdnbench.bench.cli import main
from mdnbench.bench.cli_report import complete
from mdnbench.bench.results import append_record
from mdnbench.reports.runs import load_run

CPU = {"device": "cpu", "device_name": "Some CPU", "gpu": None, "cpu": {"usable_threads": 2}}
H200 = {"device": "cuda", "device_name": "NVIDIA H200", "gpu": {"driver": "580.1"}, "cpu": {"usable_threads": 64}}
NUMBERS = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": {"float32": 1e11}}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def stored_peaks(environment: dict) -> dict:
    return {**peaks.identity(environment), "time": "2026-01-01", **NUMBERS}


def test_rates_follow_from_sizes_and_times(monkeypatch) -> None:
    cases = []
    calls = []

    def take_block(time_calls, call, max_seconds, max_samples) -> list[float]:
        call()
        calls.append(1)
        return [1.0, 2.0, 9.0]  # ms

    monkeypatch.setattr(measure, "take_block", take_block)
    found = peaks.measure_peaks(CPU, "cpu", cases.append, sizes=(8, 16), copy_bytes=4000)
    assert cases == ["copy", "float32 8", "float32 16", "bfloat16 8", "bfloat16 16"]
    assert len(calls) == len(cases)
    assert found["copy_bytes_per_s"] == pytest.approx(2 * 4000 / 2e-3)  # read and written
    assert found["matmul_flops_per_s"]["float32"] == pytest.approx(2 * 16**3 / 2e-3)  # the best size
    assert found["matmul_flops_per_s"].keys() == {"float32", "bfloat16"}
    assert (found["device_name"], found["threads"], found["driver"]) == ("Some CPU", 2, None)


def test_this_cpu_is_measured_plausibly(monkeypatch) -> None:
    monkeypatch.setitem(peaks.SECONDS_PER_CASE, "cpu", 0.1)
    found = peaks.measure_peaks(CPU, "cpu", sizes=(512,), copy_bytes=1 << 26)
    assert 1e8 < found["copy_bytes_per_s"] < 1e12
    assert 1e9 < found["matmul_flops_per_s"]["float32"] < 1e14


def test_peaks_are_kept_by_device_and_driver(tmp_path) -> None:
    assert peaks.load(CPU) is None
    file = peaks.store(stored_peaks(CPU))
    peaks.store(stored_peaks(H200))
    assert file == tmp_path / "cache" / "mdnbench" / "peaks.json"
    assert peaks.load(CPU)["threads"] == 2
    assert peaks.load(H200)["driver"] == "580.1"
    assert peaks.load(H200 | {"gpu": {"driver": "590.0"}}) is None
    assert peaks.load(CPU | {"cpu": {"usable_threads": 4}}) is None
    assert peaks.load(H200 | {"cpu": {"usable_threads": 8}}) is not None  # the host does not matter to a GPU
    peaks.store(stored_peaks(CPU) | {"copy_bytes_per_s": 5.0})
    assert peaks.load(CPU)["copy_bytes_per_s"] == 5.0
    assert len(json.loads(file.read_text())) == 2
    file.write_text("{")
    assert peaks.load(CPU) is None
    peaks.store(stored_peaks(CPU))
    assert peaks.load(CPU) is not None


def test_an_environment_keeps_its_own_peaks() -> None:
    peaks.store(stored_peaks(CPU))
    assert peaks.with_peaks(CPU)["peaks"]["copy_bytes_per_s"] == 1e10
    assert peaks.with_peaks(CPU | {"peaks": {"copy_bytes_per_s": 1.0}})["peaks"] == {"copy_bytes_per_s": 1.0}
    assert "peaks" not in peaks.with_peaks(H200)
    of_another_run = [stored_peaks(H200 | {"gpu": {"driver": "590.0"}}), stored_peaks(H200)]
    assert peaks.with_peaks(H200, of_another_run)["peaks"]["driver"] == "580.1"
    assert "peaks" not in peaks.with_peaks(H200, of_another_run[:1])
    assert peaks.with_peaks({}) == {}


def test_the_command_measures_once_and_a_sweep_takes_the_peaks_along(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(peaks.SECONDS_PER_CASE, "cpu", 0.05)
    monkeypatch.setitem(peaks.MATMUL_SIZES, "cpu", (256,))
    monkeypatch.setitem(peaks.COPY_BYTES, "cpu", 1 << 24)
    assert main(["peaks", "--device", "cpu"]) == 0
    first = capsys.readouterr().out
    assert "copy, bytes read and written" in first
    assert "matrix product, float32" in first
    assert "stored in" in first
    assert main(["peaks", "--device", "cpu"]) == 0
    assert "stored before; --again measures anew" in capsys.readouterr().out
    assert main(["peaks", "--device", "cpu", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)

    out = tmp_path / "run"
    arguments = ["sweep", "--preset", "ci", "--device", "cpu", "--provider", "gdn-torch", "--seq-len", "64"]
    assert main([*arguments, "--time-limit", "0.02", "--out", str(out)]) == 0
    assert "% roof" in capsys.readouterr().out
    assert json.loads((out / "environment.json").read_text())["peaks"] == numbers
    assert (out / "roofline.svg").exists()


def test_runs_without_peaks_or_counts_gain_them_in_a_report(tmp_path) -> None:
    append_record(tmp_path, load_run_of_gdn())
    (tmp_path / "environment.json").write_text(json.dumps(CPU))
    peaks.store(stored_peaks(CPU))
    (run,) = complete([load_run(tmp_path)])
    assert run.environment["peaks"]["copy_bytes_per_s"] == 1e10
    assert run.records[0].flops > 0
    assert run.records[0].bytes > 0


def load_run_of_gdn():
    from mdnbench.baselines.workload import Workload
    from mdnbench.bench.results import Point, Record

    point = Point("gdn-torch", Workload(seq_len=64, head_dim_k=16, head_dim_v=16), "forward", "eager")
    return Record(point, "gdn", "ok", None, 0, "2026-01-01", samples_ms=(1.0,), latency_ms=1.0)
