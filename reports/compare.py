"""A comparison of two runs or revisions: Markdown for a comment, a table on the terminal, JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mdnbench.bench.regress import VERDICTS, Change, Comparison, Sides

from . import style
from .render import print_table
from .tables import Cell

if TYPE_CHECKING:
    from rich.console import Console

HEADER = ("verdict", "provider", "mode", "workload", "base ms", "head ms", "change", "limit", "p", "memory", "error")
NUMERIC = (False, False, False, False, True, True, True, True, True, True, True)
LEGEND = (
    "Change: latency of the head against the base, with its 95 % interval. Limit: the threshold, or what this machine "
    "varies by without a change where that is more. Slower, faster: beyond the limit and significant. Same: the "
    "interval is within the limit. Undecided: neither. Memory: peak, or saved for backward where that changed more."
)
_WORDS = {0: "Not slower", 1: "Worse", 3: "Undecided"}
_MORE_ERROR = 2.0  # errors of the same method differ by some percent with the order of sums


def markdown(found: Comparison) -> str:
    """The comparison as Markdown: what changed in a table, what is the same folded away."""
    lines = [f"**{verdict_line(found)}**", "", f"Base: {found.base}. Head: {found.head}.", ""]
    rows = _sorted(found.changes)
    changed = [change for change in rows if change.verdict != "same" or change.more_memory]
    same = [change for change in rows if change not in changed]
    if changed:
        lines += [*_table(changed), ""]
    if same:
        lines += [f"<details><summary>{len(same)} the same</summary>", "", *_table(same), "", "</details>", ""]
    lines += [f"- {text}" for text in _reasons(found)]
    lines += [f"- {text}" for text in found.notes]
    return "\n".join([*lines, "", LEGEND, ""])


def show(console: Console, found: Comparison) -> None:
    """Print the comparison, the verdict last."""
    from rich.text import Text

    console.print(Text(f"Base: {found.base}"))
    console.print(Text(f"Head: {found.head}"))
    console.print()
    rows = [[Cell(text) for text in _cells(change)] for change in _sorted(found.changes)]
    shown = [column for column in range(len(HEADER)) if any(row[column].text != "-" for row in rows)]
    print_table(
        console,
        [HEADER[column] for column in shown],
        [[row[column] for column in shown] for row in rows],
        [NUMERIC[column] for column in shown],
    )
    console.print()
    for text in (*_reasons(found), *found.notes):
        console.print(Text(text))
    console.print(Text(LEGEND, style="dim"))
    console.print(Text(verdict_line(found), style="bold"))


def verdict_line(found: Comparison) -> str:
    """What it comes to, in one line: counts by verdict, with the providers of those that are not the same."""
    parts = []
    for verdict in VERDICTS:
        members = [change for change in found.changes if change.verdict == verdict]
        if members:
            names = f" ({_providers(members)})" if verdict != "same" else ""
            parts.append(f"{len(members)} {verdict}{names}")
    memory = [change for change in found.changes if change.more_memory]
    if memory:
        parts.append(f"{len(memory)} with more memory ({_providers(memory)})")
    counts = ", ".join(parts) or "nothing to compare"
    return f"{_WORDS[found.exit_code]}: {counts}"


def to_json(found: Comparison) -> dict[str, Any]:
    """Plain values: what was compared, a row a point, the points without a time."""
    return {
        "base": found.base,
        "head": found.head,
        "threshold": found.threshold,
        "exit_code": found.exit_code,
        "changes": [_to_row(change) for change in found.changes],
        "untimed": [
            {"point": it.point.key, "provider": it.point.provider, "status": it.status, "reason": it.reason}
            for it in found.untimed
        ],
        "notes": list(found.notes),
    }


def _to_row(change: Change) -> dict[str, Any]:
    values: dict[str, Any] = {
        "point": change.point.key,
        "provider": change.point.provider,
        "operator": change.operator,
        "workload": change.point.workload.to_dict(),
        "mode": change.point.mode,
        "regime": change.point.regime,
        "verdict": change.verdict,
        "more_memory": change.more_memory,
    }
    for name in ("ratio", "ratio_low", "ratio_high", "p_value", "limit", "floor", "reason"):
        values[name] = getattr(change, name)
    for name in ("latency_ms", "peak_memory_bytes", "saved_memory_bytes", "relative_error"):
        sides: Sides = getattr(change, name)
        values |= {f"base_{name}": sides.base, f"head_{name}": sides.head}
    return values


def _sorted(changes: Sequence[Change]) -> list[Change]:
    return sorted(changes, key=lambda change: (not change.more_memory, VERDICTS.index(change.verdict)))


def _table(changes: Sequence[Change]) -> list[str]:
    rows = [HEADER, *map(_cells, changes)]
    shown = [column for column in range(len(HEADER)) if any(row[column] != "-" for row in rows[1:])]
    lines = [[row[column].replace("|", "\\|") for column in shown] for row in rows]
    lines.insert(1, ["---:" if NUMERIC[column] else "---" for column in shown])
    return [f"| {' | '.join(line)} |" for line in lines]


def _cells(change: Change) -> tuple[str, ...]:
    point = change.point
    regime = "" if point.regime == "eager" else f" {point.regime}"
    memory = max(change.peak_memory_bytes, change.saved_memory_bytes, key=lambda it: abs((it.ratio or 1) - 1))
    return (
        change.verdict,
        point.provider,
        style.MODE_SHORT.get(point.mode, point.mode) + regime,
        point.workload.label(),
        _number(change.latency_ms.base),
        _number(change.latency_ms.head),
        _change(change),
        "-" if change.limit is None else f"±{change.limit:.1%}",
        "-" if change.p_value is None else f"{change.p_value:.2g}",
        "-" if memory.ratio is None else _percent(memory.ratio) if abs(memory.ratio - 1) >= 5e-4 else "=",
        _error(change.relative_error),
    )


def _change(change: Change) -> str:
    if change.ratio is None:
        return "-"
    if change.ratio_low is None or change.ratio_high is None:
        return _percent(change.ratio)
    return f"{_percent(change.ratio)} [{_percent(change.ratio_low)}, {_percent(change.ratio_high)}]"


def _error(error: Sides) -> str:
    """The errors of both sides where they differ by a factor of 2; "=" where they do not."""
    if error.base is None and error.head is None:
        return "-"
    if error.ratio is not None and 1 / _MORE_ERROR <= error.ratio <= _MORE_ERROR:
        return "="
    return " to ".join("none" if value is None else style.error(value) for value in (error.base, error.head))


def _percent(ratio: float) -> str:
    return f"{ratio - 1:+.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _providers(changes: Sequence[Change]) -> str:
    return ", ".join(dict.fromkeys(change.point.provider for change in changes))


def _reasons(found: Comparison) -> list[str]:
    """Why times are missing, a line for each reason."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for change in found.changes:
        if change.reason:
            groups[change.verdict, change.reason].append(change.point.provider)
    for it in found.untimed:
        groups[f"{it.status}, no time on either side", it.reason or "no reason given"].append(it.point.provider)
    return [
        f"{len(names)} {what}: {', '.join(dict.fromkeys(names))}: {reason}" for (what, reason), names in groups.items()
    ]
