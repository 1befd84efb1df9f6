"""Relative errors as a heat map: a row a provider and gate profile, a column a tensor; terminal, Markdown, HTML.

An error is shown with its part of what is allowed for that tensor and dtype (`metrics.tolerance`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mdnbench.bench.metrics import tolerance
from mdnbench.bench.results import Record

from . import style
from .runs import Run

if TYPE_CHECKING:
    from rich.console import Console

TENSORS = ("o", "dq", "dk", "dv", "dlog_alpha", "dlog_mu", "dbeta", "deta")  # then others by alphabet
LEVELS = (0.01, 0.1, 0.5, 1.0)  # parts of the tolerance up to which a cell has a level; above the last it fails
SIGNS = ("", "", "·", "!", "✗")  # of the levels, for text without colours
_COLOURS = ("#1B7837", "#5AAE61", "#B8860B", "#D9730D", "#B2182B")
LEGEND = (
    "Relative error against float64, ||x - truth|| / ||truth||. "
    "· is above a tenth of what is allowed, ! above half, ✗ beyond it."
)


def level(error: float | None, allowed: float) -> int:
    """0 for an error far below `allowed` to 4 for one above it, or not a number."""
    if error is None or not math.isfinite(error):
        return len(LEVELS)
    return sum(error > part * allowed for part in LEVELS)


def to_data(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row a provider, gate profile, dtype, device and run, with the largest error of each tensor over its records."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for run in runs:
        for record in run.records:
            if record.relative_error is None and record.status == "ok":
                continue
            point = record.point
            key = (run.name, point.provider, point.workload.gates, point.workload.dtype, point.workload.device)
            row = found.setdefault(
                key,
                dict(zip(("run", "provider", "gates", "dtype", "device"), key))
                | {"operator": record.operator, "status": record.status, "reason": record.reason, "errors": {}},
            )
            _merge(row, record)
    order = sorted(found.values(), key=lambda row: style.operator_rank(row["operator"]))
    for row in order:
        row["levels"] = {name: level(error, tolerance(row["dtype"], name)) for name, error in row["errors"].items()}
    return order


def tensors_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The tensors that rows have errors of, in a fixed order."""
    names = {name for row in rows for name in row["errors"]}
    return [name for name in TENSORS if name in names] + sorted(names - set(TENSORS))


def markdown(runs: Sequence[Run]) -> str:
    """The heat map as a Markdown document; signs stand for colours."""
    rows = to_data(runs)
    checked = [row for row in rows if row["errors"]]
    names = tensors_of(checked)
    header = ["provider", "gates", *names]
    lines = ["# Accuracy by gate profile", "", _line(header), _line(["---", "---", *["---:"] * len(names)])]
    lines += [_line([row["provider"], row["gates"], *(cell(row, name) for name in names)]) for row in checked]
    lines += ["", LEGEND, ""]
    lines += [f"- {text}" for text in reasons(rows)]
    return "\n".join([*lines, ""])


def show(console: Console, runs: Sequence[Run]) -> None:
    """Print the heat map: coloured cells on a terminal, signs everywhere."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    rows = to_data(runs)
    checked = [row for row in rows if row["errors"]]
    names = tensors_of(checked)
    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False, header_style="dim")
    for header in ("provider", "gates"):
        table.add_column(header)
    for name in names:
        table.add_column(name, justify="right")
    before = None
    for row in checked:
        cells = [Text(cell(row, name), style=_terminal_style(row, name)) for name in names]
        table.add_row(row["provider"] if row["provider"] != before else "", row["gates"], *cells)
        before = row["provider"]
    console.print(Padding(table, (0, 0, 0, 2), expand=False))
    console.print()
    for text in reasons(rows):
        console.print(Padding(Text(text), (0, 0, 0, 2), expand=False))
    console.print(LEGEND, markup=False)


def cell(row: dict[str, Any], name: str) -> str:
    """An error with the sign of its level; "-" for a tensor that the provider does not have."""
    if name not in row["errors"]:
        return "-"
    error = row["errors"][name]
    sign = SIGNS[row["levels"][name]]
    return ("NaN" if error is None else style.error(error)) + (f" {sign}" if sign else "")


def reasons(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why providers have no errors, or wrong ones, a line a provider and reason."""
    found: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row["status"] != "ok":
            key = (row["status"], row["provider"], row["reason"] or "no reason given")
            found[key] = found.get(key, 0) + 1
    return [f"{count} {status}: {provider}: {reason}" for (status, provider, reason), count in found.items()]


def _merge(row: dict[str, Any], record: Record) -> None:
    errors = row["errors"]
    for name, error in (record.relative_error or {}).items():
        before = errors.get(name, 0.0)
        finite = error is not None and math.isfinite(error)
        errors[name] = max(error, before) if finite and before is not None else None
    if _severity(record.status) > _severity(row["status"]):
        row["status"], row["reason"] = record.status, record.reason


def _severity(status: str) -> int:
    """What a provider can do counts before what it cannot, and faults before both."""
    return {"unsupported": 0, "ok": 1}.get(status, 2)


def _terminal_style(row: dict[str, Any], name: str) -> str:
    return f"white on {_COLOURS[row['levels'][name]]}" if name in row["errors"] else "dim"


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"
