"""tests/speed: left out of a run of all tests, and readable by the tools of pytest-benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")

pytest.importorskip("pytest_benchmark")


def test_left_out_by_default() -> None:
    command = [*PYTEST, "tests/speed", "--collect-only"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "test_speed" not in done.stdout


def test_json_of_pytest_benchmark(tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    command = [*PYTEST, "tests/speed", "--benchmark-only", f"--benchmark-json={file}", "-k", "cpu and gdn-torch"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    found = {it["name"]: it for it in json.loads(file.read_text())["benchmarks"]}
    assert set(found) == {"test_cpu[gdn-torch-forward]", "test_cpu[gdn-torch-forward_backward]"}
    for name, benchmark in found.items():
        assert 0 < benchmark["stats"]["median"] < 1
        assert benchmark["stats"]["rounds"] == 30
        assert benchmark["extra_info"]["provider"] == "gdn-torch"
        assert benchmark["extra_info"]["mode"] == name.removeprefix("test_cpu[gdn-torch-").rstrip("]")
        assert benchmark["extra_info"]["workload"]["seq_len"] == 256
    compared = [sys.executable, "-m", "pytest_benchmark", "compare", str(file), "--columns=median"]
    table = subprocess.run(compared, capture_output=True, text=True, check=True).stdout
    assert "gdn-torch-forward_backward" in table
