"""Stored runs as reports see them: records with a name and what they ran on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mdnbench.bench.results import RESULTS_FILE, SWEEP_FILE, Record, read_records, results_path

ENVIRONMENT_FILE = "environment.json"


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: tells runs apart in a report; the folder's name.
        records: one record a point.
        environment: the content of environment.json; empty where the file is missing.
    """

    name: str
    records: Sequence[Record]
    environment: dict[str, Any] = field(default_factory=dict)


def load_run(path: Path) -> Run:
    """Read a run folder, or a results.jsonl with the environment.json beside it if there is one.

    Raises:
        ValueError: when there are no results, or when a file is not of this form.
    """
    results = results_path(path)
    if not results.is_file():
        raise ValueError(
            f"RUN {str(path)!r} has no {RESULTS_FILE}: give a run folder, such as runs/20260131-120000-smoke"
        )
    records = read_records(results)
    if not records:
        raise ValueError(f"RUN {str(path)!r} holds no results yet: mdnbench sweep --resume --out {path} measures them")
    environment = results.with_name(ENVIRONMENT_FILE)
    try:
        facts = json.loads(environment.read_text()) if environment.is_file() else {}
    except json.JSONDecodeError as fault:
        raise ValueError(f"RUN {str(path)!r}: {ENVIRONMENT_FILE} is not JSON ({fault}): remove it to go on") from None
    if not isinstance(facts, dict):
        raise ValueError(f"RUN {str(path)!r}: {ENVIRONMENT_FILE} is no JSON object: remove it to go on")
    limits = _limits(results.with_name(SWEEP_FILE))
    records = [replace(it, **{n: v for n, v in limits.items() if getattr(it, n) is None}) for it in records]
    return Run(results.resolve().parent.name, records, facts)


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """`load_run` for each path, once where paths lead to the same file. Runs whose folders share a name are named by
    their paths."""
    once: dict[Path, Path] = {}
    for path in paths:
        once.setdefault(results_path(path).resolve(), path)
    paths = list(once.values())
    runs = [load_run(path) for path in paths]
    names = [run.name for run in runs]
    return [replace(run, name=str(path)) if names.count(run.name) > 1 else run for run, path in zip(runs, paths)]


def is_report(path: Path) -> bool:
    """Whether a folder holds a report and no results, as `mdnbench report` of several runs leaves it beside them."""
    return (path / "table.md").is_file() and not (path / RESULTS_FILE).exists()


def _limits(sweep: Path) -> dict[str, Any]:
    """What a sweep asked of its sampling, for older rows that do not hold it; empty where this is not known."""
    try:
        spec = json.loads(sweep.read_text())["spec"]
        return {name: spec.get(name) for name in ("precision", "time_limit_s", "min_time_s")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def describe(environment: dict[str, Any]) -> str:
    """One line: the processor, the driver, and the versions that decide a time. Empty when nothing is known."""
    gpu = environment.get("gpu") if environment.get("device") == "cuda" else None
    commit = environment.get("git_commit")
    state = f" ({commit[:7]}{', modified' if environment.get('git_dirty') else ''})" if commit else ""
    versions = [(name, environment.get(name)) for name in ("torch", "triton", "mdnbench")]
    parts = [
        environment.get("device_name"),
        gpu and f"driver {gpu.get('driver')}",
        *(f"{name} {version}" for name, version in versions if version),
    ]
    return ", ".join(part for part in parts if part) + (state if environment.get("mdnbench") else "")
