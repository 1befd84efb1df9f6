"""Benchmarks, not tests: collected only where `--benchmark-only` is given, so that a run of all tests stays fast."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without pytest-benchmark there is no such option, and nothing to collect either."""
    return None if config.getoption("benchmark_only", default=False) else True
